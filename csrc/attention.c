/* attention.c: causal multi-head attention, forward, backward, and one query against a cache of keys.

   A task is one head of one batch row. It takes the queries in panels of QUERIES, and keeps the scores of a
   panel in a strip: strip[j][q], a row for each key j, a lane for each query q. No T x T matrix is stored: a
   strip is S x QUERIES, and backward computes it again (Dao et al. 2022).

   In this order the softmax over the keys goes down the strip, with one query in each lane. All six products
   use the tile of gemm.c, with one operand broadcast and the other read along its rows:

       forward     scores  = k q^T       out = probs^T v
       backward    dprobs  = v dout^T    dv += probs dout     dk += dscores q     dq = dscores^T k

   Keys and values are first copied into rows padded with zeros, so that every tile is whole. tinygpt.h has
   the rule which keys a query sees. A panel computes the keys from the first to the last one that any of its
   queries sees. */

enum { QUERIES = COLS };

/* Copies rows x D at a stride to padded x Dp, and fills the rest with zeros. */
static void copy_rows(real *out, const real *in, size_t rows, size_t stride, size_t D, size_t padded,
                      size_t Dp)
{
    for (size_t i = 0; i < rows; i++) {
        memcpy(out + i * Dp, in + i * stride, D * sizeof(real));
        memset(out + i * Dp + D, 0, (Dp - D) * sizeof(real));
    }
    memset(out + rows * Dp, 0, (padded - rows) * Dp * sizeof(real));
}

/* strip[j][q] = rows[j] . columns[.][q]: scores and dprobs. */
static void keys_by_queries(real *strip, const real *rows, const real *columns, size_t D, size_t Dp,
                            size_t begin, size_t end)
{
    for (size_t j = begin; j < end; j += LINES)
        tile(0, LINES, strip + j * QUERIES, QUERIES, NULL, 0, rows + j * Dp, Dp, 1, columns, QUERIES, D);
}

/* out[q] = sum over the keys of strip[j][q] rows[j]: out and dq. */
static void queries_by_channels(real *out, const real *strip, const real *rows, size_t Dp, size_t begin,
                                size_t end)
{
    for (size_t q = 0; q < QUERIES; q += LINES)
        for (size_t c = 0; c < Dp; c += COLS)
            tile(0, LINES, out + q * Dp + c, Dp, NULL, 0, strip + begin * QUERIES + q, 1, QUERIES,
                 rows + begin * Dp + c, Dp, end - begin);
}

/* out[j] += sum over the queries of strip[j][q] rows[q]: dk and dv. */
static void keys_by_channels(real *out, const real *strip, const real *rows, size_t Dp, size_t begin,
                             size_t end)
{
    for (size_t j = begin; j < end; j += LINES)
        for (size_t c = 0; c < Dp; c += COLS)
            tile(0, LINES, out + j * Dp + c, Dp, out + j * Dp + c, Dp, strip + j * QUERIES, QUERIES, 1,
                 rows + c, Dp, QUERIES);
}

/* The keys that the queries of a panel see. For each lane: its own key, and its first key after the prefix.
   For the panel: the keys from begin to end, which some lane sees, and from open to shut, which every lane
   sees. */
struct view {
    ivec own[2], first[2];
    size_t prefix, begin, end, open, shut;
};

static struct view look(const int32_t *start, size_t b, size_t T, size_t S, size_t prefix, size_t i, size_t n)
{
    const size_t after = least(T, S - prefix), inside = T - after; /* queries after and in the prefix */
    struct view w = {.prefix = prefix, .begin = S, .end = up(S - T + i + n, LINES), .shut = S - T + i + 1};
    for (size_t q = 0; q < QUERIES; q++) {
        size_t query = i + (q < n ? q : n - 1); /* a lane without a query repeats the last query */
        size_t own = S - T + query;
        size_t first = start && query >= inside ? prefix + start[b * after + query - inside] : 0;
        first = least(first, own);
        w.own[q / LANES][q % LANES] = own;
        w.first[q / LANES][q % LANES] = first;
        w.begin = least(first, w.begin);
        w.open = first > w.open ? first : w.open;
    }
    w.begin = prefix ? 0 : w.begin / LINES * LINES;
    return w;
}

/* For vector `half` of the lanes: x where a lane sees key j, elsewhere `hidden`. */
INLINE vec mask(const struct view *w, size_t j, int half, vec x, real hidden)
{
    if (j >= w->open && j < w->shut)
        return x;
    ivec after = w->first[half] <= (integer)j;
    return pick((w->own[half] >= (integer)j) & (j < w->prefix ? ~(ivec){0} : after), x, all(hidden));
}

/* strip <- exp(scale strip - top) for each query, with top its largest score; 0 for a key that the query does
   not see. total[q]: the sum over the keys. */
static void softmax(real *strip, real *total, real scale, const struct view *w)
{
    for (int half = 0; half < 2; half++) {
        real *s = strip + half * LANES;
        vec top = all(-INFINITY), whole = {0};
        for (size_t j = w->begin; j < w->end; j++) {
            vec x = mask(w, j, half, scale * load(s + j * QUERIES), -INFINITY);
            store(s + j * QUERIES, x);
            top = vmax(top, x);
        }
        for (size_t j = w->begin; j < w->end; j++) {
            vec p = vexp(load(s + j * QUERIES) - top);
            store(s + j * QUERIES, p);
            whole += p;
        }
        store(total + half * LANES, whole);
    }
}

static void attention_forward_heads(const void *args, size_t begin, size_t end)
{
    const struct attention_forward *a = args;
    const size_t D = a->D, T = a->T, S = a->S, Dp = up(D, COLS), Sp = up(S, LINES);
    const real scale = 1 / (real)sqrt(D);
    real *k = scratch(SCRATCH_PRIVATE, ((2 * Sp + 2 * QUERIES) * Dp + Sp * QUERIES) * sizeof(real));
    if (!k)
        return;
    real *v = k + Sp * Dp, *q_t = v + Sp * Dp, *out = q_t + QUERIES * Dp, *strip = out + QUERIES * Dp;
    for (size_t bh = begin; bh < end; bh++) {
        const size_t b = bh / a->H, h = bh % a->H;
        copy_rows(k, a->k + b * a->k_batch + h * D, S, a->k_row, D, Sp, Dp);
        copy_rows(v, a->v + b * a->v_batch + h * D, S, a->v_row, D, Sp, Dp);
        for (size_t i = 0; i < T; i += QUERIES) {
            const size_t n = least(T - i, QUERIES);
            const struct view w = look(a->start, b, T, S, a->prefix, i, n);
            pack(q_t, a->q + b * a->q_batch + i * a->q_row + h * D, n, QUERIES, D, a->q_row, 1);
            keys_by_queries(strip, k, q_t, D, Dp, w.begin, w.end);
            real total[QUERIES];
            softmax(strip, total, scale, &w);
            queries_by_channels(out, strip, v, Dp, w.begin, w.end);
            for (size_t r = 0; r < n; r++) {
                const real share = 1 / total[r];
                for (size_t d = 0; d < D; d++)
                    a->out[((b * T + i + r) * a->H + h) * D + d] = out[r * Dp + d] * share;
            }
        }
    }
}

/* T = 1, a step of generation: `heads` heads of row b, beginning with h0. Every key and value is used once,
   so reading them takes the time, and memory is fastest when it is read strictly in order: row by row, all
   heads of a row. The products of LANES keys are kept, and their LANES sums then fill a vector. */
INLINE void decode(const size_t D, const struct attention_forward *a, size_t b, size_t h0, size_t heads)
{
    const size_t S = a->S, Sp = up(S, LANES), own = S - 1;
    const size_t start = a->start && a->prefix < S ? a->prefix + a->start[b] : 0;
    const size_t first = least(start, own), begin = a->prefix ? 0 : first / LANES * LANES;
    const real scale = 1 / (real)sqrt(D), *q = a->q + b * a->q_batch + h0 * D;
    const real *k = a->k + b * a->k_batch + h0 * D, *v = a->v + b * a->v_batch + h0 * D;
    vec *restrict products = scratch(SCRATCH_PRIVATE, heads * (LANES * LANES + Sp) * sizeof(real));
    if (!products)
        return;
    real *probs = (real *)(products + heads * LANES), *restrict out = a->out + (b * a->H + h0) * D;
    for (size_t j = begin; j < S; j += LANES) {
        for (size_t l = 0; l < LANES; l++) {
            const real *row = k + least(j + l, own) * a->k_row;
            for (size_t h = 0; h < heads; h++) {
                vec x = {0};
                for (size_t d = 0; d < D; d += LANES)
                    x += load_n(q + h * D + d, D - d, 0) * load_n(row + h * D + d, D - d, 0);
                products[h * LANES + l] = x;
            }
        }
        for (size_t h = 0; h < heads; h++)
            store(probs + h * Sp + j, scale * sums(products + h * LANES));
    }
    for (size_t h = 0; h < heads; h++) {
        real *p = probs + h * Sp;
        vec top = all(-INFINITY), total = {0};
        for (size_t j = a->prefix; j < first; j++) /* hidden keys */
            p[j] = -INFINITY;
        for (size_t j = S; j < Sp; j++)
            p[j] = -INFINITY;
        for (size_t j = begin; j < S; j += LANES)
            top = vmax(top, load(p + j));
        top = all(max_lane(top));
        for (size_t j = begin; j < S; j += LANES) {
            const vec e = vexp(load(p + j) - top);
            store(p + j, e);
            total += e;
        }
        const real share = 1 / sum(total);
        for (size_t j = begin; j < S; j += LANES)
            store(p + j, share * load(p + j));
    }
    memset(out, 0, heads * D * sizeof(real));
    for (size_t j = begin; j < S; j++)
        for (size_t h = 0; h < heads; h++) {
            const real *row = v + j * a->v_row + h * D, share = probs[h * Sp + j];
            real *to = out + h * D;
            for (size_t d = 0; d < D; d += LANES)
                store_n(to + d, load_n(to + d, D - d, 0) + share * load_n(row + d, D - d, 0), D - d);
        }
}

/* The usual head sizes are compile-time constants: the compiler then unrolls the loops. */
static void attention_decode_heads(const void *args, size_t begin, size_t end)
{
    const struct attention_forward *a = args;
    for (size_t bh = begin, heads; bh < end; bh += heads) {
        const size_t b = bh / a->H, h = bh % a->H;
        heads = least(a->H - h, end - bh);
        if (a->D == 64)
            decode(64, a, b, h, heads);
        else if (a->D == 32)
            decode(32, a, b, h, heads);
        else
            decode(a->D, a, b, h, heads);
    }
}

static void attention_forward(const void *args)
{
    struct attention_forward a = *(const struct attention_forward *)args;
    if (a.length)
        a.S = (size_t)*a.length;
    const size_t grain = 1 + 4096 / (a.T * a.S * a.D + 1);
    parallel(a.T == 1 ? attention_decode_heads : attention_forward_heads, &a, a.B * a.H, grain);
}

static void attention_backward_heads(const void *args, size_t begin, size_t end)
{
    const struct attention_backward *a = args;
    const size_t D = a->D, T = a->T, S = a->S, Dp = up(D, COLS), Sp = up(S, LINES);
    const real scale = 1 / (real)sqrt(D);
    real *k = scratch(SCRATCH_PRIVATE, ((4 * Sp + 5 * QUERIES) * Dp + 2 * Sp * QUERIES) * sizeof(real));
    if (!k)
        return;
    real *v = k + Sp * Dp, *dk = v + Sp * Dp, *dv = dk + Sp * Dp, *q = dv + Sp * Dp, *q_t = q + QUERIES * Dp;
    real *dout = q_t + QUERIES * Dp, *dout_t = dout + QUERIES * Dp, *dq = dout_t + QUERIES * Dp;
    real *probs = dq + QUERIES * Dp, *dscores = probs + Sp * QUERIES;
    for (size_t bh = begin; bh < end; bh++) {
        const size_t b = bh / a->H, h = bh % a->H;
        copy_rows(k, a->k + b * a->k_batch + h * D, S, a->k_row, D, Sp, Dp);
        copy_rows(v, a->v + b * a->v_batch + h * D, S, a->v_row, D, Sp, Dp);
        memset(dk, 0, 2 * Sp * Dp * sizeof(real));
        for (size_t i = 0; i < T; i += QUERIES) {
            const size_t n = least(T - i, QUERIES), at = (b * T + i) * a->H * D + h * D;
            const struct view w = look(a->start, b, T, S, a->prefix, i, n);
            copy_rows(q, a->q + b * a->q_batch + i * a->q_row + h * D, n, a->q_row, D, QUERIES, Dp);
            copy_rows(dout, a->dout + at, n, a->H * D, D, QUERIES, Dp);
            pack(q_t, q, QUERIES, QUERIES, D, Dp, 1);
            pack(dout_t, dout, QUERIES, QUERIES, D, Dp, 1);
            keys_by_queries(probs, k, q_t, D, Dp, w.begin, w.end); /* scores; softmax makes them probs */
            keys_by_queries(dscores, v, dout_t, D, Dp, w.begin, w.end); /* dprobs */
            real total[QUERIES];
            softmax(probs, total, scale, &w);
            for (int half = 0; half < 2; half++) { /* dscores = probs (dprobs - sum of probs dprobs) */
                real *p = probs + half * LANES, *dp = dscores + half * LANES;
                const vec share = 1 / load(total + half * LANES);
                vec along = {0};
                for (size_t j = w.begin; j < w.end; j++) {
                    store(p + j * QUERIES, share * load(p + j * QUERIES));
                    along += load(p + j * QUERIES) * load(dp + j * QUERIES);
                }
                for (size_t j = w.begin; j < w.end; j++)
                    store(dp + j * QUERIES, scale * load(p + j * QUERIES) * (load(dp + j * QUERIES) - along));
            }
            keys_by_channels(dv, probs, dout, Dp, w.begin, w.end);
            keys_by_channels(dk, dscores, q, Dp, w.begin, w.end);
            queries_by_channels(dq, dscores, k, Dp, w.begin, w.end);
            for (size_t r = 0; r < n; r++)
                memcpy(a->dq + b * a->dq_batch + (i + r) * a->dq_row + h * D, dq + r * Dp, D * sizeof(real));
        }
        for (size_t j = 0; j < S; j++) {
            memcpy(a->dk + b * a->dk_batch + j * a->dk_row + h * D, dk + j * Dp, D * sizeof(real));
            memcpy(a->dv + b * a->dv_batch + j * a->dv_row + h * D, dv + j * Dp, D * sizeof(real));
        }
    }
}

static void attention_backward(const void *args)
{
    const struct attention_backward *a = args;
    parallel(attention_backward_heads, a, a->B * a->H, 1 + 4096 / (a->T * a->S * a->D + 1));
}

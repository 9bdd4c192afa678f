/* sample.c: draws the next token of each row, as ops.sample defines it: softmax of logits / temperature; the
   top_k likeliest tokens, or the likeliest with top_p together; then one random number against the sums.

   Nothing is sorted. The threshold of a cut is found as quickselect finds a rank (Hoare 1961): split around a
   pivot, weigh the upper part, continue in the part with the threshold. For top_k a token weighs 1, for top_p
   its probability. */

enum { MASS_BLOCK = 256 }; /* tokens that `draw` adds up and skips at once */

static double mass(const real *p, size_t n)
{
    double part[8] = {0}, total = 0;
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (size_t l = 0; l < 8; l++)
            part[l] += p[i + l];
    for (; i < n; i++)
        total += p[i];
    for (size_t l = 0; l < 8; l++)
        total += part[l];
    return total;
}

/* The largest element t of x such that the elements >= t together weigh at least `goal`; the smallest element
   if all together weigh less. Reorders x. */
static real cut(real *x, size_t n, double goal, int by_mass)
{
    real threshold = 0;
    while (n) {
        const real pivot = x[n / 2];
        size_t above = 0, equal = 0; /* x is reordered: above the pivot, equal to it, below it */
        double above_weight = 0;
        for (size_t i = 0; i < n; i++) {
            const real y = x[i];
            if (y < pivot)
                continue;
            x[i] = x[above + equal];
            x[above + equal] = y;
            if (y > pivot) {
                x[above + equal] = x[above];
                x[above++] = y;
                above_weight += by_mass ? y : 1;
            } else
                equal++;
        }
        if (above_weight >= goal) {
            n = above;
            continue;
        }
        threshold = pivot;
        goal -= above_weight + equal * (by_mass ? (double)pivot : 1);
        if (goal <= 0)
            break;
        x += above + equal, n -= above + equal;
    }
    return threshold;
}

static int32_t draw(const real *p, size_t V, double uniform)
{
    double total = 0, sum = 0, next;
    for (size_t i = 0; i < V; i += MASS_BLOCK)
        total += mass(p + i, least(V - i, MASS_BLOCK));
    const double goal = uniform * total;
    size_t i = 0, last = 0;
    for (; i + MASS_BLOCK < V && (next = sum + mass(p + i, MASS_BLOCK)) <= goal; i += MASS_BLOCK)
        sum = next;
    for (; i < V; i++) {
        if (p[i] > 0)
            last = i; /* the answer if all sums, rounded, stay below `goal` */
        if ((sum += p[i]) > goal)
            break;
    }
    return last;
}

static void sample_rows(const void *args, size_t begin, size_t end)
{
    const struct sample *a = args;
    const size_t V = a->V;
    const real temperature = a->temperature > 1e-6 ? a->temperature : 1e-6;
    real *p = scratch(SCRATCH_PRIVATE, 2 * up(V, LANES) * sizeof(real));
    if (!p)
        return;
    real *copy = p + up(V, LANES);
    for (size_t row = begin; row < end; row++) {
        const real *x = a->logits + row * a->logits_row;
        vec tops = all(-INFINITY);
        ivec bad = {0};
        for (size_t i = 0; i < V; i += LANES) {
            const vec y = load_n(x + i, V - i, -INFINITY);
            tops = vmax(tops, y);
            bad |= y != y;
        }
        const real top = max_lane(tops);
        int broken = !(top - top == 0); /* infinite */
        for (size_t l = 0; l < LANES; l++)
            broken |= bad[l] != 0;
        a->out[row] = -1;
        if (broken)
            continue;
        if (a->temperature == 0) {
            size_t i = 0;
            while (x[i] != top)
                i++;
            a->out[row] = i;
            continue;
        }
        for (size_t i = 0; i < V; i += LANES)
            store(p + i, (load_n(x + i, V - i, -INFINITY) - top) / temperature);
        real threshold = -INFINITY;
        if (a->top_k && a->top_k < V) {
            memcpy(copy, p, V * sizeof(real));
            threshold = cut(copy, V, a->top_k, 0);
        }
        for (size_t i = 0; i < V; i += LANES) {
            const vec y = load(p + i);
            store(p + i, pick(y < threshold, all(0), vexp(y)));
        }
        if (a->top_p < 1) {
            memcpy(copy, p, V * sizeof(real));
            threshold = cut(copy, V, a->top_p * mass(p, V), 1);
            for (size_t i = 0; i < V; i++)
                p[i] = p[i] < threshold ? 0 : p[i];
        }
        a->out[row] = draw(p, V, a->uniform[row]);
    }
}

static void sample(const void *args)
{
    const struct sample *a = args;
    parallel(sample_rows, a, a->rows, 1 + 4096 / (a->V + 1));
}

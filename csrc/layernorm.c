/* layernorm.c: y = g (x - mean) rstd + b over each row of C channels, and its gradient. ops.py derives it. */

static void layernorm_forward_rows(const void *args, size_t begin, size_t end)
{
    const struct layernorm_forward *a = args;
    const size_t C = a->C;
    for (size_t i = begin; i < end; i++) {
        const real *x = a->x + i * C;
        vec total = {0}, squares = {0};
        for (size_t c = 0; c < C; c += LANES)
            total += load_n(x + c, C - c, 0);
        real mean = sum(total) / C;
        for (size_t c = 0; c < C; c += LANES) {
            vec d = load_n(x + c, C - c, mean) - mean;
            squares += d * d;
        }
        real rstd = 1 / (real)sqrt(sum(squares) / C + a->eps);
        for (size_t c = 0; c < C; c += LANES) {
            vec xhat = (load_n(x + c, C - c, 0) - mean) * rstd;
            vec y = xhat * load_n(a->g + c, C - c, 0) + load_n(a->b + c, C - c, 0);
            store_n(a->out + i * C + c, y, C - c);
        }
        a->mean[i] = mean;
        a->rstd[i] = rstd;
    }
}

static void layernorm_forward(const void *args)
{
    const struct layernorm_forward *a = args;
    parallel(layernorm_forward_rows, a, a->rows, 1 + 4096 / (a->C + 1));
}

/* One pass over the rows gives dx, dg and db. dg and db are sums over rows. The rows are cut into parts; each
   part has its own sums, and the end adds them up. The cut does not depend on the number of threads. */
enum { MOST_PARTS = 32 };

struct layernorm_parts {
    const struct layernorm_backward *a;
    real *dg, *db; /* (parts, C) */
    size_t rows;   /* of a part */
};

static void layernorm_backward_parts(const void *args, size_t begin, size_t end)
{
    const struct layernorm_parts *t = args;
    const struct layernorm_backward *a = t->a;
    const size_t C = a->C;
    const int sums = a->dg || a->db; /* 0 for a frozen norm */
    for (size_t part = begin; part < end; part++) {
        real *dg = t->dg + part * C, *db = t->db + part * C;
        memset(dg, 0, C * sizeof(real));
        memset(db, 0, C * sizeof(real));
        for (size_t i = part * t->rows; i < least((part + 1) * t->rows, a->rows); i++) {
            const real *x = a->x + i * C, *dout = a->dout + i * C, mean = a->mean[i], rstd = a->rstd[i];
            vec ones = {0}, along = {0};
            for (size_t c = 0; c < C; c += LANES) {
                const vec xhat = (load_n(x + c, C - c, 0) - mean) * rstd, dy = load_n(dout + c, C - c, 0);
                const vec dxhat = dy * load_n(a->g + c, C - c, 0);
                ones += dxhat;
                along += dxhat * xhat;
                if (!sums)
                    continue;
                store_n(dg + c, load_n(dg + c, C - c, 0) + dy * xhat, C - c);
                store_n(db + c, load_n(db + c, C - c, 0) + dy, C - c);
            }
            const real along_ones = sum(ones) / C, along_xhat = sum(along) / C;
            for (size_t c = 0; c < C && a->dx; c += LANES) {
                const vec xhat = (load_n(x + c, C - c, 0) - mean) * rstd;
                const vec dxhat = load_n(dout + c, C - c, 0) * load_n(a->g + c, C - c, 0);
                const vec other = a->add ? load_n(a->add + i * C + c, C - c, 0) : (vec){0};
                store_n(a->dx + i * C + c, other + rstd * (dxhat - along_ones - xhat * along_xhat), C - c);
            }
        }
    }
}

static void layernorm_backward(const void *args)
{
    const struct layernorm_backward *a = args;
    const size_t C = a->C, rows = up(a->rows, MOST_PARTS) / MOST_PARTS; /* rows of a part */
    const size_t parts = rows ? up(a->rows, rows) / rows : 0;
    real *dg = scratch(SCRATCH_SHARED, 2 * MOST_PARTS * C * sizeof(real));
    if (!dg)
        return;
    real *db = dg + MOST_PARTS * C;
    const struct layernorm_parts t = {a, dg, db, rows};
    parallel(layernorm_backward_parts, &t, parts, 1 + 4096 / (rows * C + 1));
    for (size_t c = 0; c < C && (a->dg || a->db); c++) {
        real g = 0, b = 0;
        for (size_t part = 0; part < parts; part++) {
            g += dg[part * C + c];
            b += db[part * C + c];
        }
        if (a->dg)
            a->dg[c] = g;
        if (a->db)
            a->db[c] = b;
    }
}

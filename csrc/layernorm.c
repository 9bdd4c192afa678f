/* layernorm.c: y = g (x - mean) rstd + b over each row of C channels, and its gradient. See ops.py for the
   why. */

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

static void layernorm_backward_rows(const void *args, size_t begin, size_t end)
{
    const struct layernorm_backward *a = args;
    const size_t C = a->C;
    for (size_t i = begin; i < end; i++) {
        const real *x = a->x + i * C, *dout = a->dout + i * C;
        const real mean = a->mean[i], rstd = a->rstd[i];
        vec ones = {0}, along = {0};
        for (size_t c = 0; c < C; c += LANES) {
            vec xhat = (load_n(x + c, C - c, 0) - mean) * rstd;
            vec dxhat = load_n(dout + c, C - c, 0) * load_n(a->g + c, C - c, 0);
            ones += dxhat;
            along += dxhat * xhat;
        }
        real along_ones = sum(ones) / C, along_xhat = sum(along) / C;
        for (size_t c = 0; c < C; c += LANES) {
            vec xhat = (load_n(x + c, C - c, 0) - mean) * rstd;
            vec dxhat = load_n(dout + c, C - c, 0) * load_n(a->g + c, C - c, 0);
            store_n(a->dx + i * C + c, rstd * (dxhat - along_ones - xhat * along_xhat), C - c);
        }
    }
}

/* dg and db are sums over the rows: a range of channels, row by row, as in column_sum. */
static void layernorm_backward_channels(const void *args, size_t begin, size_t end)
{
    const struct layernorm_backward *a = args;
    const size_t C = a->C;
    for (size_t c = begin; c < end; c++) {
        if (a->dg)
            a->dg[c] = 0;
        if (a->db)
            a->db[c] = 0;
    }
    for (size_t i = 0; i < a->rows; i++) {
        const real *x = a->x + i * C, *dout = a->dout + i * C;
        const real mean = a->mean[i], rstd = a->rstd[i];
        for (size_t c = begin; a->dg && c < end; c++)
            a->dg[c] += dout[c] * ((x[c] - mean) * rstd);
        for (size_t c = begin; a->db && c < end; c++)
            a->db[c] += dout[c];
    }
}

static void layernorm_backward(const void *args)
{
    const struct layernorm_backward *a = args;
    if (a->dx)
        parallel(layernorm_backward_rows, a, a->rows, 1 + 4096 / (a->C + 1));
    if (a->dg || a->db)
        parallel(layernorm_backward_channels, a, a->C, 64);
}

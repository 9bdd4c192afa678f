/* embedding.c: rows of a table by id, and the gradient of the table; the residual sum, dropout, and rows that
   are appended to a KV cache. */

static void embedding_forward_rows(const void *args, size_t begin, size_t end)
{
    const struct embedding_forward *a = args;
    for (size_t i = begin; i < end; i++)
        memcpy(a->out + i * a->C, a->w + (size_t)a->ids[i] * a->C, a->C * sizeof(real));
}

static void embedding_forward(const void *args)
{
    const struct embedding_forward *a = args;
    parallel(embedding_forward_rows, a, a->rows, 1 + 8192 / (a->C + 1));
}

static void check_ids(const void *args)
{
    const struct check_ids *a = args;
    *a->outside = 0;
    for (size_t i = 0; i < a->n; i++)
        *a->outside |= (uint32_t)a->ids[i] >= a->below; /* as unsigned, a negative id is large */
}

/* Two rows may have the same id, so each thread has some of the channels of all rows. */
static void embedding_backward_channels(const void *args, size_t begin, size_t end)
{
    const struct embedding_backward *a = args;
    for (size_t v = 0; v < a->V && !a->add; v++)
        memset(a->dw + v * a->C + begin, 0, (end - begin) * sizeof(real));
    for (size_t i = 0; i < a->rows; i++) {
        real *restrict dw = a->dw + (size_t)a->ids[i] * a->C;
        const real *restrict dout = a->dout + i * a->C;
        for (size_t c = begin; c < end; c++)
            dw[c] += dout[c];
    }
}

static void embedding_backward(const void *args)
{
    const struct embedding_backward *a = args;
    parallel(embedding_backward_channels, a, a->C, 64);
}

static void residual_forward_range(const void *args, size_t begin, size_t end)
{
    const struct residual_forward *a = args;
    for (size_t i = begin; i < end; i++)
        a->out[i] = a->x[i] + a->branch[i];
}

static void residual_forward(const void *args)
{
    const struct residual_forward *a = args;
    parallel(residual_forward_range, a, a->n, 4096);
}

/* The hash of ops.dropout_mask. It depends on the seed and the element's number alone. */
static void dropout_range(const void *args, size_t begin, size_t end)
{
    const struct dropout_forward *a = args;
    const real scale = a->scale;
    for (size_t i = begin; i < end; i++) {
        uint64_t z = a->seed + (i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        a->out[i] = z >> 40 >= a->threshold ? a->x[i] * scale : 0;
    }
}

static void dropout_forward(const void *args)
{
    const struct dropout_forward *a = args;
    parallel(dropout_range, a, a->n, 4096);
}

static void append_rows_batch(const void *args, size_t begin, size_t end)
{
    const struct append_rows *a = args;
    const size_t at = (size_t)*a->length - a->T;
    for (size_t b = begin; b < end; b++)
        for (size_t t = 0; t < a->T; t++)
            memcpy(a->cache + b * a->cache_batch + (at + t) * a->cache_row,
                   a->x + b * a->x_batch + t * a->x_row, a->C * sizeof(real));
}

static void append_rows(const void *args)
{
    const struct append_rows *a = args;
    parallel(append_rows_batch, a, a->B, 1 + 4096 / (a->T * a->C + 1));
}

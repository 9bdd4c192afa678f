/* adamw.c: the two passes over all weights: the norm of the gradient, and the update. */

/* One thread adds up a part, in double: no sum depends on the number of threads. */
enum { STRIPES = 16 };

static void squares_of_parts(const void *args, size_t begin, size_t end)
{
    const struct squares *a = args;
    const real *x = a->x;
    for (size_t part = begin; part < end; part++) {
        double stripe[STRIPES] = {0}; /* independent sums, which the compiler keeps in vectors */
        size_t i = part * a->length, stop = i + a->length < a->n ? i + a->length : a->n;
        for (; i + STRIPES <= stop; i += STRIPES)
            for (size_t k = 0; k < STRIPES; k++)
                stripe[k] += (double)x[i + k] * x[i + k];
        for (; i < stop; i++)
            stripe[0] += (double)x[i] * x[i];
        a->out[part] = 0;
        for (size_t k = 0; k < STRIPES; k++)
            a->out[part] += stripe[k];
    }
}

static void squares(const void *args)
{
    const struct squares *a = args;
    const size_t parts = (a->n + a->length - 1) / a->length;
    parallel(squares_of_parts, a, parts, a->n < 65536 ? parts : 1);
}

static void adamw_range(const void *args, size_t begin, size_t end)
{
    const struct adamw *a = args;
    real *restrict w = a->w, *restrict m = a->m, *restrict v = a->v;
    const real *restrict g = a->g;
    const real scale = a->scale, slow1 = 1 - a->beta1, slow2 = 1 - a->beta2, shrink = a->shrink;
    const real rate = a->rate, correction2 = a->correction2, eps = a->eps;
    for (size_t i = begin; i < end; i++) {
        real gi = g[i] * scale;
        m[i] += slow1 * (gi - m[i]);
        v[i] += slow2 * (gi * gi - v[i]);
        w[i] = w[i] * shrink - rate * m[i] / (real)(SQRT(v[i] * correction2) + eps);
    }
}

static void adamw(const void *args)
{
    const struct adamw *a = args;
    parallel(adamw_range, a, a->n, 8192);
}

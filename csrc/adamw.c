/* adamw.c: the two passes over all weights: the gradient's norm, and the update. */

/* Added up in PARTS fixed parts, so that the sum does not depend on the threads; in double. */
enum { PARTS = 256, STRIPES = 16 };
struct squares {
    const struct sum_of_squares *s;
    double part[PARTS];
};

static void sum_part(const void *args, size_t begin, size_t end)
{
    struct squares *q = (struct squares *)args;
    const real *x = q->s->x;
    const size_t n = q->s->n, length = (n + PARTS - 1) / PARTS;
    for (size_t part = begin; part < end; part++) {
        double stripe[STRIPES] = {0}; /* independent sums, which the compiler can keep in vectors */
        size_t i = part * length, stop = i + length < n ? i + length : n;
        for (; i + STRIPES <= stop; i += STRIPES)
            for (size_t k = 0; k < STRIPES; k++)
                stripe[k] += (double)x[i + k] * x[i + k];
        for (; i < stop; i++)
            stripe[0] += (double)x[i] * x[i];
        q->part[part] = 0;
        for (size_t k = 0; k < STRIPES; k++)
            q->part[part] += stripe[k];
    }
}

static void sum_of_squares(const void *args)
{
    struct squares q = {.s = args};
    parallel(sum_part, &q, PARTS, q.s->n < 65536 ? PARTS : 1);
    *q.s->out = 0;
    for (size_t part = 0; part < PARTS; part++)
        *q.s->out += q.part[part];
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

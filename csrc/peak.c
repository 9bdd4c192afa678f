/* peak.c: the limits of this machine, in arithmetic and in memory: `tinygpt bench` compares the kernels with
   them. */

/* Each of `tasks` does `steps` times 12 independent multiply-adds of whole vectors, in registers. */
static void fma_peak_tasks(const void *args, size_t begin, size_t end)
{
    const struct fma_peak *a = args;
    for (size_t task = begin; task < end; task++) {
        vec x = all(0.999f), y = all(0.001f), sums[12];
        for (size_t i = 0; i < 12; i++)
            sums[i] = all(i + task);
        for (size_t step = 0; step < a->steps; step++) {
            UNROLL
            for (size_t i = 0; i < 12; i++)
                sums[i] = sums[i] * x + y;
        }
        for (size_t i = 1; i < 12; i++)
            sums[0] += sums[i];
        a->out[task] = sum(sums[0]); /* without a result the compiler would remove the loop */
    }
}

static void fma_peak(const void *args)
{
    const struct fma_peak *a = args;
    *a->flops = 2.0 * 12 * LANES * a->steps * a->tasks;
    parallel(fma_peak_tasks, a, a->tasks, 1);
}

/* Reads x once. Each task writes the sum of its part to out. */
static void read_memory_tasks(const void *args, size_t begin, size_t end)
{
    const struct read_memory *a = args;
    const size_t length = a->n / a->tasks;
    for (size_t task = begin; task < end; task++) {
        vec sums[8] = {{0}};
        for (size_t i = task * length; i + 8 * LANES <= (task + 1) * length; i += 8 * LANES) {
            UNROLL
            for (size_t k = 0; k < 8; k++)
                sums[k] += load(a->x + i + k * LANES);
        }
        for (size_t k = 1; k < 8; k++)
            sums[0] += sums[k];
        a->out[task] = sum(sums[0]);
    }
}

static void read_memory(const void *args)
{
    const struct read_memory *a = args;
    parallel(read_memory_tasks, a, a->tasks, 1);
}

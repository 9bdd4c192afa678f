/* gelu.c: GELU in its tanh form, x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), and its gradient.

   (1 + tanh(u)) / 2 is s = 1 / (1 + exp(-2u)), the logistic function of 2u. It needs one exp and has no
   cancellation where tanh(u) is near -1. Its derivative is s (1 - s) (2u)'. */

#define TWO_ROOT_2_OVER_PI ((real)1.5957691216057307117597842397375)

INLINE vec logistic_of_2u(vec x)
{
    return 1 / (1 + vexp(-TWO_ROOT_2_OVER_PI * (x + (real)0.044715 * (x * x * x))));
}

static void gelu_forward_range(const void *args, size_t begin, size_t end)
{
    const struct gelu_forward *a = args;
    for (size_t i = begin; i < end; i += LANES) {
        vec x = load_n(a->x + i, end - i, 0);
        store_n(a->out + i, x * logistic_of_2u(x), end - i);
    }
}

static void gelu_forward(const void *args)
{
    const struct gelu_forward *a = args;
    parallel(gelu_forward_range, a, a->n, 4096);
}

static void gelu_backward_range(const void *args, size_t begin, size_t end)
{
    const struct gelu_backward *a = args;
    for (size_t i = begin; i < end; i += LANES) {
        vec x = load_n(a->x + i, end - i, 0), s = logistic_of_2u(x);
        vec slope = TWO_ROOT_2_OVER_PI * (1 + (real)(3 * 0.044715) * (x * x));
        store_n(a->dx + i, load_n(a->dout + i, end - i, 0) * (s + x * (s * (1 - s)) * slope), end - i);
    }
}

static void gelu_backward(const void *args)
{
    const struct gelu_backward *a = args;
    parallel(gelu_backward_range, a, a->n, 4096);
}

/* cross_entropy.c: -log softmax(logits)[target], and its gradient.

   The probabilities are never stored. Backward computes them again, from the logits and two numbers per row:
   the largest logit, and the sum of exp(logit - largest). */

static void cross_entropy_forward_rows(const void *args, size_t begin, size_t end)
{
    const struct cross_entropy_forward *a = args;
    const size_t V = a->V;
    for (size_t i = begin; i < end; i++) {
        const real *x = a->logits + i * V;
        vec top = all(-INFINITY), total = {0};
        for (size_t v = 0; v < V; v += LANES)
            top = vmax(top, load_n(x + v, V - v, -INFINITY));
        real most = max_lane(top);
        for (size_t v = 0; v < V; v += LANES)
            total += vexp(load_n(x + v, V - v, -INFINITY) - most);
        a->top[i] = most;
        a->total[i] = sum(total);
        a->nll[i] = (real)log(a->total[i]) - (x[a->targets[i]] - most);
    }
}

static void cross_entropy_forward(const void *args)
{
    const struct cross_entropy_forward *a = args;
    parallel(cross_entropy_forward_rows, a, a->rows, 1 + 4096 / (a->V + 1));
}

static void cross_entropy_backward_rows(const void *args, size_t begin, size_t end)
{
    const struct cross_entropy_backward *a = args;
    const size_t V = a->V;
    for (size_t i = begin; i < end; i++) {
        const real *x = a->logits + i * V, weight = a->dnll[i], top = a->top[i], share = weight / a->total[i];
        real *dx = a->dlogits + i * V;
        if (weight == 0) { /* 0 times the softmax may be NaN: the logits of a masked row may be infinite */
            memset(dx, 0, V * sizeof(real));
            continue;
        }
        for (size_t v = 0; v < V; v += LANES)
            store_n(dx + v, share * vexp(load_n(x + v, V - v, 0) - top), V - v);
        dx[a->targets[i]] -= weight;
    }
}

static void cross_entropy_backward(const void *args)
{
    const struct cross_entropy_backward *a = args;
    parallel(cross_entropy_backward_rows, a, a->rows, 1 + 4096 / (a->V + 1));
}

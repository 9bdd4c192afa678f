/* tinygpt.h: all that Python may call, one struct of arguments per operation.

   Shapes: B batch, T time (queries), S keys, C channels, H heads, D = C / H, V vocabulary; rows = B * T.
   Arrays are row-major and contiguous unless a stride is given; strides count elements. `real` is float or
   double: every kernel is compiled for both, and for each instruction set (see variants/). Results come
   first. What each operation computes, and why its gradient is what it is, stands in tinygpt/ops.py.

   Three readers share this file: the kernels, variants/dispatch.c, and setup.py, which makes the bridge to
   Python from it, with void * for each pointer to numbers. */
#ifndef TINYGPT_H
#define TINYGPT_H
#include <stddef.h>
#include <stdint.h>

#define OPS(X) \
    X(gemm) X(column_sum) X(embedding_forward) X(embedding_backward) X(layernorm_forward) \
    X(layernorm_backward) X(gelu_forward) X(gelu_backward) X(attention_forward) X(attention_backward) \
    X(residual_forward) X(dropout_forward) X(cross_entropy_forward) X(cross_entropy_backward) \
    X(squares) X(adamw) X(append_rows) X(pack_panels) X(sample) X(check_ids) \
    X(fma_peak) X(read_memory)

/* c = a b + bias + add, with c and add (M, N), a (M, K), b (K, N), bias (N); bias and add may be NULL.
   Strides make transposes: a^T is a with a_row and a_col exchanged. Rows of c and of add are contiguous,
   c_row apart. */
struct gemm {
    real *c;
    const real *a, *b, *bias, *add, *panels;
    const int32_t *packed;
    size_t M, N, K, c_row, a_row, a_col, b_row, b_col;
    int is_bfloat16;
};

/* out = b (K, N) in panels of as many columns as a tile has, each panel's rows one after the other, zeros
   beyond N. gemm reads them as `panels` instead of b where *packed is 1; panels and packed may be NULL. out
   has room for N rounded up to 32. */
struct pack_panels {
    real *out;
    const real *b;
    size_t N, K, b_row, b_col;
    int is_bfloat16;
};

/* out[j] = sum over i of x[i][j]: the gradient of a bias. */
struct column_sum {
    real *out;
    const real *x;
    size_t rows, cols;
};

struct embedding_forward {
    real *out;             /* (rows, C) */
    const real *w;         /* (V, C) */
    const int32_t *ids;    /* (rows) */
    size_t rows, C;
};

struct embedding_backward {
    real *dw;              /* (V, C) */
    const real *dout;      /* (rows, C) */
    const int32_t *ids;
    size_t V, rows, C;
    int add;               /* to what dw holds; else it begins at zero */
};

struct layernorm_forward {
    real *out, *mean, *rstd;    /* (rows, C), (rows), (rows) */
    const real *x, *g, *b;      /* (rows, C), (C), (C) */
    size_t rows, C;
    double eps;
};

struct layernorm_backward {
    real *dx, *dg, *db;         /* each may be NULL: not wanted */
    const real *dout, *x, *g, *mean, *rstd, *add; /* add: NULL, or added to dx */
    size_t rows, C;
};

struct gelu_forward {
    real *out;
    const real *x;
    size_t n;
};

struct gelu_backward {
    real *dx;
    const real *dout, *x;
    size_t n;
};

/* q, out (B, T, C); k, v (B, S, C): each with the stride of a batch row and of a position. Query i of row b
   sees the keys j <= S - T + i for which j < prefix or j >= prefix + start[b][i], and its own always. start
   is NULL, or (B, T) without the queries that stand in the prefix themselves. S is *length where length is
   not NULL: a replayed call then sees as many keys as there are by then. */
struct attention_forward {
    real *out;
    const real *q, *k, *v;
    const int32_t *start;
    const int64_t *length;
    size_t B, T, S, H, D, prefix, q_batch, q_row, k_batch, k_row, v_batch, v_row;
};

struct attention_backward {
    real *dq, *dk, *dv;
    const real *dout, *q, *k, *v;
    const int32_t *start;
    size_t B, T, S, H, D, prefix, q_batch, q_row, k_batch, k_row, v_batch, v_row;
    size_t dq_batch, dq_row, dk_batch, dk_row, dv_batch, dv_row;
};

struct residual_forward {
    real *out;
    const real *x, *branch;
    size_t n;
};

struct dropout_forward {
    real *out;
    const real *x;
    size_t n;
    uint64_t seed, threshold;    /* dropped where the upper 24 bits of the hash are below the threshold */
    double scale;
};

struct cross_entropy_forward {
    real *nll, *top, *total;     /* (rows) each */
    const real *logits;          /* (rows, V) */
    const int32_t *targets;      /* (rows) */
    size_t rows, V;
};

struct cross_entropy_backward {
    real *dlogits;               /* (rows, V) */
    const real *dnll, *logits, *top, *total;
    const int32_t *targets;
    size_t rows, V;
};

struct squares {
    double *out;                 /* (parts,): the sum of each `length` squares */
    const real *x;
    size_t n, length;
};

struct adamw {
    real *w, *m, *v;
    const real *g;
    size_t n;
    double scale, beta1, beta2, eps, rate, shrink, correction2;
    /* rate = lr / (1 - beta1^step), shrink = 1 - lr weight_decay, correction2 = 1 / (1 - beta2^step) */
};

/* x (B, T, C) becomes the last T of the first *length positions of cache (B, S, C), each with its strides.
   The call returns 2 where there is no such place. */
struct append_rows {
    real *cache;
    const real *x;
    const int64_t *length;
    size_t B, T, S, C, cache_batch, cache_row, x_batch, x_row;
};

/* One token a row, drawn as ops.sample says; -1 where the logits are not finite. */
struct sample {
    int32_t *out;                /* (rows) */
    const real *logits;          /* (rows, V), logits_row apart */
    const double *uniform;       /* (rows) in [0, 1) */
    size_t rows, V, logits_row, top_k;
    double temperature, top_p;
};

/* Whether an id is not one of the numbers 0 to below - 1; the call then returns 2. */
struct check_ids {
    int32_t *outside;            /* one number */
    const int32_t *ids;          /* (n) */
    size_t n, below;
};

/* For `tinygpt bench`: the work of registers alone, and of memory alone; see peak.c. */
struct fma_peak {
    real *out;                   /* (tasks) */
    double *flops;               /* one number: the operations that were made */
    size_t tasks, steps;
};

struct read_memory {
    real *out;                   /* (tasks) */
    const real *x;
    size_t tasks, n;
};

/* Runs the operation number `op`, in the order of OPS, in double if is_double; args is its struct. Returns
   0, or 1 if memory ended: the results are then none, or 2 if check_ids or append_rows says no. */
int tinygpt_run(int op, int is_double, const void *args);

/* Many of them, one after the other, up to one that does not return 0. */
struct call {
    int op, is_double;
    const void *args;
};
int tinygpt_run_all(const struct call *calls, size_t n);

/* Chooses the instruction set ("base", "avx2", "avx512"), NULL for the best that this machine has. Returns
   its name, or NULL where the machine lacks the one asked for. */
const char *tinygpt_choose_isa(const char *name);

void tinygpt_set_threads(size_t n);

/* See memory.c. */
void tinygpt_keep_memory(void);

#endif

/* tinygpt.h: the functions that Python calls, and one struct of arguments per operation.

   Shapes: B batch, T time (queries), S keys, C channels, H heads, D = C / H, V vocabulary; rows = B * T.
   Arrays are row-major and contiguous unless a stride is given. Strides count elements. `real` is float or
   double: every kernel is compiled for both, and for each instruction set (see variants/). In a struct the
   results come first. tinygpt/core/ops.py says what each operation computes, and derives its gradient.

   Three readers share this file: the kernels, variants/dispatch.c and setup.py. setup.py makes the bridge to
   Python, with void * for each pointer to numbers. */
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
   Strides make transposes: a^T is a with a_row and a_col exchanged. The rows of c and of add are contiguous,
   and begin c_row elements apart. */
struct gemm {
    real *c;
    const real *a, *b, *bias, *add, *panels;
    const int32_t *packed;
    size_t M, N, K, c_row, a_row, a_col, b_row, b_col;
    int is_bfloat16;
};

/* out = b (K, N), cut into panels. A panel has as many columns as a tile of gemm, and its rows lie one after
   the other. Columns beyond N are zeros; out has room for N rounded up to a multiple of 32.
   gemm reads `panels` instead of b where *packed is 1. panels and packed may be NULL. */
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
    int add;               /* 1: add to dw; 0: dw begins at zero */
};

struct layernorm_forward {
    real *out, *mean, *rstd;    /* (rows, C), (rows), (rows) */
    const real *x, *g, *b;      /* (rows, C), (C), (C) */
    size_t rows, C;
    double eps;
};

struct layernorm_backward {
    real *dx, *dg, *db;         /* each may be NULL: not computed */
    const real *dout, *x, *g, *mean, *rstd, *add; /* add: NULL, or (rows, C), which is added to dx */
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

/* q, out (B, T, C); k, v (B, S, C): each with the stride of a batch row and of a position.
   Query i of row b stands at key S - T + i. It sees its own key, and of the keys before it those with
   j < prefix or j >= prefix + start[b][i]. start is NULL, or (B, min(T, S - prefix)): a query in the prefix
   has no start.
   Where length is not NULL, S is *length: the call reads it, so a replay sees the keys of that moment. */
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

/* Copies x (B, T, C) to positions *length - T to *length of cache (B, S, C). Both have strides. The call
   returns 2 where the cache has no such positions. */
struct append_rows {
    real *cache;
    const real *x;
    const int64_t *length;
    size_t B, T, S, C, cache_batch, cache_row, x_batch, x_row;
};

/* Draws one token per row, as ops.sample does; -1 where the logits are not finite. */
struct sample {
    int32_t *out;                /* (rows) */
    const real *logits;          /* (rows, V), logits_row apart */
    const double *uniform;       /* (rows) in [0, 1) */
    size_t rows, V, logits_row, top_k;
    double temperature, top_p;
};

/* outside = 1 if any id is negative or at least `below`, else 0. If 1, the call returns 2. */
struct check_ids {
    int32_t *outside;            /* one number */
    const int32_t *ids;          /* (n) */
    size_t n, below;
};

/* For `tinygpt bench`: arithmetic without memory, and memory without arithmetic; see peak.c. */
struct fma_peak {
    real *out;                   /* (tasks) */
    double *flops;               /* one number: the count of floating-point operations */
    size_t tasks, steps;
};

struct read_memory {
    real *out;                   /* (tasks) */
    const real *x;
    size_t tasks, n;
};

/* Runs the operation number `op`, in the order of OPS, in double if is_double; args is its struct. Returns
   0; 1 if there was no memory, and the results are undefined; 2 where check_ids or append_rows says so. */
int tinygpt_run(int op, int is_double, const void *args);

/* Runs n calls in order, and stops after the first that does not return 0. Returns the last status. */
struct call {
    int op, is_double;
    const void *args;
};
int tinygpt_run_all(const struct call *calls, size_t n);

/* Chooses the instruction set by name: "base", "avx2", "avx512" or "avx512bf16". NULL chooses the best one of
   this machine. Returns the name, or NULL where the machine does not have that instruction set. */
const char *tinygpt_choose_isa(const char *name);

void tinygpt_set_threads(size_t n);

/* See memory.c. */
void tinygpt_keep_memory(void);

#endif

/* double, every machine: vectors of 16 bytes are SSE2 on x86-64 and NEON on arm64. NEON has twice as many
   registers. */
#define REAL_IS_DOUBLE 1
#define VECTOR_BYTES 16
#ifdef __aarch64__
#define ROWS 8
#else
#define ROWS 4
#endif
#define LINES 4
#define TABLE tinygpt_f64_base
#include "kernels.inc"

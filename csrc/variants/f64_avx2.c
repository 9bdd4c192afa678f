/* double, avx2. */
#ifdef __x86_64__
#define REAL_IS_DOUBLE 1
#define VECTOR_BYTES 32
#define ROWS 6
#define LINES 4
#define TARGET "avx2,fma"
#define TABLE tinygpt_f64_avx2
#include "kernels.inc"
#endif

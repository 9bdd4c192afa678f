/* float, avx512. */
#ifdef __x86_64__
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 64
#define ROWS 8
#define LINES 8
#define TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"
#define TABLE tinygpt_f32_avx512
#include "kernels.inc"
#endif

/* float, avx512 with its instruction for dot products of bfloat16 pairs. */
#ifdef __x86_64__
#include <immintrin.h>
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 64
#define ROWS 8
#define LINES 8
#define TARGET "avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"
#define BFLOAT16_DOT(acc, a, b) (vec) _mm512_dpbf16_ps((__m512)(acc), (__m512bh)(a), (__m512bh)(b))
#define TABLE tinygpt_f32_avx512bf16
#include "kernels.inc"
#endif

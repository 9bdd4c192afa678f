/* vec.h: the vector type, and its operations that C does not have: partial loads, reductions, exp.

   `vec` is a GNU vector of LANES reals, as wide as a register of the instruction set. + - * / work lane by
   lane, a scalar operand counts for all lanes, and a comparison gives 0 or -1 in each lane. */
#include <math.h>
#include <string.h>

#define LANES (VECTOR_BYTES / sizeof(real))
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef integer ivec __attribute__((vector_size(VECTOR_BYTES)));

#define INLINE static inline __attribute__((always_inline))

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

INLINE vec load(const real *p) { return *(const vec_in_memory *)p; }
INLINE void store(real *p, vec v) { *(vec_in_memory *)p = v; }
INLINE vec all(real x) { return x - (vec){0}; }
INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec vmax(vec a, vec b) { return pick(a > b, a, b); }

/* The first n lanes, for the end of a row; the other lanes get `fill`, or are not written. */
INLINE vec load_n(const real *p, size_t n, real fill)
{
    if (n >= LANES)
        return load(p);
    vec v = all(fill);
    memcpy(&v, p, n * sizeof(real));
    return v;
}

INLINE void store_n(real *p, vec v, size_t n)
{
    if (n >= LANES)
        store(p, v);
    else
        memcpy(p, &v, n * sizeof(real));
}

/* v[i][j] <- v[j][i] for a square of LANES vectors. A round interleaves the elements of rows i and
   i + LANES/2, and writes them as rows 2i and 2i + 1. So it moves one bit of i to j and one bit of j to i:
   log2(LANES) rounds are a transpose. */
#if VECTOR_BYTES / (4 + 4 * REAL_IS_DOUBLE) == 2
#define LOW 0, 2
#define HIGH 1, 3
#elif VECTOR_BYTES / (4 + 4 * REAL_IS_DOUBLE) == 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#elif VECTOR_BYTES / (4 + 4 * REAL_IS_DOUBLE) == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE void transpose(vec *v)
{
    for (size_t round = 1; round < LANES; round *= 2) {
        vec old[LANES];
        memcpy(old, v, sizeof(old));
        for (size_t i = 0; i < LANES / 2; i++) {
            v[2 * i] = SHUFFLE(old[i], old[i + LANES / 2], LOW);
            v[2 * i + 1] = SHUFFLE(old[i], old[i + LANES / 2], HIGH);
        }
    }
}

/* Lane l of the result is the sum over the lanes of v[l], for LANES vectors. A round adds the two halves of
   x[i] and of x[i + n], and interleaves the two results. */
INLINE vec sums(const vec *v)
{
    vec x[LANES];
    memcpy(x, v, sizeof(x));
    UNROLL
    for (size_t round = 1; round < LANES; round *= 2) {
        const size_t n = LANES / 2 / round;
        UNROLL
        for (size_t i = 0; i < n; i++)
            x[i] = SHUFFLE(x[i], x[i + n], LOW) + SHUFFLE(x[i], x[i + n], HIGH);
    }
    return x[0];
}

/* The sum over the lanes, by halving: the same order on every machine with this vector width. */
INLINE real sum(vec v)
{
    real x[LANES];
    store(x, v);
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}

INLINE real max_lane(vec v)
{
    real x[LANES];
    store(x, v);
    for (size_t half = LANES / 2; half; half /= 2)
        for (size_t i = 0; i < half; i++)
            x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

/* exp, lane by lane. In double it is libm's exp, so that finite differences see no approximation. In float:

   x = n ln 2 + r, where n is the nearest integer. So |r| <= 0.3466 and exp(x) = 2^n exp(r).

   exp(r): the series to r^7. Its error is about r^8/8! < 5.3e-9, a tenth of float's rounding.
   n: adding 1.5 * 2^23 to x / ln 2 leaves no bits for a fraction, so the sum rounds; n is in the lowest bits.
   r: n ln 2 is subtracted in two parts, so that n times the first part is exact.
   2^n: n is written into the exponent bits. 2^128 has no such bits, so 2^(n-1) is multiplied by 2 exp(r).

   Results below 2.5e-38 become 0: denormal numbers would be slow. */
INLINE vec vexp(vec x)
{
#if REAL_IS_DOUBLE
    vec y;
    for (size_t i = 0; i < LANES; i++)
        y[i] = exp(x[i]);
    return y;
#else
    const float lowest = -86.6f, highest = 88.72f, magic = 12582912.0f;
    const ivec under = x < lowest, over = x > highest;
    vec c = (vec)((ivec)x & ~(under | over)); /* 0 where the result is out of range */
    vec rounded = c * 1.44269504f + magic;
    vec n = rounded - magic;
    vec r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec bits = (ivec)rounded - (ivec)all(magic); /* n */
    vec y = (p + p) * (vec)((bits + 126) << 23);
    return (vec)(((ivec)y & ~under) | (over & (ivec)all(INFINITY))); /* 1 | infinity = infinity, in bits */
#endif
}

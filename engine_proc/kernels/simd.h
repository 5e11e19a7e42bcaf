/* Sixteen float lanes, one spelling for AVX-512 and AVX2+FMA.
 *
 * Owns: the vector type `v16`, loads and stores of float and bfloat16 (whole and partial), the bfloat16 pair expansion
 * that the packed weights need, the 16x16 transpose, exp and tanh.
 * The instruction set is fixed when the file is compiled (build.py compiles for the processor it runs on), so nothing
 * here is dispatched at run time.  NaN goes through every function: a poisoned row must stay visible to the caller.
 */
#ifndef QUARTET_SIMD_H
#define QUARTET_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Loops over registers must be unrolled for these to be registers; -O2 does it only where it is told. */
#define UNROLL _Pragma("GCC unroll 16")
typedef uint16_t bf16;

INLINE float bf16_to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE bf16 float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#error "needs AVX-512F/BW/VL/DQ or AVX2+FMA"
#endif

/* Loads and stores whose element type is known only to the caller; `is_bf16` is a constant after inlining. */
INLINE v16 v_load_any(const void *p, long i, int is_bf16) {
    return is_bf16 ? v_load_bf16((const bf16 *)p + i) : v_load((const float *)p + i);
}
INLINE v16 v_load_any_n(const void *p, long i, int n, int is_bf16) {
    if (n == 16) return v_load_any(p, i, is_bf16);
    return is_bf16 ? v_load_bf16_n((const bf16 *)p + i, n) : v_load_n((const float *)p + i, n);
}
INLINE void v_store_any(void *p, long i, v16 v, int is_bf16) {
    if (is_bf16) v_store_bf16((bf16 *)p + i, v);
    else v_store((float *)p + i, v);
}
INLINE void v_store_any_n(void *p, long i, v16 v, int n, int is_bf16) {
    if (n == 16) v_store_any(p, i, v, is_bf16);
    else if (is_bf16) v_store_bf16_n((bf16 *)p + i, v, n);
    else v_store_n((float *)p + i, v, n);
}
INLINE float load_scalar(const void *p, long i, int is_bf16) {
    return is_bf16 ? bf16_to_float(((const bf16 *)p)[i]) : ((const float *)p)[i];
}
INLINE void store_scalar(void *p, long i, float v, int is_bf16) {
    if (is_bf16) ((bf16 *)p)[i] = float_to_bf16(v);
    else ((float *)p)[i] = v;
}

/* exp(x): Cody-Waite reduction and a degree-6 polynomial, about 1 ulp; exp(NaN) = NaN.  Below 2^-125 it is 0: scaling
 * into the denormals costs over a hundred cycles in microcode, and every masked score would go there. */
INLINE v16 v_exp(v16 given) {
    v16 x = v_max(v_set1(-86.6f), given); /* x second: max returns its second operand when one is NaN */
    x = v_min(v_set1(88.7f), x);
    v16 n = v_round(v_mul(x, v_set1(1.44269504088896341f)));
    v16 r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    v16 p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set1(1.0f)));
    return v_zero_below(v_ldexp(p, n), given, v_set1(-86.6f));
}

/* 2^x by a degree-6 Taylor polynomial, about 2 ulp; 0 below 2^-125, NaN stays.  For x in base 2. */
INLINE v16 v_exp2(v16 given) {
    v16 x = v_max(v_set1(-125.0f), given);
    v16 n = v_round(x), r = v_sub(x, n);
    v16 p = v_set1(1.54035304e-4f);
    p = v_fma(p, r, v_set1(1.33335581e-3f));
    p = v_fma(p, r, v_set1(9.61812911e-3f));
    p = v_fma(p, r, v_set1(5.55041087e-2f));
    p = v_fma(p, r, v_set1(2.40226507e-1f));
    p = v_fma(p, r, v_set1(6.93147181e-1f));
    return v_zero_below(v_ldexp(v_fma(p, r, v_set1(1.0f)), n), given, v_set1(-125.0f));
}

/* tanh through exp: the error is absolute (about 1e-7), which is what gates and soft caps need. */
INLINE v16 v_tanh(v16 x) {
    v16 e = v_exp(v_mul(x, v_set1(2.0f)));
    return v_sub(v_set1(1.0f), v_div(v_set1(2.0f), v_add(e, v_set1(1.0f))));
}

INLINE v16 v_silu(v16 x) {
    return v_div(x, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x))));
}

/* x * Phi(x), by the complementary error function of Abramowitz & Stegun 7.1.26 (absolute error 1e-7). */
INLINE v16 v_gelu(v16 x) {
    v16 size = v_max(v_sub(v_zero(), x), x);
    v16 t = v_div(v_set1(1.0f), v_fma(size, v_set1(0.3275911f * 0.70710678118654752f), v_set1(1.0f)));
    v16 p = v_fma(v_set1(1.061405429f), t, v_set1(-1.453152027f));
    p = v_fma(p, t, v_set1(1.421413741f));
    p = v_fma(p, t, v_set1(-0.284496736f));
    p = v_fma(p, t, v_set1(0.254829592f));
    v16 tail = v_mul(v_mul(p, t), v_exp(v_mul(v_mul(x, x), v_set1(-0.5f))));
    return v_sub(v_max(v_zero(), x), v_mul(v_mul(size, v_set1(0.5f)), tail));
}

INLINE v16 v_gelu_tanh(v16 x) {
    v16 inner = v_mul(v_mul(x, v_set1(0.7978845608028654f)), v_fma(v_mul(x, x), v_set1(0.044715f), v_set1(1.0f)));
    return v_mul(v_mul(v_set1(0.5f), x), v_add(v_set1(1.0f), v_tanh(inner)));
}

#endif

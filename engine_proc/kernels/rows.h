/* Operations on single rows, shared by the kernels that Python calls and by the fused decoder.
 *
 * Owns: RMSNorm and LayerNorm of a row, rotary embedding of a head.  Sums are in float32 and in one fixed order.
 */
#ifndef QUARTET_ROWS_H
#define QUARTET_ROWS_H

#include "simd.h"

/* out[dim] = x / rms(x) * w; out may be x. */
INLINE void rms_norm_row(const void *x, const float *w, float *out, long dim, float eps, int x_bf16) {
    v16 squares = v_zero();
    for (long i = 0; i < dim; i += 16) {
        v16 v = v_load_any_n(x, i, dim - i < 16 ? (int)(dim - i) : 16, x_bf16);
        squares = v_fma(v, v, squares);
    }
    v16 factor = v_set1(1.0f / sqrtf(v_sum(squares) / (float)dim + eps));
    for (long i = 0; i < dim; i += 16) {
        int n = dim - i < 16 ? (int)(dim - i) : 16;
        v16 v = v_mul(v_load_any_n(x, i, n, x_bf16), factor);
        v_store_any_n(out, i, v_mul(v, v_load_n(w + i, n)), n, 0);
    }
}

/* out[dim] = (x - mean(x)) / deviation(x) * w + b (b may be NULL); `add`, when given, is first added into x, which is
 * then written back: the norm is that of the stored value, as the caller will read it.  w and b are float. */
INLINE void layer_norm_row(void *x, const void *add, const float *w, const float *b, void *out, long dim, float eps,
                           int is_bf16) {
    v16 sum = v_zero(), squares = v_zero();
    for (long i = 0; i < dim; i += 16) {
        int n = dim - i < 16 ? (int)(dim - i) : 16;
        v16 v = v_load_any_n(x, i, n, is_bf16);
        if (add) {
            v = v_add(v, v_load_any_n(add, i, n, is_bf16));
            v_store_any_n(x, i, v, n, is_bf16);
            if (is_bf16) v = v_load_any_n(x, i, n, 1);
        }
        sum = v_add(sum, v);
    }
    v16 mean = v_set1(v_sum(sum) / (float)dim);
    for (long i = 0; i < dim; i += 16) {
        int n = dim - i < 16 ? (int)(dim - i) : 16;
        v16 v = v_sub(v_load_any_n(x, i, n, is_bf16), mean);
        if (n < 16) v = v_keep(v, 0, n, v_zero());
        squares = v_fma(v, v, squares);
    }
    v16 factor = v_set1(1.0f / sqrtf(v_sum(squares) / (float)dim + eps));
    for (long i = 0; i < dim; i += 16) {
        int n = dim - i < 16 ? (int)(dim - i) : 16;
        v16 v = v_mul(v_mul(v_sub(v_load_any_n(x, i, n, is_bf16), mean), factor), v_load_n(w + i, n));
        if (b) v = v_add(v, v_load_n(b + i, n));
        v_store_any_n(out, i, v, n, is_bf16);
    }
}

/* Rotates the first 2 * half elements of one head, element i with element i + half (the GPT-NeoX pairing). */
INLINE void rotate_head(void *x, const float *cos, const float *sin, long half, int x_bf16) {
    for (long i = 0; i < half; i += 16) {
        int n = half - i < 16 ? (int)(half - i) : 16;
        v16 a = v_load_any_n(x, i, n, x_bf16), b = v_load_any_n(x, i + half, n, x_bf16);
        v16 c = v_load_n(cos + i, n), s = v_load_n(sin + i, n);
        v_store_any_n(x, i, v_sub(v_mul(a, c), v_mul(b, s)), n, x_bf16);
        v_store_any_n(x, i + half, v_fma(b, c, v_mul(a, s)), n, x_bf16);
    }
}

#endif

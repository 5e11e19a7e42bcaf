/* Attention of one sequence to all of itself in 16-bit integers: the description of a call. */
#ifndef QUARTET_INT16_ATTENTION_H
#define QUARTET_INT16_ATTENTION_H

#include <stdint.h>

/* Mirrored by native.py; all 8 bytes wide.  Everything is float32; rows are ld* elements apart. */
typedef struct {
    const float *q, *k, *v;  /* [rows][heads][head_dim] */
    float *out;              /* [rows][heads][head_dim] */
    int64_t ldq, ldk, ldv, ldo;
    int64_t rows, head_dim;  /* head_dim: a multiple of 16, up to 128 */
    int64_t first, end;      /* the heads that this call computes */
    double scale;
} int16_attention_args;

#endif

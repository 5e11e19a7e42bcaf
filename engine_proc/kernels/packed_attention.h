/* Bidirectional attention over packed sequences, for encoders: the description of a call. */
#ifndef QUARTET_PACKED_ATTENTION_H
#define QUARTET_PACKED_ATTENTION_H

#include <stdint.h>

#define BIAS_STRIDE(span) (2 * (span) + 15) /* a whole vector may be read behind the last one */

/* Mirrored by native.py; all 8 bytes wide.  Everything is float32; rows are ld* elements apart. */
typedef struct {
    const float *q, *k, *v;  /* [rows][heads (k, v: kv_heads)][head_dim] */
    float *out;              /* [rows][heads][head_dim] */
    const int32_t *starts;   /* [sequences + 1]: rows of each sequence */
    const float *bias;       /* [heads][BIAS_STRIDE]: added to the scores, by key - query position + span - 1; or NULL */
    int64_t ldq, ldk, ldv, ldo;
    int64_t rows, sequences, heads, kv_heads, head_dim;
    int64_t window;          /* tokens to either side that a token sees; 0: all */
    int64_t span;            /* with bias: the longest sequence */
    double scale;
} packed_attention_args;

#endif

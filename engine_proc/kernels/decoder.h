/* A whole step of a dense decoder as one call: ids in, hidden states out, no Python and no torch in between.
 *
 * Owns: the description of the model and of a step.  The structs are mirrored field for field by decoder.py; every
 * field is 8 bytes wide.
 */
#ifndef QUARTET_DECODER_H
#define QUARTET_DECODER_H

#include "linear.h"

typedef struct {
    /* RMSNorm weights, float; a NULL norm is left out */
    const float *input_norm;     /* [hidden], before attention */
    const float *q_norm, *k_norm; /* [head_dim]; with qk_norm_full [q_heads * head_dim] and [kv_heads * head_dim] */
    const float *attention_post; /* [hidden], on the attention's result before it joins the residual */
    const float *mlp_norm;       /* [hidden], before the MLP */
    const float *mlp_post;       /* [hidden], on the MLP's result */
    const linear_weight *qkv, *o, *gate_up, *down;
    void *k_cache, *v_cache;     /* [blocks][block_size][kv_heads][head_dim] */
    const float *cos, *sin;      /* or NULL: no rotation */
    int64_t half, positions, window; /* cos and sin are [positions][half] */
} decoder_layer;

typedef struct {
    const decoder_layer *layers;
    const void *embedding;       /* [vocab][hidden] */
    const float *final_norm;     /* [hidden] */
    int64_t layer_count, vocab, hidden, inner, q_heads, kv_heads, head_dim, blocks, block_size;
    int64_t embedding_bf16, cache_bf16, qk_norm_full;
    double eps, scale, softcap, embedding_multiplier, residual_multiplier;
} decoder_model;

typedef struct {
    const int32_t *ids;          /* [rows]; a negative id means the row of `embeds` */
    const float *embeds;         /* [rows][hidden] or NULL */
    const int32_t *positions, *slots;
    const int32_t *block_tables, *query_starts, *context_lens;
    const int32_t *out_rows;     /* [outs], the rows that are wanted at the end */
    float *hidden;               /* [outs][hidden] after the final norm */
    double *times;               /* [TIME_KINDS] seconds, added to */
    int64_t rows, sequences, ld_table, table_width, outs;
} decoder_step;

enum { TIME_ROWS, TIME_QKV, TIME_ROPE, TIME_ATTENTION, TIME_O, TIME_GATE_UP, TIME_DOWN, TIME_KINDS };

#endif

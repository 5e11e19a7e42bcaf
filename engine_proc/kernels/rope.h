/* Rotary embedding of new queries and keys, and their way into the paged cache. */
#ifndef QUARTET_ROPE_H
#define QUARTET_ROPE_H

#include <stdint.h>

/* Mirrored by native.py; all 8 bytes wide. */
typedef struct {
    void *q, *k, *v;             /* [rows][heads][head_dim], rows ldq / ldk / ldv elements apart */
    const float *cos, *sin;      /* [positions][half] or NULL: no rotation */
    const float *q_norm, *k_norm; /* [head_dim], RMSNorm of each head before the rotation; or NULL */
    const int32_t *positions;    /* [rows] */
    const int32_t *slots;        /* [rows]: block * block_size + offset; negative: not cached; NULL: none is */
    void *k_cache, *v_cache;     /* [slots][kv_heads][head_dim] */
    int64_t ldq, ldk, ldv;
    int64_t rows, q_heads, kv_heads, head_dim, half;
    int64_t position_count, slot_count; /* of cos and sin, of the cache: bounds that are checked */
    int64_t is_bf16, cache_bf16;
    double eps;
} rope_args;

/* Whether every position and slot is in range. */
int rope_valid(const rope_args *args);

/* One phase of a team; ends with a barrier. */
void rope_team(const rope_args *args, int tid, int size);

#endif

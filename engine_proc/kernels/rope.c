/* See rope.h.  One task is one token: its heads are normed, rotated and written to the cache while they are in L1. */
#include "rope.h"

#include "pool.h"
#include "rows.h"

#define MAX_HEAD_DIM 1024 /* checked in native.py */

INLINE void copy_row(void *to, long at, const void *from, long n, const int to_bf16, const int from_bf16) {
    long i = 0;
    for (; i + 16 <= n; i += 16) v_store_any(to, at + i, v_load_any(from, i, from_bf16), to_bf16);
    if (i < n) v_store_any_n(to, at + i, v_load_any_n(from, i, (int)(n - i), from_bf16), (int)(n - i), to_bf16);
}

INLINE void heads(const rope_args *a, char *x, const float *norm, long count, long row, const int is_bf16) {
    long bytes = is_bf16 ? 2 : 4, position = a->cos ? a->positions[row] : 0;
    const float *cos = a->cos + position * a->half, *sin = a->sin + position * a->half;
    for (long h = 0; h < count; h++, x += a->head_dim * bytes) {
        if (norm) { /* by way of floats, so that the head is rounded once */
            _Alignas(64) float wide[MAX_HEAD_DIM];
            rms_norm_row(x, norm, wide, a->head_dim, (float)a->eps, is_bf16);
            if (a->cos) rotate_head(wide, cos, sin, a->half, 0);
            copy_row(x, 0, wide, a->head_dim, is_bf16, 0);
        } else if (a->cos) {
            rotate_head(x, cos, sin, a->half, is_bf16);
        }
    }
}

INLINE void rope_rows(const rope_args *a, long from, long to, const int is_bf16, const int cache_bf16) {
    long bytes = is_bf16 ? 2 : 4, width = a->kv_heads * a->head_dim;
    for (long r = from; r < to; r++) {
        char *k = (char *)a->k + r * a->ldk * bytes, *v = (char *)a->v + r * a->ldv * bytes;
        heads(a, (char *)a->q + r * a->ldq * bytes, a->q_norm, a->q_heads, r, is_bf16);
        heads(a, k, a->k_norm, a->kv_heads, r, is_bf16);
        if (!a->slots || a->slots[r] < 0) continue;
        copy_row(a->k_cache, a->slots[r] * width, k, width, cache_bf16, is_bf16);
        copy_row(a->v_cache, a->slots[r] * width, v, width, cache_bf16, is_bf16);
    }
}

void rope_team(const rope_args *a, int tid, int size) {
    (void)tid;
    long end;
    for (long row; (row = team_take(a->rows, team_chunk(a->rows, size), &end)) >= 0;) {
        if (a->is_bf16 && a->cache_bf16) rope_rows(a, row, end, 1, 1);
        else if (a->is_bf16) rope_rows(a, row, end, 1, 0);
        else if (a->cache_bf16) rope_rows(a, row, end, 0, 1);
        else rope_rows(a, row, end, 0, 0);
    }
    team_barrier(size);
}

int rope_valid(const rope_args *a) {
    for (long r = 0; r < a->rows; r++) {
        if (a->cos && (a->positions[r] < 0 || a->positions[r] >= a->position_count)) return 0;
        if (a->slots && a->slots[r] >= a->slot_count) return 0;
    }
    return 1;
}

static void call_team(int tid, int size, void *arg) { rope_team(arg, tid, size); }

/* Entry point for Python.  0; -2 when an index is out of range. */
int q_rope_cache(const rope_args *a) {
    if (!rope_valid(a)) return -2;
    pool_call(call_team, (void *)a, a->rows * (a->q_heads + 2 * a->kv_heads) * a->head_dim);
    return 0;
}

/* Paged attention over mixed batches of decode rows and prefill chunks.
 *
 * Owns: the description of a call, the cut of a batch into work items, and the two phases of the team.
 */
#ifndef QUARTET_ATTENTION_H
#define QUARTET_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#define CHUNK 64       /* tokens scored at once; chunks start at multiples of it */
#define PART 256       /* tokens after which the running softmax starts afresh and is merged; likewise aligned */
#define ITEM_ROWS 96   /* query rows (tokens x heads of a group) of one work item, unless one token has more */

/* Mirrored by native.py; all 8 bytes wide. */
typedef struct {
    const void *q;                 /* [rows][q_heads][head_dim], rows ldq elements apart */
    const void *k_cache, *v_cache; /* [blocks][block_size][kv_heads][head_dim] */
    void *out;                     /* [rows][q_heads][head_dim], rows ldo elements apart */
    const int32_t *block_tables;   /* [sequences], ld_table apart */
    const int32_t *query_starts;   /* [sequences + 1], rows of q */
    const int32_t *context_lens;   /* [sequences], tokens in the cache including the new ones */
    int64_t ldq, ldo, ld_table;
    int64_t rows, blocks, table_width; /* of q, of the cache, of a block table: bounds that are checked */
    int64_t sequences, block_size, q_heads, kv_heads, head_dim;
    int64_t window;                /* keys a query may see, itself included; 0: all */
    int64_t causal, is_bf16, cache_bf16, out_bf16;
    double scale, softcap;         /* softcap 0: none */
} attention_args;

typedef struct {
    int32_t sequence, kv_head, from, to; /* query tokens of the sequence */
    int32_t part, part_end;              /* parts of the context; all of them unless `partial` >= 0 */
    int64_t heads;                       /* kv heads from kv_head on; more than one only for a single token */
    int64_t partial;                     /* floats into the partial results, or -1: finish in place */
} attention_item;

typedef struct {
    const attention_args *args;
    long items, splits;    /* splits: items that were cut by parts, first in the list of merges */
    attention_item *item;  /* [items] */
    attention_item *merge; /* [splits] */
    float *partials;
    float *work;           /* per thread */
    long work_floats;
} attention_plan;

/* Whether every index stays inside its array; a sequence's table is looked at as far as its rows see. */
int attention_valid(const attention_args *args);

/* Bytes of scratch that attention_plan_make needs for a call on `size` threads, at least 64-byte aligned. */
size_t attention_scratch_bytes(const attention_args *args, int size);
void attention_plan_make(attention_plan *plan, const attention_args *args, int size, void *scratch);
/* Two phases; ends with a barrier. */
void attention_team(const attention_plan *plan, int tid, int size);

/* attention_core.c */
long attention_work_floats(const attention_args *args);
/* `after`, if any, is what this thread will do next: its first rows are asked for in advance. */
void attention_item_run(const attention_plan *plan, const attention_item *item, const attention_item *after,
                        float *work);
void attention_merge_run(const attention_plan *plan, const attention_item *item, float *work);
long attention_partial_floats(const attention_args *args, const attention_item *item);

#endif

/* The thread team: a few persistent threads that run one function together.
 *
 * Owns: the threads, the barrier, the ticket counter that deals out the tasks of a phase, and the shared scratch memory.
 * Why not OpenMP: a second OpenMP runtime beside torch's is a trap, and at 10 microseconds a kernel the barrier counts.
 *
 * A team function is called on every thread with its id and the team's size (SPMD).  It is a row of phases; in each,
 * threads draw tasks with team_take() until none are left and then meet at team_barrier(), which also rewinds the
 * tickets.  All threads must reach the same barriers in the same order.
 */
#ifndef QUARTET_POOL_H
#define QUARTET_POOL_H

#include <stddef.h>

typedef void (*team_fn)(int tid, int size, void *arg);

/* One caller at a time: everything between pool_enter and pool_leave owns the team and the scratch memory. */
void pool_enter(void);
void pool_leave(void);
int pool_size(void);
/* Runs the function on the team, or on the calling thread alone when the work (in elements that are read or multiplied)
 * is too small to wake the others. */
void pool_run(team_fn fn, void *arg, long work);
/* pool_run between pool_enter and pool_leave. */
void pool_call(team_fn fn, void *arg, long work);
#define POOL_ALWAYS __LONG_MAX__
/* 64-byte aligned, contents undefined, valid until pool_leave; NULL when the memory is not to be had. */
void *pool_scratch(size_t bytes);

static inline size_t align64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
/* Memory that is dealt out in pieces which share no cache line; without a base only their bytes are counted. */
typedef struct {
    char *base;
    size_t used;
} arena;
static inline void *arena_take(arena *a, size_t bytes) {
    char *piece = a->base ? a->base + a->used : NULL;
    a->used += align64(bytes);
    return piece;
}

void team_barrier(int size);
/* Draws up to `chunk` of `total` tasks: returns the first and sets *end, or returns -1 when the phase has none left. */
long team_take(long total, long chunk, long *end);
/* A chunk that leaves every thread several draws, so that a thread the system has paused delays nobody for long. */
static inline long team_chunk(long total, int size) {
    long chunk = total / (6L * size);
    return chunk > 0 ? chunk : 1;
}

#endif

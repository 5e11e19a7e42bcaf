/* The thread team declared in pool.h.
 *
 * Waiting is spin first (a phase lasts microseconds), then spin that lets others have the processor, and only then futex,
 * so that an idle engine costs nothing.  A thread that sleeps in the middle of a step is dear: with nothing else to run the
 * processor halts, a virtual one is taken away then, and comes back late (three times longer steps where the host is busy).
 */
#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_THREADS 256
#define WORTH_A_TEAM 16384 /* below, waking a thread costs more than it saves */
#define ALIGNED _Alignas(64)
#define PATIENCE_TICKS 50000000ul /* at a barrier before a thread sleeps: 20 ms, for its company lost its processor */
#define BETWEEN_TICKS 3000000ul   /* the same between two jobs: 1 ms, longer than from one step to the next */

static struct {
    ALIGNED atomic_uint job;      /* rises by one for each pool_run */
    ALIGNED atomic_uint phase;    /* rises by one for each completed barrier */
    ALIGNED atomic_int arrived;   /* threads waiting at the barrier */
    ALIGNED atomic_long ticket;   /* next task of the phase */
    ALIGNED atomic_int sleepers;  /* threads inside futex_wait */
    ALIGNED team_fn fn;
    void *arg;
    int size;                     /* team size including the caller, 0 before the first use */
    int quit;
    unsigned long spin_ticks;
    pthread_t threads[MAX_THREADS];
    void *scratch;
    size_t scratch_bytes;
} pool = {.spin_ticks = 150000};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* Spins for a moment, then for so many ticks with others let in between, then sleeps. */
static void wait_while(atomic_uint *word, unsigned old, unsigned long patience) {
    unsigned long start = 0;
    for (unsigned i = 0;; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) return;
        __builtin_ia32_pause();
        if ((i & 15) != 15) continue;
        unsigned long now = __builtin_ia32_rdtsc();
        if (!start) start = now;
        if (now - start <= pool.spin_ticks) continue;
        if (now - start > pool.spin_ticks + patience) break;
        sched_yield();
    }
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(word) == old) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&pool.sleepers, 1);
}

static void advance(atomic_uint *word) {
    atomic_fetch_add(word, 1);
    if (atomic_load(&pool.sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

void team_barrier(int size) {
    if (size > 1) {
        unsigned phase = atomic_load_explicit(&pool.phase, memory_order_relaxed);
        if (atomic_fetch_add_explicit(&pool.arrived, 1, memory_order_acq_rel) != size - 1) {
            wait_while(&pool.phase, phase, PATIENCE_TICKS);
            return;
        }
        atomic_store_explicit(&pool.arrived, 0, memory_order_relaxed);
    }
    atomic_store_explicit(&pool.ticket, 0, memory_order_relaxed);
    if (size > 1) advance(&pool.phase);
}

long team_take(long total, long chunk, long *end) {
    if (atomic_load_explicit(&pool.ticket, memory_order_relaxed) >= total) return -1;
    long first = atomic_fetch_add_explicit(&pool.ticket, chunk, memory_order_relaxed);
    if (first >= total) return -1;
    *end = first + chunk < total ? first + chunk : total;
    return first;
}

/* Denormals count as zero: products of tiny weights are some, and each costs more than a hundred cycles in microcode.
 * Returns the caller's mode, to be restored. */
static unsigned ignore_denormals(void) {
    unsigned mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode | 0x8040);
    return mode;
}

static void *worker(void *id) {
    int tid = (int)(intptr_t)id;
    ignore_denormals();
    unsigned seen = 0;
    for (;;) {
        wait_while(&pool.job, seen, BETWEEN_TICKS);
        seen++;
        if (pool.quit) return NULL;
        pool.fn(tid, pool.size, pool.arg);
        team_barrier(pool.size);
    }
}

static void stop_team(void) {
    if (pool.size > 1) {
        pool.quit = 1;
        advance(&pool.job);
        for (int i = 1; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
        pool.quit = 0;
    }
    pool.size = 0;
}

static void start_team(int size) {
    atomic_store(&pool.job, 0);
    pool.size = 1;
    for (; pool.size < size; pool.size++)
        if (pthread_create(&pool.threads[pool.size], NULL, worker, (void *)(intptr_t)pool.size)) break;
}

/* The threads of a forked parent do not exist in the child: forget them. */
static void after_fork(void) {
    pool.size = 0;
    atomic_store(&pool.arrived, 0);
    atomic_store(&pool.sleepers, 0);
    pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    mutex = fresh;
}

void pool_enter(void) {
    pthread_mutex_lock(&mutex);
    if (pool.size == 0) start_team(1);
}

void pool_leave(void) { pthread_mutex_unlock(&mutex); }

int pool_size(void) { return pool.size; }

void pool_run(team_fn fn, void *arg, long work) {
    int size = work < WORTH_A_TEAM ? 1 : pool.size;
    unsigned mode = ignore_denormals();
    if (size > 1) {
        pool.fn = fn;
        pool.arg = arg;
        advance(&pool.job);
    }
    fn(0, size, arg);
    __builtin_ia32_ldmxcsr(mode);
    team_barrier(size);
}

void pool_call(team_fn fn, void *arg, long work) {
    pool_enter();
    pool_run(fn, arg, work);
    pool_leave();
}

void *pool_scratch(size_t bytes) {
    if (bytes > pool.scratch_bytes) {
        free(pool.scratch);
        pool.scratch_bytes = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        pool.scratch = aligned_alloc(4096, pool.scratch_bytes);
        if (!pool.scratch) pool.scratch_bytes = 0;
    }
    return pool.scratch;
}

/* Entry points for Python. */

/* Sets the team's size (the calling thread counts); returns the size that was reached. */
int q_set_threads(int size) {
    static int registered;
    pool_enter();
    if (!registered) registered = !pthread_atfork(NULL, NULL, after_fork);
    if (size > MAX_THREADS) size = MAX_THREADS;
    if (size < 1) size = 1;
    if (size != pool.size) {
        stop_team();
        start_team(size);
    }
    int reached = pool.size;
    pool_leave();
    return reached;
}

/* How long a waiting thread spins before it lets others have the processor, in ticks of the time-stamp counter. */
void q_set_spin(unsigned long ticks) { pool.spin_ticks = ticks; }

/* threads.c: the pool of threads. No other file knows about threads.

   The first job starts the workers. A job is a function and a number of items. Each thread has a share of the
   items, the same part in every job: rows that one kernel wrote are then still in the cache of the processor
   that reads them in the next kernel. A thread that has finished its share takes items from the other shares.
   Kernels of a training step follow each other within microseconds, so a worker polls for the next job for a
   while before it sleeps.

   The caller never waits for a worker that has not begun. On a busy machine a worker may get no processor for
   milliseconds; the caller then does all the work itself. A worker enters a job through a gate. The caller
   shuts the gate when no items are left, and then waits only for the workers inside.

   The pool serves one job at a time. If another Python thread has a job in the pool, the caller does its work
   alone. A child process made by fork has none of its parent's threads: the handler below forgets them, and
   the child starts its own. */
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

enum { MOST_THREADS = 256, LOOKS = 20000 };

enum { OPEN = 1, INSIDE = 2 }; /* the gate: bit 0 says open; the bits above count the workers inside */

static struct {
    void (*work)(const void *, size_t, size_t);
    const void *args;
    size_t piece, shares;
    struct {
        _Alignas(64) atomic_size_t next; /* the first item that is not taken; on a cache line of its own */
        size_t end;
    } share[MOST_THREADS];
    atomic_size_t gate;
    atomic_size_t job; /* counts jobs: workers wait for a change */
    atomic_flag busy;
    size_t threads, workers; /* threads to use, the caller included; workers that were started */
    size_t asleep;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {
    .threads = 1,
    .busy = ATOMIC_FLAG_INIT,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
};

/* A pause between two polls. Every 256th poll lets another thread have the processor: it may be the thread
   that this one waits for. */
static inline void relax(int look)
{
    if (look % 256 == 0)
        sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes items of the thread's own share first, then of the other shares. */
static void take_ranges(size_t me)
{
    for (size_t k = 0; k < pool.shares; k++) {
        const size_t s = (me + k) % pool.shares, end = pool.share[s].end;
        size_t begin;
        while ((begin = atomic_fetch_add(&pool.share[s].next, pool.piece)) < end)
            pool.work(pool.args, begin, begin + pool.piece < end ? begin + pool.piece : end);
    }
}

static int enter(void)
{
    size_t gate = atomic_load(&pool.gate);
    while (gate & OPEN)
        if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + INSIDE))
            return 1;
    return 0;
}

static void *worker(void *number)
{
    for (size_t seen = 0;;) {
        for (int look = 1; look < LOOKS && atomic_load(&pool.job) == seen; look++)
            relax(look);
        if (atomic_load(&pool.job) == seen) {
            pthread_mutex_lock(&pool.lock);
            pool.asleep++;
            while (atomic_load(&pool.job) == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            pool.asleep--;
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.job);
        if (enter()) {
            take_ranges((size_t)(uintptr_t)number);
            atomic_fetch_sub(&pool.gate, INSIDE);
        }
    }
    return NULL;
}

static void forget_workers(void)
{
    pool.workers = pool.asleep = 0;
    atomic_store(&pool.gate, 0);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_flag_clear(&pool.busy);
}

static void start_workers(void)
{
    static int registered;
    if (!registered)
        registered = !pthread_atfork(NULL, NULL, forget_workers);
    for (; pool.workers + 1 < pool.threads; pool.workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(uintptr_t)(pool.workers + 1)))
            pool.threads = pool.workers + 1; /* the system starts no more threads: use these */
        else
            pthread_detach(thread);
    }
}

void parallel(void (*work)(const void *, size_t, size_t), const void *args, size_t n, size_t grain)
{
    if (n <= grain || pool.threads == 1 || atomic_flag_test_and_set(&pool.busy)) {
        if (n)
            work(args, 0, n);
        return;
    }
    start_workers();
    const size_t grains = (n + grain - 1) / grain;
    pool.work = work, pool.args = args, pool.shares = pool.threads;
    pool.piece = (grains + 4 * pool.shares - 1) / (4 * pool.shares) * grain; /* four pieces in a share */
    for (size_t s = 0; s < pool.shares; s++) {
        const size_t end = (s + 1) * grains / pool.shares * grain;
        atomic_store(&pool.share[s].next, s * grains / pool.shares * grain);
        pool.share[s].end = end < n ? end : n;
    }
    atomic_store(&pool.gate, OPEN);
    pthread_mutex_lock(&pool.lock); /* now each worker either polls `job` again or is counted asleep */
    atomic_fetch_add(&pool.job, 1);
    if (pool.asleep)
        pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_ranges(0);
    atomic_fetch_and(&pool.gate, ~(size_t)OPEN);
    for (int look = 1; atomic_load(&pool.gate); look++)
        relax(look);
    atomic_flag_clear(&pool.busy);
}

struct slot {
    void *memory;
    size_t bytes;
};
static pthread_key_t key; /* of a thread's slots; _Thread_local memory may end before free_slots runs */

static void free_slots(void *slots)
{
    for (int i = 0; i < SCRATCH_SLOTS; i++)
        free(((struct slot *)slots)[i].memory);
    free(slots);
}

static int no_key;
static void make_key(void) { no_key = pthread_key_create(&key, free_slots); }

static struct slot *own_slots(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_key);
    struct slot *slots = no_key ? NULL : pthread_getspecific(key);
    if (slots || no_key || !(slots = calloc(SCRATCH_SLOTS, sizeof *slots)))
        return slots;
    if (!pthread_setspecific(key, slots))
        return slots;
    free(slots);
    return NULL;
}

static atomic_size_t failures; /* of all threads: a caller compares it before and after a job */

void *scratch(int slot, size_t bytes)
{
    struct slot *slots = own_slots();
    if (slots && slots[slot].bytes >= bytes)
        return slots[slot].memory;
    if (slots)
        free(slots[slot].memory);
    if (!slots || posix_memalign(&slots[slot].memory, 64, bytes)) {
        if (slots)
            slots[slot].memory = NULL, slots[slot].bytes = 0;
        atomic_fetch_add(&failures, 1);
        return NULL;
    }
    slots[slot].bytes = bytes;
    return slots[slot].memory;
}

size_t memory_failures(void) { return atomic_load(&failures); }

size_t thread_count(void) { return pool.threads; }

/* With a larger n more workers start at the next job. Workers never end: with a smaller n they still help,
   but with n = 1 the caller works alone. */
void tinygpt_set_threads(size_t n)
{
    pool.threads = n < 1 ? 1 : n > MOST_THREADS ? MOST_THREADS : n;
}

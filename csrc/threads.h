/* threads.h: threads and memory for kernels. */
#include <stddef.h>

/* Calls work(args, begin, end) on all threads, for ranges that together cover 0 to n and begin at multiples
   of `grain`. Returns when all are done. Chance decides which thread gets which range, so the result of an
   item must not depend on its thread or its range. */
void parallel(void (*work)(const void *args, size_t begin, size_t end), const void *args, size_t n,
              size_t grain);

/* Memory of the calling thread, aligned to a cache line and valid until the thread's next call with the same
   slot. Returns NULL where there is no memory: `memory_failures` then counts one more, and the kernel must
   return at once. */
enum { SCRATCH_SHARED, SCRATCH_PRIVATE, SCRATCH_SLOTS };
void *scratch(int slot, size_t bytes);
size_t memory_failures(void);

size_t thread_count(void);

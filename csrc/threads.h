/* threads.h: the two things a kernel may ask of the machine. */
#include <stddef.h>

/* Calls work(args, begin, end) for ranges that cover 0 to n and begin at multiples of `grain`, on all
   threads; returns when all are done. Which range a thread gets is a matter of chance, so an item's result
   must not depend on it. */
void parallel(void (*work)(const void *args, size_t begin, size_t end), const void *args, size_t n,
              size_t grain);

/* Memory of the calling thread, on a cache line, kept until the next call with the same slot; slots do not
   overlap. NULL where there is none: the kernel then returns at once, and `memory_failures` has grown. */
enum { SCRATCH_SHARED, SCRATCH_PRIVATE, SCRATCH_SLOTS };
void *scratch(int slot, size_t bytes);
size_t memory_failures(void);

size_t thread_count(void);

/* memory.c: memory that was freed stays with the process, for the next array.

   The model makes a new array for each result. An array of more than 128 KiB would come from the operating
   system as pages of zeros and go back to it, in each step: a page fault for every 4 KiB. With these three
   settings glibc takes large arrays from its heap too, and keeps the heap when they are freed. After the
   first step nothing is asked of the operating system any more. Other C libraries decide for themselves. */
typedef void real;
#include "tinygpt.h"

#include <stdlib.h>

#ifdef __GLIBC__
#include <limits.h>
#include <malloc.h>
#endif

void tinygpt_keep_memory(void)
{
#ifdef __GLIBC__
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    mallopt(M_TOP_PAD, 64 << 20);
#endif
}

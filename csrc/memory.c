/* memory.c: the process keeps freed memory for its next arrays.

   The model makes a new array for each result. By default glibc takes an array of more than 128 KiB from the
   operating system, as pages of zeros, and returns it when it is freed. Every step would then have a page
   fault for every 4 KiB. With these three settings glibc takes large arrays from its heap too, and never
   shrinks the heap. After the first step the process takes no more memory from the operating system. Other C
   libraries have no such settings. */
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

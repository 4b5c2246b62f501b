#ifndef SPARLOW_POOL_H
#define SPARLOW_POOL_H
#include <stdint.h>
typedef void (*work_fn)(void *data, int64_t from, int64_t to);
/* Calls fn for disjoint parts of 0 .. n - 1, in up to so many threads, and returns when all is done. */
void share(int threads, work_fn fn, void *data, int64_t n);
/* Whether what this thread shares is done by our own threads, whatever OpenMP there is. */
void own_threads(int yes);
#endif

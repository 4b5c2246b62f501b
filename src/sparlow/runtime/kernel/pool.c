/* Threads that wait for work: rows are split evenly between them, and each result is that of one thread.

   There is no OpenMP here, so that there are not two of it in a process. Threads wait in a loop for a moment, because the
   next layer comes soon, and then sleep. After a fork the child begins with none. */
#include <pthread.h>
#include <stdatomic.h>
#include "pool.h"

#define MOST 64
#define ROUNDS 4000 /* of waiting before a thread sleeps: some tens of microseconds */

static pthread_mutex_t calling = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_uint turn, running;
static unsigned told[MOST];
static int made, wanted;
static work_fn work;
static void *what;
static int64_t count;

static void part(int i) {
  int64_t each = (count + wanted - 1) / wanted, from = i * each, to = from + each < count ? from + each : count;
  if (from < to) work(what, from, to);
}
static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
static void *worker(void *number) {
  int i = (int)(intptr_t)number;
  unsigned seen = told[i];
  for (;;) {
    for (int k = 0; k < ROUNDS && atomic_load_explicit(&turn, memory_order_acquire) == seen; k++) relax();
    if (atomic_load(&turn) == seen) {
      pthread_mutex_lock(&lock);
      while (atomic_load(&turn) == seen) pthread_cond_wait(&wake, &lock);
      pthread_mutex_unlock(&lock);
    }
    seen = atomic_load(&turn);
    if (i < wanted) part(i);
    atomic_fetch_sub(&running, 1);
  }
  return NULL;
}
static void forked(void) {
  made = 0;
  atomic_store(&running, 0);
  pthread_mutex_init(&calling, NULL), pthread_mutex_init(&lock, NULL), pthread_cond_init(&wake, NULL);
}
static int grow(int threads) {
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, forked) == 0;
  while (made < threads - 1) {
    pthread_t thread;
    told[made + 1] = atomic_load(&turn);
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(made + 1))) break;
    pthread_detach(thread);
    made++;
  }
  return made + 1 < threads ? made + 1 : threads;
}

void share(int threads, work_fn fn, void *data, int64_t n) {
  if (threads > MOST) threads = MOST;
  if (threads > n) threads = (int)n;
  if (threads <= 1 || pthread_mutex_trylock(&calling)) { /* alone, or another thread of Python has the workers */
    fn(data, 0, n);
    return;
  }
  wanted = grow(threads), work = fn, what = data, count = n;
  atomic_store(&running, (unsigned)made);
  pthread_mutex_lock(&lock);
  atomic_fetch_add(&turn, 1);
  pthread_cond_broadcast(&wake);
  pthread_mutex_unlock(&lock);
  part(0);
  for (unsigned k = 0; atomic_load_explicit(&running, memory_order_acquire); k++) {
    relax();
    if (k > ROUNDS) sched_yield();
  }
  pthread_mutex_unlock(&calling);
}

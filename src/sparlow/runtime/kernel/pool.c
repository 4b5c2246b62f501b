/* Rows are split evenly between threads, and each result is that of one thread.

   Between operations of torch they are the threads of the OpenMP that torch runs in: those wait in a loop for a while after each
   operation, and other threads would have to wait for their cores. Within a step there are none of torch's operations, and
   threads of our own are quicker: they wait in a loop for a moment, because the next layer comes soon, and then sleep. No
   OpenMP is linked here, so that there are not two of it in a process. It does not outlive a fork: the child has our own threads. */
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

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*number_fn)(void);
static parallel_fn parallel; /* NULL: no OpenMP is known */
static number_fn number_of_thread, number_of_threads;
static _Thread_local int own; /* whether this thread wants our threads */

static void part_of(int i, int parts) {
  int64_t each = (count + parts - 1) / parts, from = i * each, to = from + each < count ? from + each : count;
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
    if (i < wanted) part_of(i, wanted);
    atomic_fetch_sub(&running, 1);
  }
  return NULL;
}
static void forked(void) {
  made = 0, parallel = NULL;
  atomic_store(&running, 0);
  pthread_mutex_init(&calling, NULL), pthread_mutex_init(&lock, NULL), pthread_cond_init(&wake, NULL);
}
static void expect_forks(void) {
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, forked) == 0;
}
static int grow(int threads) {
  expect_forks();
  while (made < threads - 1) {
    pthread_t thread;
    told[made + 1] = atomic_load(&turn);
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(made + 1))) break;
    pthread_detach(thread);
    made++;
  }
  return made + 1 < threads ? made + 1 : threads;
}

/* The addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads. */
__attribute__((visibility("default"))) void sparlow_openmp(void *run, void *number, void *numbers) {
  expect_forks();
  number_of_thread = (number_fn)number, number_of_threads = (number_fn)numbers, parallel = (parallel_fn)run;
}
void own_threads(int yes) { own = yes; }
static void part_of_openmp(void *none) {
  (void)none;
  part_of(number_of_thread(), number_of_threads());
}

void share(int threads, work_fn fn, void *data, int64_t n) {
  if (threads > MOST) threads = MOST;
  if (threads > n) threads = (int)n;
  if (threads <= 1 || pthread_mutex_trylock(&calling)) { /* alone, or another thread of Python has the workers */
    fn(data, 0, n);
    return;
  }
  work = fn, what = data, count = n;
  if (parallel && !own) {
    parallel(part_of_openmp, NULL, (unsigned)threads, 0);
    pthread_mutex_unlock(&calling);
    return;
  }
  wanted = grow(threads);
  atomic_store(&running, (unsigned)made);
  pthread_mutex_lock(&lock);
  atomic_fetch_add(&turn, 1);
  pthread_cond_broadcast(&wake);
  pthread_mutex_unlock(&lock);
  part_of(0, wanted);
  for (unsigned k = 0; atomic_load_explicit(&running, memory_order_acquire); k++) {
    relax();
    if (k > ROUNDS) sched_yield();
  }
  pthread_mutex_unlock(&calling);
}

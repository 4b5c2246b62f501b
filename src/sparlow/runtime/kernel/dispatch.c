/* What Python calls: which paths this processor has, and products and decoding by one of them. */
#include <math.h>
#include <pthread.h>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#include "pool.h"
#include "sparlow.h"

#define EXPORT __attribute__((visibility("default")))
#define FEW 32768 /* entries of a matrix for which another thread is not worth its waking */

const path *const paths[] = {&path_plain, &path_avx2, &path_avx512, &path_neon, &path_dotprod};

/* Paths are numbered in this order; bit i says whether this processor has number i. */
EXPORT int sparlow_paths(void) {
  int found = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (path_avx2.product && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= 2; /* F16C is older */
  if (path_avx512.product && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi"))
    found |= 4;
#elif defined(__aarch64__)
  if (path_neon.product) found |= 8;
#if defined(__linux__)
  if (path_dotprod.product && getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found |= 16;
#elif defined(__APPLE__)
  if (path_dotprod.product) found |= 16;
#endif
#endif
  return found;
}

/* Two buffers of each thread, which grow, stay for the next call, and go with the thread. */
typedef struct { uint8_t *at[2]; size_t bytes[2]; } room;
static pthread_key_t rooms;
static pthread_once_t rooms_made = PTHREAD_ONCE_INIT;
static void leave(void *mine) {
  room *r = mine;
  free(r->at[0]), free(r->at[1]), free(r);
}
static void make_rooms(void) { pthread_key_create(&rooms, leave); }
static uint8_t *kept(int which, size_t bytes) {
  pthread_once(&rooms_made, make_rooms);
  room *r = pthread_getspecific(rooms);
  if (!r) {
    r = calloc(1, sizeof *r);
    if (!r || pthread_setspecific(rooms, r)) return free(r), NULL;
  }
  if (r->bytes[which] < bytes) {
    free(r->at[which]);
    r->at[which] = malloc(bytes);
    r->bytes[which] = r->at[which] ? bytes : 0;
  }
  return r->at[which];
}
uint8_t *scratch(size_t bytes) { return kept(0, bytes); }

static int enough(int64_t entries, int threads) {
  int64_t worth = entries / FEW;
  return worth < threads ? (worth < 1 ? 1 : (int)worth) : threads;
}
/* Some of the rows of all matrices, counted through. */
typedef struct { const path *by; const job *jobs; int64_t count; } round_of;
static void multiply(void *data, int64_t from, int64_t to) {
  const round_of *all = data;
  for (const job *j = all->jobs; j < all->jobs + all->count; from -= j->m->rows, to -= j->m->rows, j++) {
    int64_t first = from > 0 ? from : 0, last = to < j->m->rows ? to : j->m->rows;
    if (first < last) all->by->product(j, first, last);
  }
}
static void multiply_all(const path *by, int threads, const job *jobs, int64_t count) {
  int64_t rows = 0, entries = 0;
  for (int64_t i = 0; i < count; i++) rows += jobs[i].m->rows, entries += jobs[i].m->rows * jobs[i].m->cols;
  if (rows) share(enough(entries, threads), multiply, &(round_of){by, jobs, count}, rows);
}
typedef struct { const path *by; const matrix *m; int bf16; void *out; } expansion;
static void expand(void *data, int64_t from, int64_t to) {
  const expansion *e = data;
  int64_t first = from * e->m->cols;
  if (e->bf16) e->by->decode_bf16(e->m, from, to, (uint16_t *)e->out + first);
  else e->by->decode(e->m, from, to, (float *)e->out + first);
}

/* Lay out x as order k wants it: of k * lanes columns first 0 k 2k .., then 1 k+1 .., and so on; 0 behind the last column. */
static void lay_out(const float *x, int64_t cols, int k, int lanes, float *to) {
  int64_t span = k * lanes, end = ordered(cols);
  for (int64_t c = 0; c < end; c += span)
    for (int n = 0; n < k; n++)
      for (int l = 0; l < lanes; l++, to++) {
        int64_t from = c + k * l + n;
        *to = from < cols ? x[from] : 0;
      }
}
/* The same of all tokens for each job that goes through registers; several may want one order. */
static void lay_out_for(const path *by, job *jobs, int64_t count, float *room) {
  const float *made[ALL_ORDERS] = {0};
  for (job *j = jobs; j < jobs + count; j++) {
    int k = by->order(j);
    if (!k) continue;
    if (!made[k]) {
      made[k] = room;
      for (int64_t t = 0, cols = j->m->cols; t < j->tokens; t++, room += ordered(cols))
        if (k < AS_IT_IS) lay_out(j->x + t * j->ldx, cols, k, by->lanes, room);
        else by->lay_out(j->xq + t * ordered(cols), cols, k, (int8_t *)room);
    }
    j->xp = made[k];
  }
}
static int takes_rounded(const matrix *S) {
  return S->kind >= CODES8 && !S->wide && (S->group >= S->cols || S->group % BLOCK == 0);
}

/* y (tokens, rows of all S, ldy apart) = x Sᵀ + (x Vᵀ · fold) Uᵀ + bias of each layer beside the one before, for up to TOKENS
   tokens; all layers have the columns of x. V, U, fold, bias may be NULL. With a8, x is rounded to int8 for each S whose levels
   are integers and whose groups are whole blocks. All V are taken in one round of the threads, then all S. Returns 0, or 1: no memory. */
EXPORT int sparlow_products(int number, int threads, int a8, const layer *layers, int64_t count, const float *x, int64_t tokens, float *y, int64_t ldy) {
  const path *by = paths[number];
  int64_t cols = layers->S->cols, groups = ordered(cols) / X_GROUP, ranks = 0;
  int rounds = 0;
  for (int64_t i = 0; i < count; i++) ranks += layers[i].V ? layers[i].V->rows : 0, rounds |= a8 && takes_rounded(layers[i].S);
  size_t of_jobs = 2 * (size_t)count * sizeof(job), of_x = ORDERS * 4 * (size_t)(tokens * ordered(cols));
  size_t of_scales = rounds ? 4 * (size_t)(tokens * groups * (X_SCALES + 1)) : 0, of_q = rounds ? (size_t)(tokens * ordered(cols)) : 0;
  uint8_t *room = kept(1, of_jobs + of_x + of_scales + of_q + 4 * (size_t)(tokens * ranks));
  if (!room) return 1;
  job *first = (job *)room, *second = first + count; /* what is widest comes first */
  float *laid_out = (float *)(room + of_jobs), *scales = (float *)(room + of_jobs + of_x), *totals = scales + tokens * groups * X_SCALES;
  float *t = (float *)(room + of_jobs + of_x + of_scales);
  int8_t *q = (int8_t *)(t + tokens * ranks);
  if (rounds) by->round(x, cols, tokens, cols, q, scales, totals);
  int64_t low = 0;
  for (int64_t i = 0; i < count; i++) {
    const layer *l = &layers[i];
    second[i] = (job){.m = l->S, .x = x, .bias = l->bias, .y = y, .ldx = cols, .ldy = ldy, .tokens = tokens};
    if (a8 && takes_rounded(l->S)) second[i].xq = q, second[i].xs = scales, second[i].xsum = totals;
    y += l->S->rows;
    if (!l->V) continue;
    int64_t rank = l->V->rows;
    first[low++] = (job){.m = l->V, .x = x, .fold = l->fold, .y = t, .ldx = cols, .ldy = rank, .tokens = tokens};
    second[i].u = l->U, second[i].t = t, second[i].ldt = rank;
    t += tokens * rank;
  }
  lay_out_for(by, second, count, laid_out);
  multiply_all(by, threads, first, low);
  multiply_all(by, threads, second, count);
  return 0;
}

/* Rows from .. to of a matrix in float32, or rounded to bf16. */
EXPORT void sparlow_decode(int number, int threads, const matrix *m, int64_t from, int64_t to, int bf16, void *out) {
  matrix some = *m;
  if (m->mask) some.mask = m->mask + from * mask_bytes(m->cols);
  if (m->scale) some.scale = m->scale + from * m->groups;
  some.start = m->start + from, some.each = 0, some.rows = m->rows - from; /* where the tensor ends stays the same */
  share(enough(m->rows * m->cols, threads), expand, &(expansion){paths[number], &some, bf16, out}, to - from);
}

/* Where each row begins, in bytes: (rows + 1) from the bits of a kept value. Returns whether two of each four are kept. */
EXPORT int sparlow_starts(const uint8_t *mask, int64_t rows, int64_t cols, int64_t bits, int64_t *start) {
  int64_t at = 0;
  int pairs = mask && cols % 4 == 0;
  for (int64_t r = 0; r < rows; r++) {
    start[r] = at;
    int64_t kept_here = mask ? 0 : cols;
    for (int64_t c = 0; mask && c < cols; c += 64) {
      uint64_t word = mask_word(mask + r * mask_bytes(cols), c, cols), twos = word - (word >> 1 & 0x5555555555555555);
      uint64_t fours = (twos & 0x3333333333333333) + (twos >> 2 & 0x3333333333333333);
      kept_here += __builtin_popcountll(word);
      pairs &= fours == 0x2222222222222222 >> (cols - c < 64 ? 64 - (cols - c) : 0);
    }
    at += (kept_here * bits + 7) / 8;
  }
  start[rows] = at;
  return pairs;
}

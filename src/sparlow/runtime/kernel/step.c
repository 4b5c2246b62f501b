/* One token of each of up to TOKENS texts through a whole decoder, in one call: nothing of it is done in Python.

   A block is   x += o(attention(rotate(q(n)), rotate(k(n)), v(n))),  n = norm(x)
                x += down(silu(gate(n)) · up(n)),                     n = norm(x)
   with root-mean-square norms, keys and values of earlier tokens in a cache, and several heads of queries to a head of
   keys. All of it is float32. Vectors of 16 floats are the compiler's, which makes of them what each target has. */
#include "pool.h"
#include "sparlow.h"

#define EXPORT __attribute__((visibility("default")))
#define L 16
#define FEW 65536 /* numbers of keys for which another thread is not worth its waking */

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(64), aligned(4), may_alias));
typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float V4 __attribute__((vector_size(16), aligned(4), may_alias));

typedef struct { layer of; int64_t rounded; } weight;
typedef struct { const float *weight; double eps; } norm; /* weight NULL: there is none */
typedef struct {
  weight q, k, v, o, gate, up, down;
  norm before, between, of_q, of_k;
  float *keys, *values; /* (texts, groups, room, head) */
} block;
typedef struct {
  const block *blocks;
  int64_t count, hidden, inner, heads, groups, head, rotated, room;
  double scale;
  const float *cosine, *sine; /* (positions, rotated) */
  norm last;
  weight output;
  float *work; /* as many as sparlow_step_work says */
} decoder;

int sparlow_products(int number, int threads, int a8, const layer *layers, int64_t count, const float *x, int64_t tokens,
                     float *y, int64_t ldy); /* dispatch.c */

INL float sum(V v) {
  V8 a = ((V8 *)&v)[0] + ((V8 *)&v)[1];
  V4 b = ((V4 *)&a)[0] + ((V4 *)&a)[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}
INL V load(const float *p) { return *(const V *)p; }
INL void store(float *p, V v) { *(V *)p = v; }
INL float dot(const float *a, const float *b, int64_t n) {
  V s = {0};
  float rest = 0;
  int64_t i = 0;
  for (; i + L <= n; i += L) s += load(a + i) * load(b + i);
  for (; i < n; i++) rest += a[i] * b[i];
  return sum(s) + rest;
}
/* e^x to some 2^-23 of it; below -87 it is that of -87, NaN stays NaN. */
INL V exponential(V x) {
  VI low = x < -87.f, high = x > 88.f;
  x = (V)(((VI)(x) & ~low & ~high) | ((VI)((V){0} - 87.f) & low) | ((VI)((V){0} + 88.f) & high));
  V n = (x * 1.44269504f + 12582912.f) - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return p * (V)((__builtin_convertvector(n, VI) + 127) << 23);
}
INL void normalise(norm by, const float *x, int64_t n, float *to) {
  float each = 1 / __builtin_sqrtf(dot(x, x, n) / (float)n + (float)by.eps);
  for (int64_t i = 0; i < n; i++) to[i] = x[i] * each * by.weight[i];
}
INL void rotate(float *x, const float *cosine, const float *sine, int64_t n) {
  int64_t half = n / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i], x[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}
INL V silu(V g) { return g / (exponential((V){0} - g) + 1.f); }
INL void gated(float *gate, const float *up, int64_t n) { /* gate = silu(gate) · up */
  float some[2 * L] = {0};
  int64_t i = 0;
  for (; i + L <= n; i += L) store(gate + i, silu(load(gate + i)) * load(up + i));
  size_t rest = (size_t)(n - i) * 4;
  memcpy(some, gate + i, rest), memcpy(some + L, up + i, rest);
  store(some, silu(load(some)) * load(some + L));
  memcpy(gate + i, some, rest);
}
INL void softmax(float *s, int64_t n) { /* there is room behind s for a whole vector */
  float big = s[0];
  for (int64_t i = 1; i < n; i++) big = s[i] > big ? s[i] : big;
  V total = {0};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    V e = exponential(load(s + i) - big);
    store(s + i, e), total += e;
  }
  float all = sum(total);
  if (i < n) {
    store(s + i, exponential(load(s + i) - big));
    for (int64_t k = i; k < n; k++) all += s[k];
  }
  float each = 1 / all;
  for (int64_t k = 0; k < n; k++) s[k] *= each;
}

typedef struct { const decoder *d; const block *b; const float *q; float *scores, *out; int64_t length; } attention;
/* Heads of keys from .. to of all texts, each with the heads of queries that read it. */
INL void attend(const attention *a, int64_t from, int64_t to) {
  const decoder *d = a->d;
  int64_t share_of = d->heads / d->groups, head = d->head, n = a->length, wide = d->room + L;
  for (int64_t i = from; i < to; i++) {
    const float *keys = a->b->keys + i * d->room * head, *values = a->b->values + i * d->room * head;
    const float *q = a->q + i * share_of * head;
    float *scores = a->scores + i * share_of * wide, *out = a->out + i * share_of * head;
    for (int64_t t = 0; t < n; t++) {
      for (int64_t k = 0; k < head; k += L) __builtin_prefetch(values + t * head + k); /* wanted when the scores are there */
      for (int64_t r = 0; r < share_of; r++) scores[r * wide + t] = dot(q + r * head, keys + t * head, head) * (float)d->scale;
    }
    for (int64_t r = 0; r < share_of; r++) softmax(scores + r * wide, n);
    memset(out, 0, (size_t)(share_of * head) * 4);
    for (int64_t t = 0; t < n; t++)
      for (int64_t r = 0; r < share_of; r++) {
        float p = scores[r * wide + t];
        float *to_out = out + r * head;
        const float *v = values + t * head;
        int64_t k = 0;
        for (; k + L <= head; k += L) store(to_out + k, load(to_out + k) + load(v + k) * p);
        for (; k < head; k++) to_out[k] += v[k] * p;
      }
  }
}

/* What is not a product, once for each instruction set. */
typedef struct {
  void (*attend)(void *, int64_t, int64_t);
  void (*normalise)(norm, const float *, int64_t, float *);
  void (*rotate)(float *, const float *, const float *, int64_t);
  void (*gated)(float *, const float *, int64_t);
} pieces;
#define PIECES(set, how)                                                                                             \
  how static void attend_##set(void *a, int64_t from, int64_t to) { attend(a, from, to); }                           \
  how static void normalise_##set(norm by, const float *x, int64_t n, float *to) { normalise(by, x, n, to); }        \
  how static void rotate_##set(float *x, const float *c, const float *s, int64_t n) { rotate(x, c, s, n); }          \
  how static void gated_##set(float *g, const float *u, int64_t n) { gated(g, u, n); }                               \
  static const pieces set = {attend_##set, normalise_##set, rotate_##set, gated_##set};
PIECES(plain, )
#if defined(__x86_64__)
PIECES(avx2, __attribute__((target("avx2,fma"))))
PIECES(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))))
#else
#define avx2 plain
#define avx512 plain
#endif
static const pieces *pieces_of(int number) { return number == 2 ? &avx512 : number == 1 ? &avx2 : &plain; }

typedef struct { int number, threads; int64_t texts; int failed; } how;
#define MOST 3 /* layers of one input */
/* Layers that read one input, which lie side by side as their results do; those of one token are taken in one call. */
static void products(how *h, const weight *w, int count, const float *x, float *y) {
  layer all[MOST];
  int64_t rows = 0;
  int rounded = 1, joined = h->texts == 1;
  for (int i = 0; i < count; i++) all[i] = w[i].of, rows += w[i].of.S->rows, rounded &= w[i].rounded == w[0].rounded;
  if (joined && rounded) {
    h->failed |= sparlow_products(h->number, h->threads, (int)w->rounded, all, count, x, 1, y, rows);
    return;
  }
  for (int i = 0; i < count; y += h->texts * w[i].of.S->rows, i++)
    h->failed |= sparlow_products(h->number, h->threads, (int)w[i].rounded, &w[i].of, 1, x, h->texts, y, w[i].of.S->rows);
}
static void add(float *x, const float *y, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

/* Places of the work space, in floats. */
typedef struct { float *n, *q, *k, *v, *mixed, *gate, *up, *scores; } places;
static int64_t divide(const decoder *d, int64_t texts, float *work, places *p) {
  int64_t queries = d->heads * d->head, keys = d->groups * d->head, at = 0;
  int64_t sizes[] = {d->hidden, queries + 2 * keys, queries, 2 * d->inner, d->heads * (d->room + L)};
  float **to[] = {&p->n, &p->q, &p->mixed, &p->gate, &p->scores};
  for (int i = 0; i < 5; i++) *to[i] = work ? work + at : NULL, at += texts * sizes[i] + L;
  if (work) p->k = p->q + texts * queries, p->v = p->k + texts * keys, p->up = p->gate + texts * d->inner;
  return at;
}
/* Floats that a step of so many texts needs to work in. */
EXPORT int64_t sparlow_step_work(const decoder *d, int64_t texts) {
  places p;
  return divide(d, texts, NULL, &p);
}

/* Rotates queries and keys of this token, and puts keys and values into the cache. */
static void take(const decoder *d, const block *b, const pieces *by, int64_t texts, int64_t at, places *p) {
  const float *cosine = d->cosine + at * d->rotated, *sine = d->sine + at * d->rotated;
  for (int64_t i = 0; i < texts * d->heads; i++) {
    float *q = p->q + i * d->head;
    if (b->of_q.weight) by->normalise(b->of_q, q, d->head, q);
    by->rotate(q, cosine, sine, d->rotated);
  }
  for (int64_t i = 0; i < texts * d->groups; i++) {
    float *k = p->k + i * d->head;
    int64_t place = (i * d->room + at) * d->head;
    if (b->of_k.weight) by->normalise(b->of_k, k, d->head, k);
    by->rotate(k, cosine, sine, d->rotated);
    memcpy(b->keys + place, k, (size_t)d->head * 4);
    memcpy(b->values + place, p->v + i * d->head, (size_t)d->head * 4);
  }
}

/* The token at position ``at`` of each text: x (texts, hidden) is its embedding, and is written over; logits (texts, out).
   Returns 0, or 1: no memory. */
EXPORT int sparlow_step(int number, int threads, const decoder *d, int64_t texts, int64_t at, float *x, float *logits) {
  const pieces *by = pieces_of(number);
  how h = {number, threads, texts, 0};
  places p;
  divide(d, texts, d->work, &p);
  int64_t work = texts * d->groups * (at + 1) * d->head / FEW;
  int some = work < threads ? (work < 1 ? 1 : (int)work) : threads;
  own_threads(1);
  for (const block *b = d->blocks; b < d->blocks + d->count; b++) {
    for (int64_t t = 0; t < texts; t++) by->normalise(b->before, x + t * d->hidden, d->hidden, p.n + t * d->hidden);
    products(&h, &b->q, 3, p.n, p.q);
    take(d, b, by, texts, at, &p);
    share(some, by->attend, &(attention){d, b, p.q, p.scores, p.mixed, at + 1}, texts * d->groups);
    products(&h, &b->o, 1, p.mixed, p.n);
    add(x, p.n, texts * d->hidden);
    for (int64_t t = 0; t < texts; t++) by->normalise(b->between, x + t * d->hidden, d->hidden, p.n + t * d->hidden);
    products(&h, &b->gate, 2, p.n, p.gate);
    by->gated(p.gate, p.up, texts * d->inner);
    products(&h, &b->down, 1, p.gate, p.n);
    add(x, p.n, texts * d->hidden);
  }
  for (int64_t t = 0; t < texts; t++) by->normalise(d->last, x + t * d->hidden, d->hidden, p.n + t * d->hidden);
  products(&h, &d->output, 1, p.n, logits);
  own_threads(0);
  return h.failed;
}

/* Rows of a matrix by their numbers, as an embedding gives them. */
#include "pool.h"
#include "sparlow.h"

#define FEW 16384 /* entries for which another thread is not worth its waking */

typedef struct { const path *by; const matrix *m; const int64_t *ids; float *out; } call;
static void some_rows(void *data, int64_t from, int64_t to) {
  const call *c = data;
  const matrix *m = c->m;
  for (int64_t i = from; i < to; i++) {
    int64_t r = c->ids[i];
    matrix one = *m; /* that row alone; where the tensor ends stays the same */
    if (m->mask) one.mask = m->mask + r * mask_bytes(m->cols);
    if (m->scale) one.scale = m->scale + r * m->groups;
    one.start = m->start + r, one.each = 0, one.rows = m->rows - r;
    c->by->decode(&one, 0, 1, c->out + i * m->cols);
  }
}
/* out (n, cols) = the rows of these numbers, which the caller has checked, in float32. */
__attribute__((visibility("default")))
void sparlow_rows(int number, int threads, const matrix *m, const int64_t *ids, int64_t n, float *out) {
  int64_t worth = n * m->cols / FEW;
  share(worth < threads ? (worth < 1 ? 1 : (int)worth) : threads, some_rows, &(call){paths[number], m, ids, out}, n);
}

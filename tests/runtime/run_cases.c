/* Products of weights that a file describes, for processors that this machine only emulates: see test_other_processors.py.

   The file: how many cases; then of each path, a8, tokens; S; whether there is a low rank, and V and U; fold, bias and x.
   A matrix is its struct, and then what each of its pointers that is not NULL points to. Anything pointed to is its bytes in
   64 bits, and them. Results are written one behind the other; a path that is not there is an exit status of 3. */
#include <stdio.h>
#include "sparlow.h"

int sparlow_paths(void);
int sparlow_products(int, int, int, const layer *, int64_t, const float *, int64_t, float *, int64_t);
void sparlow_decode(int, int, const matrix *, int64_t, int64_t, int, void *);

static void take(void *to, size_t size) {
  if (fread(to, 1, size, stdin) != size) exit(2);
}
static int64_t number(void) {
  int64_t n;
  take(&n, 8);
  return n;
}
/* What is read lies at the end of its memory, so that a checker of memory sees what is read behind it. */
static void *pointed_to(void) {
  int64_t size = number();
  if (size < 0) return NULL;
  void *to = malloc((size_t)size + 1);
  take(to, (size_t)size);
  return to;
}
static matrix *next_matrix(void) {
  matrix *m = malloc(sizeof *m);
  take(m, sizeof *m);
  m->data = pointed_to(), m->start = pointed_to(), m->mask = pointed_to();
  m->scale = pointed_to(), m->narrow = pointed_to(), m->wide = pointed_to();
  return m;
}
int main(void) {
  for (int64_t left = number(); left > 0; left--) {
    int path = (int)number(), a8 = (int)number();
    int64_t tokens = number();
    layer l = {.S = next_matrix()};
    if (number()) l.V = next_matrix(), l.U = next_matrix();
    l.fold = pointed_to(), l.bias = pointed_to();
    float *x = pointed_to(), *y = malloc(4 * (size_t)(tokens * l.S->rows)), *rows = malloc(4 * (size_t)(l.S->rows * l.S->cols));
    if (!(sparlow_paths() >> path & 1)) return 3;
    if (sparlow_products(path, 2, a8, &l, 1, x, tokens, y, l.S->rows)) return 4;
    sparlow_decode(path, 1, l.S, 0, l.S->rows, 0, rows);
    fwrite(y, 4, (size_t)(tokens * l.S->rows), stdout), fwrite(rows, 4, (size_t)(l.S->rows * l.S->cols), stdout);
  }
  return 0;
}

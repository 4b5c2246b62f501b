/* The ways that a product may take through registers, see stream.h. */
#ifndef SPARLOW_WAYS_H
#define SPARLOW_WAYS_H
#include "sparlow.h"

enum way {
  BUFFERED,     /* none of these: rows are decoded to a buffer */
  MASKED16,     /* bf16 */
  MASKED_HALF,  /* fp16 */
  MASKED8,      /* bytes that stand for level + 128 */
  MASKED_CODES, /* codes of fewer bits, first as signed bytes in a buffer */
  DENSE8, DENSE4, DENSE3, DENSE2,
  ROUNDED,      /* from here on: of inputs rounded to int8 */
  R_DENSE8, R_DENSE4, /* levels evenly apart: a code stands for itself */
  R_BOOK4, R_DENSE3, R_DENSE2, R_MASKED8, R_MASKED_CODES,
  R_PAIRS8, R_PAIRS_CODES /* two of four columns kept: x is gathered, and values are not spread */
};
INL int in_halves(int way) { return way == MASKED16 || way == MASKED_HALF; }
INL int in_bytes(int way) { return way == MASKED_CODES || way == R_MASKED_CODES || way == R_PAIRS_CODES; }

/* Where the next step begins: of the values, and of the mask. */
typedef struct { const uint8_t *at, *mask; } cursor;

/* The inputs of a step: those of the next token are a row on, for bytes 4 * apart bytes, sums too. */
typedef struct { const float *at; int64_t apart; } floats;
typedef struct { const int8_t *at, *sums; int64_t apart; } bytes;

/* What a code stands for, but for its scale. */
INL float level_of(const matrix *m, int code) {
  return m->wide ? of_16(m->wide_kind, m->wide[code]) : (float)((int)m->narrow[code] - 128);
}
#endif

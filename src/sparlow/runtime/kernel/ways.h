/* The ways that a product of one token may take through registers, see stream.h. */
#ifndef SPARLOW_WAYS_H
#define SPARLOW_WAYS_H
#include "sparlow.h"

enum way {
  BUFFERED,     /* none of these: rows are decoded to a buffer */
  MASKED16,     /* bf16 */
  MASKED8,      /* bytes that stand for level + 128 */
  MASKED_CODES, /* codes of fewer bits, first as signed bytes in a buffer */
  DENSE8, DENSE4, DENSE3, DENSE2
};

/* Where the next step begins: of the values, and of the mask. */
typedef struct { const uint8_t *at, *mask; } cursor;

/* Groups are whole steps, so that a step has one scale. */
INL int way_of(const job *j) {
  const matrix *m = j->m;
  if (j->tokens != 1 || j->xq || (m->group < m->cols && m->group % GROUP_STEP)) return BUFFERED;
  if (m->mask) {
    if (m->kind == BF16) return MASKED16;
    return m->kind < CODES8 || m->wide ? BUFFERED : m->kind == CODES8 ? MASKED8 : MASKED_CODES;
  }
  switch (m->kind) {
    case CODES8: return m->wide ? BUFFERED : DENSE8;
    case CODES4: return m->wide && !WIDE4 ? BUFFERED : DENSE4;
    case CODES3: return DENSE3;
    case CODES2: return DENSE2;
    default: return BUFFERED;
  }
}
/* What a code stands for, but for its scale. */
INL float level_of(const matrix *m, int code) {
  return m->wide ? of_16(m->wide_kind, m->wide[code]) : (float)((int)m->narrow[code] - 128);
}
#endif

/* One token: rows are decoded, spread and multiplied in registers, four rows at a time, each a stream of its own.

   Included by rows.h where the instruction set has, behind its other pieces,

     WIDE4                            whether DENSE4 has levels that are no integers
     order_of(way)                    k: of k * W columns, x is laid out as columns 0 k 2k .., then 1 k+1 .., and so on
     columns_of(way)                  columns of a step, a multiple of k * W
     factor_of(way)                   what the sums of a row are to be multiplied by
     levels_of(way, m)                what it keeps in registers for a whole row
     step(way, cursor, x, levels, s)  adds the products of a step to s, and moves the cursor on

   Bits of a mask behind the last column are 0 here, and so is x. */

INL int way_for(const matrix *m) {
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
/* A step has one scale. */
INL int way_of(const job *j) {
  if (j->tokens != 1 || j->xq) return BUFFERED;
  int way = way_for(j->m);
  return j->m->group < j->m->cols && j->m->group % columns_of(way) ? BUFFERED : way;
}

INL void streams(int way, int R, cursor *a, const job *j, const float *scale, float *found) {
  const matrix *m = j->m;
  const int64_t columns = columns_of(way);
  const levels t = levels_of(way, m);
  VF acc[4], s[4];
#pragma GCC unroll 4
  for (int i = 0; i < R; i++) acc[i] = v_zero();
  for (int64_t g = 0, c = 0; g < m->groups; g++) {
    int64_t end = c + m->group < m->cols ? c + m->group : m->cols;
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) s[i] = v_zero();
    for (; c + columns <= end; c += columns)
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) s[i] = step(way, &a[i], j->xp + c, &t, s[i]);
    if (c < end) { /* the last columns of a row */
      uint8_t rest[32] = {0};
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        if (m->mask) {
          memcpy(rest, a[i].mask, (size_t)mask_bytes(end - c));
          if (end & 7) rest[(end - c) / 8] &= (uint8_t)((1 << (end & 7)) - 1);
          a[i].mask = rest;
        }
        s[i] = step(way, &a[i], j->xp + c, &t, s[i]);
      }
      c = end;
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) acc[i] = v_fma(s[i], v_set(scale[i * m->groups + g]), acc[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; i++) found[i] = v_sum(acc[i]) * factor_of(way);
}

/* The codes of row r as signed bytes. */
INL const uint8_t *signed_bytes(const matrix *m, int64_t r, buffers b) {
  uint8_t table[16];
  for (int k = 0; k < 16; k++) table[k] = m->narrow[k] ^ SAME;
  unpacked(m, r, stored(m, r, b), table, b.codes);
  return b.codes;
}

INL void streamed_rows(int way, int R, const int64_t *r, const job *j, const buffers *b, float *scale) {
  const matrix *m = j->m;
  cursor a[4];
  float found[4];
  for (int i = 0; i < R; i++) {
    a[i].at = way == MASKED_CODES ? signed_bytes(m, r[i], b[i]) : stored(m, r[i], b[i]);
    a[i].mask = m->mask ? m->mask + r[i] * mask_bytes(m->cols) : NULL;
    scales_of(m, r[i], scale + i * m->groups);
  }
  streams(way, R, a, j, scale, found);
  for (int i = 0; i < R; i++) finish(j, r[i], 0, 1, found + i);
}

INL void streamed_as(int way, const job *j, int64_t from, int64_t to, const buffers *b, float *scale) {
  int64_t apart = (to - from) / 4;
  for (int64_t q = from; q < from + apart; q++) {
    int64_t r[4] = {q, q + apart, q + 2 * apart, q + 3 * apart};
    streamed_rows(way, 4, r, j, b, scale);
  }
  for (int64_t q = from + 4 * apart; q < to; q++) streamed_rows(way, 1, &q, j, b, scale);
}

/* Returns 0 where the product does not go through registers. */
static int streamed(const job *j, int64_t from, int64_t to, const buffers *b, float *scale) {
  switch (way_of(j)) {
    case MASKED16: streamed_as(MASKED16, j, from, to, b, scale); return 1;
    case MASKED8: streamed_as(MASKED8, j, from, to, b, scale); return 1;
    case MASKED_CODES: streamed_as(MASKED_CODES, j, from, to, b, scale); return 1;
    case DENSE8: streamed_as(DENSE8, j, from, to, b, scale); return 1;
    case DENSE4: streamed_as(DENSE4, j, from, to, b, scale); return 1;
    case DENSE3: streamed_as(DENSE3, j, from, to, b, scale); return 1;
    case DENSE2: streamed_as(DENSE2, j, from, to, b, scale); return 1;
    default: return 0;
  }
}

/* Rows are decoded, spread and multiplied in registers: four rows, each a stream of its own, by one token, or two by four.

   Included by rows.h where the instruction set has, behind its other pieces,

     WIDE_BITS, PAIRS                 up to how many bits dense codes may have levels that are no integers; whether there is R_PAIRS
     order_of(way)                    how x is laid out: k for floats, of k * W columns first 0 k 2k .., then 1 k+1 .., and so on;
                                      for bytes AS_IT_IS, EVEN_ODD of 8 * W columns, or HALVES: 16 columns of a group of 128
                                      beside those 64 on
     columns_of(way)                  columns of a step, a multiple of what order_of spans
     v_first(f), shifted(way)         f and zeros; whether shift counts
     levels_of(way, m)                what it keeps in registers for a whole row
     step(way, cursor, x, T, levels, s)   adds the products of a step and of T tokens to s, and moves the cursor on
     step_rounded(way, cursor, x, xs, T, levels, s)  sets s to the sums of X_GROUP columns of rounded inputs times their scales
                                      xs; without signs they are x.apart bytes on, see inputs.h
     factor, shift                    in levels: what the sums of a row are to be multiplied by, and what is missing of a level

   Bits of a mask behind the last column are 0 here, and so is x. */

#define AHEAD 256 /* bytes that are fetched before they are wanted; 1024 are slower */

INL int way_for(const matrix *m) {
  if (m->mask) {
    if (m->kind == BF16 || m->kind == FP16) return m->kind == BF16 ? MASKED16 : MASKED_HALF;
    return m->kind < CODES8 || m->wide ? BUFFERED : m->kind == CODES8 ? MASKED8 : MASKED_CODES;
  }
  switch (m->kind) {
    case CODES8: return m->wide ? BUFFERED : DENSE8;
    case CODES4: return m->wide && WIDE_BITS < 4 ? BUFFERED : DENSE4;
    case CODES3: return m->wide && WIDE_BITS < 3 ? BUFFERED : DENSE3;
    case CODES2: return m->wide && WIDE_BITS < 2 ? BUFFERED : DENSE2;
    default: return BUFFERED;
  }
}
/* Whether the levels of 4 bits are evenly apart, so that a code may stand for itself. */
INL int even_levels(const matrix *m) {
  for (int k = 1; k < 16; k++)
    if (m->narrow[k] - m->narrow[k - 1] != m->narrow[1] - m->narrow[0] || m->narrow[k] <= m->narrow[k - 1]) return 0;
  return 1;
}
INL int rounded_way_for(const matrix *m) {
  if (m->kind < CODES8 || m->wide) return BUFFERED;
  if (m->mask && m->pairs && PAIRS) return m->kind == CODES8 ? R_PAIRS8 : R_PAIRS_CODES;
  if (m->mask) return m->kind == CODES8 ? R_MASKED8 : R_MASKED_CODES;
  if (m->kind == CODES4) return even_levels(m) ? R_DENSE4 : R_BOOK4;
  return m->kind == CODES8 ? R_DENSE8 : m->kind == CODES3 ? R_DENSE3 : R_DENSE2;
}
/* A step has one scale. */
INL int way_of(const job *j) {
  int way = j->xq ? rounded_way_for(j->m) : way_for(j->m);
  int64_t columns = way > ROUNDED ? X_GROUP : columns_of(way);
  return j->m->group < j->m->cols && j->m->group % columns ? BUFFERED : way;
}

/* Let the masks of a row's last columns, fewer than a step, be followed by zeros. */
INL void end_masks(int R, cursor *a, int64_t columns, uint8_t (*rest)[32]) {
  for (int i = 0; i < R; i++) {
    memset(rest[i], 0, 32);
    memcpy(rest[i], a[i].mask, (size_t)mask_bytes(columns));
    if (columns & 7) rest[i][columns / 8] &= (uint8_t)((1 << (columns & 7)) - 1);
    a[i].mask = rest[i];
  }
}

INL void streams(int way, int R, int T, cursor *a, const job *j, int64_t t0, const float *scale, const levels *t, VF *acc) {
  const matrix *m = j->m;
  const int64_t columns = columns_of(way);
  floats x = {(const float *)j->xp + t0 * ordered(m->cols), ordered(m->cols)};
  VF s[8];
  for (int64_t g = 0, c = 0; g < m->groups; g++) {
    int64_t end = c + m->group < m->cols ? c + m->group : m->cols;
#pragma GCC unroll 8
    for (int k = 0; k < R * T; k++) s[k] = v_zero();
    for (; c + columns <= end; c += columns, x.at += columns)
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) __builtin_prefetch(a[i].at + AHEAD), step(way, &a[i], x, T, t, s + i * T);
    if (c < end) { /* the last columns of a row */
      uint8_t rest[4][32];
      if (m->mask) end_masks(R, a, end - c, rest);
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) step(way, &a[i], x, T, t, s + i * T);
      c = end;
    }
#pragma GCC unroll 8
    for (int k = 0; k < R * T; k++) acc[k] = v_fma(s[k], v_set(scale[k / T * m->groups + g]), acc[k]);
  }
}

INL void rounded_streams(int way, int R, int T, cursor *a, const job *j, int64_t t0, const float *scale, const levels *t, VF *acc) {
  const matrix *m = j->m;
  const int64_t xgroups = ordered(m->cols) / X_GROUP, steps = m->group < m->cols ? m->group / X_GROUP : xgroups; /* of a scale */
  const int8_t *first = (const int8_t *)j->xp + 4 * t0 * ordered(m->cols);
  bytes x = {first, first + 2 * ordered(m->cols), ordered(m->cols)};
  for (int64_t n = 0, left = steps; n < xgroups; n++, left--, x.at += X_GROUP, x.sums += 4 * W) {
    uint8_t rest[4][32];
    const floats xs = {j->xs + (t0 * xgroups + n) * X_SCALES, xgroups * X_SCALES};
    if (left == 0) left = steps, scale++;
    if (m->mask && n == xgroups - 1 && m->cols % X_GROUP) end_masks(R, a, m->cols % X_GROUP, rest);
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      VF s[4];
      __builtin_prefetch(a[i].at + AHEAD);
      if (way == R_DENSE8) __builtin_prefetch(a[i].at + AHEAD + 64); /* a line for each 64 bytes */
      step_rounded(way, &a[i], x, xs, T, t, s);
#pragma GCC unroll 4
      for (int k = 0; k < T; k++) {
        if (shifted(way)) s[k] = v_add(s[k], v_first(t->shift * j->xsum[(t0 + k) * xgroups + n]));
        acc[i * T + k] = v_fma(s[k], v_set(scale[i * m->groups]), acc[i * T + k]);
      }
    }
  }
}

/* The codes of row r as signed bytes. */
INL const uint8_t *signed_bytes(const matrix *m, int64_t r, buffers b) {
  uint8_t table[16];
  for (int k = 0; k < 16; k++) table[k] = m->narrow[k] ^ SAME;
  unpacked(m, r, stored(m, r, b), table, b.codes);
  return b.codes;
}

/* Adds u times a token's t to the sums of some rows. */
INL void low_rank_as_rows(int F, int R, const int64_t *r, const job *j, int64_t t, VF *acc, float *tail) {
  const float *x = j->t + t * j->ldt;
  const int64_t rank = j->u->cols;
  const void *w[4];
  int64_t c = 0;
#pragma GCC unroll 4
  for (int i = 0; i < R; i++) w[i] = j->u->data + start_of(j->u, r[i]);
  for (; c + W <= rank; c += W) {
    VF v = v_load(F_FP32, x, c);
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) acc[i] = v_fma(v_load(F, w[i], c), v, acc[i]);
  }
  for (; c < rank; c++)
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) tail[i] += one(F, w[i], c) * x[c];
}
INL void low_rank_rows(int R, const int64_t *r, const job *j, int64_t t, VF *acc, float *tail) {
  switch (format_of(j->u)) {
    case F_FP32: low_rank_as_rows(F_FP32, R, r, j, t, acc, tail); break;
    case F_BF16: low_rank_as_rows(F_BF16, R, r, j, t, acc, tail); break;
    case F_FP16: low_rank_as_rows(F_FP16, R, r, j, t, acc, tail); break;
    default: low_rank_as_rows(F_S8, R, r, j, t, acc, tail);
  }
}
static void low_rank_of_one(const int64_t *r, const job *j, int64_t t, VF *acc, float *tail) { low_rank_rows(1, r, j, t, acc, tail); }
static void low_rank_of_four(const int64_t *r, const job *j, int64_t t, VF *acc, float *tail) { low_rank_rows(4, r, j, t, acc, tail); }

/* The same of n rows from r on, in advance (n, tokens): where a row of U is of few bytes, one stream more by itself is quicker than
   four more beside those of S. */
static void low_ranks(const job *j, int64_t r, int64_t n, float *to) {
  const uint8_t *begin = j->u->data + start_of(j->u, r);
  for (int64_t i = 0; i < n; i += 4) {
    const int64_t rows[4] = {r + i, r + (i + 1 < n ? i + 1 : i), r + (i + 2 < n ? i + 2 : i), r + (i + 3 < n ? i + 3 : i)};
    __builtin_prefetch(begin + i * j->u->cols + 4 * AHEAD);
    for (int64_t k = 0; k < j->tokens; k++) {
      VF acc[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
      float found[4], tail[4] = {0};
      low_rank_as_rows(F_S8, 4, rows, j, k, acc, tail);
      v_sums(acc, found);
      for (int e = 0; e < 4 && i + e < n; e++) to[(i + e) * j->tokens + k] = found[e] + tail[e];
    }
  }
}
INL int in_advance(int way, const job *j) { return way > ROUNDED && j->u && format_of(j->u) == F_S8 && j->tokens < 4; }

/* Sums of R rows and T tokens, still in lanes, times the levels' factor. */
INL void streams_as(int way, int R, int T, const cursor *from, const job *j, int64_t t0, const float *scale, const levels *t, VF *acc) {
  cursor a[4];
  memcpy(a, from, (size_t)R * sizeof *a);
#pragma GCC unroll 8
  for (int k = 0; k < R * T; k++) acc[k] = v_zero();
  if (way > ROUNDED) rounded_streams(way, R, T, a, j, t0, scale, t, acc);
  else streams(way, R, T, a, j, t0, scale, t, acc);
#pragma GCC unroll 8
  for (int k = 0; k < R * T; k++) acc[k] = v_fma(acc[k], v_set(t->factor), v_zero());
}
/* R rows; low: U times t (rows, tokens), or NULL: not in advance. */
INL void streamed_rows(int way, int R, const int64_t *r, const job *j, const buffers *b, float *scale, const float *low, const levels *t) {
  const matrix *m = j->m;
  cursor a[4];
  VF acc[8];
  float found[8];
  int64_t k = 0;
  for (int i = 0; i < R; i++) {
    a[i].at = in_bytes(way) ? signed_bytes(m, r[i], b[i]) : stored(m, r[i], b[i]);
    a[i].mask = m->mask ? m->mask + r[i] * mask_bytes(m->cols) : NULL;
    if (m->scale) __builtin_prefetch(m->scale + (r[i] + 8) * m->groups);
    if (j->u && !low) __builtin_prefetch(j->u->data + start_of(j->u, r[i]) + AHEAD);
    scales_of(m, r[i], scale + i * m->groups);
  }
  for (; R == 4 && j->tokens - k >= 4; k += 4)
    for (int i = 0; i < 4; i += 2) { /* what they read lies in the cache by now */
      streams_as(way, 2, 4, a + i, j, k, scale + i * m->groups, t, acc);
      sums(8, acc, found);
      finish(j, r[i], k, 4, found), finish(j, r[i + 1], k, 4, found + 4);
    }
  for (; k < j->tokens; k++) {
    float tail[4] = {0};
    VF own[4]; /* whose address nobody takes: they stay in registers */
    streams_as(way, R, 1, a, j, k, scale, t, own);
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) acc[i] = own[i];
    if (low) for (int i = 0; i < R; i++) tail[i] = low[r[i] * j->tokens + k];
    else if (j->u) (R == 4 ? low_rank_of_four : low_rank_of_one)(r, j, k, acc, tail);
    sums(R, acc, found);
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) put(j, r[i], k, found[i] + tail[i]);
  }
}

INL void streamed_as(int way, const job *j, int64_t from, int64_t to, const buffers *b, float *scale) {
  const levels t = levels_of(way, j->m);
  float *room = scale + 4 * j->m->groups;
  const float *low = in_advance(way, j) ? room - from * j->tokens : NULL; /* of row 0, if it were there */
  int64_t apart = (to - from) / 4;
  if (low) low_ranks(j, from, to - from, room);
  for (int64_t q = from; q < from + apart; q++) {
    int64_t r[4] = {q, q + apart, q + 2 * apart, q + 3 * apart};
    streamed_rows(way, 4, r, j, b, scale, low, &t);
  }
  for (int64_t q = from + 4 * apart; q < to; q++) streamed_rows(way, 1, &q, j, b, scale, low, &t);
}

/* Returns 0 where the product does not go through registers. */
static int streamed(const job *j, int64_t from, int64_t to, const buffers *b, float *scale) {
  switch (way_of(j)) {
    case MASKED16: streamed_as(MASKED16, j, from, to, b, scale); return 1;
    case MASKED_HALF: streamed_as(MASKED_HALF, j, from, to, b, scale); return 1;
    case MASKED8: streamed_as(MASKED8, j, from, to, b, scale); return 1;
    case MASKED_CODES: streamed_as(MASKED_CODES, j, from, to, b, scale); return 1;
    case DENSE8: streamed_as(DENSE8, j, from, to, b, scale); return 1;
    case DENSE4: streamed_as(DENSE4, j, from, to, b, scale); return 1;
    case DENSE3: streamed_as(DENSE3, j, from, to, b, scale); return 1;
    case DENSE2: streamed_as(DENSE2, j, from, to, b, scale); return 1;
    case R_DENSE8: streamed_as(R_DENSE8, j, from, to, b, scale); return 1;
    case R_DENSE4: streamed_as(R_DENSE4, j, from, to, b, scale); return 1;
    case R_BOOK4: streamed_as(R_BOOK4, j, from, to, b, scale); return 1;
    case R_DENSE3: streamed_as(R_DENSE3, j, from, to, b, scale); return 1;
    case R_DENSE2: streamed_as(R_DENSE2, j, from, to, b, scale); return 1;
    case R_MASKED8: streamed_as(R_MASKED8, j, from, to, b, scale); return 1;
    case R_MASKED_CODES: streamed_as(R_MASKED_CODES, j, from, to, b, scale); return 1;
#if PAIRS
    case R_PAIRS8: streamed_as(R_PAIRS8, j, from, to, b, scale); return 1;
    case R_PAIRS_CODES: streamed_as(R_PAIRS_CODES, j, from, to, b, scale); return 1;
#endif
    default: return 0;
  }
}

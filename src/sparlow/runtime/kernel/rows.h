/* Rows of a matrix, decoded and multiplied; included by each instruction set behind its own pieces:

     VF, W                            a vector of W floats
     v_zero v_set v_fma v_add v_sum   on it
     v_sums(a, to)                    v_sum of four vectors at once, bit for bit
     v_put_bf16(to, v)                as to_bf16 does it
     v_load(format, row, c)           columns c .. c + W - 1 of a decoded row
     v_block(w, xq, xs)               W sums of BLOCK products of bytes that stand for level + 128 with rounded inputs, times
                                      their scales, each of which is there twice (inputs.h)
     unpack4 unpack3 unpack2          codes -> bytes, each through a table of 16
     wide16                           codes below 16 -> 16-bit numbers
     spread8 spread16 spread32        kept values -> columns, by the mask

   A row is summed in the same order whichever thread takes it and whichever rows are taken beside it. */
#include "inputs.h"

static const uint8_t SELF[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

typedef struct { uint8_t *raw, *codes, *wide, *full; } buffers;

/* The kept values or codes of row r; whole vectors may be read behind its end. */
INL const uint8_t *stored(const matrix *m, int64_t r, buffers b) {
  const uint8_t *p = m->data + start_of(m, r);
  int64_t end = start_of(m, r + 1), size = end - start_of(m, r);
  if (end + PAD <= start_of(m, m->rows)) return p;
  if (size) memcpy(b.raw, p, (size_t)size); /* of no values there may be no place either */
  memset(b.raw + size, 0, PAD);
  return b.raw;
}
/* Codes of less than 8 bits as bytes, each through a table. */
INL int64_t unpacked(const matrix *m, int64_t r, const uint8_t *p, const uint8_t *table, uint8_t *to) {
  int bits = m->kind == CODES4 ? 4 : m->kind == CODES3 ? 3 : 2;
  int64_t n = (start_of(m, r + 1) - start_of(m, r)) * 8 / bits; /* up to 7 too many, which nobody looks at */
  if (bits == 4) unpack4(p, n, table, to);
  else if (bits == 3) unpack3(p, n, table, to);
  else unpack2(p, n, table, to);
  return n;
}
/* Row r with every column in its place; it may lie in the file's mapping. */
static const void *decoded(const matrix *m, int64_t r, buffers b) {
  const uint8_t *p = stored(m, r, b), *mask = m->mask ? m->mask + r * mask_bytes(m->cols) : NULL;
  int64_t kept = start_of(m, r + 1) - start_of(m, r);
  if (m->kind >= CODES4) kept = unpacked(m, r, p, m->wide ? SELF : m->narrow, b.codes), p = b.codes;
  if (m->kind >= CODES8 && m->wide) {
    uint16_t *to = (uint16_t *)b.wide;
    if (m->kind == CODES8) for (int64_t i = 0; i < kept; i++) to[i] = m->wide[p[i]];
    else wide16(p, kept, m->wide, to);
    p = b.wide;
  }
  if (!mask) return p;
  int width = width_of(format_of(m));
  if (width == 1) spread8(p, mask, m->cols, b.full);
  else if (width == 2) spread16((const uint16_t *)p, mask, m->cols, (uint16_t *)b.full);
  else spread32((const float *)p, mask, m->cols, (float *)b.full);
  return b.full;
}

/* Columns c .. end, which share a scale, of R rows and T tokens. */
INL void segment(int F, int R, int T, const void *const *w, const float *x, int64_t ldx, int64_t c, int64_t end,
                 const float *scale, int64_t lds, VF *acc, float *tail) {
  VF s[8];
#pragma GCC unroll 8
  for (int k = 0; k < R * T; k++) s[k] = v_zero();
  for (; c + W <= end; c += W)
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      VF v = v_load(F, w[i], c);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) s[i * T + t] = v_fma(v, v_load(F_FP32, x + t * ldx, c), s[i * T + t]);
    }
#pragma GCC unroll 8
  for (int k = 0; k < R * T; k++) {
    acc[k] = v_fma(s[k], v_set(scale[k / T * lds]), acc[k]);
    for (int64_t n = c; n < end; n++) tail[k] += scale[k / T * lds] * one(F, w[k / T], n) * x[k % T * ldx + n];
  }
}

/* The same for a whole row, and inputs rounded to int8. */
INL void rounded(int R, int T, const void *const *w, const job *j, int64_t t0, const float *scale, VF *acc) {
  const matrix *m = j->m;
  int64_t ld = ordered(m->cols), blocks = padded(m->cols) / BLOCK;
  for (int64_t b = 0; b < blocks; b++) {
    int64_t g = m->group >= m->cols ? 0 : b * BLOCK / m->group;
#pragma GCC unroll 4
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const float *xs = j->xs + ((t0 + t) * ld / X_GROUP + b * BLOCK / X_GROUP) * X_SCALES + FINE;
        VF sum = v_block((const uint8_t *)w[i] + b * BLOCK, j->xq + (t0 + t) * ld + b * BLOCK, xs);
        acc[i * T + t] = v_fma(sum, v_set(scale[i * m->groups + g]), acc[i * T + t]);
      }
  }
}

/* The sums of n vectors: 1, 4 or 8. */
INL void sums(int n, const VF *acc, float *to) {
  if (n == 1) to[0] = v_sum(acc[0]);
  else v_sums(acc, to);
  if (n == 8) v_sums(acc + 4, to + 4);
}
INL void dots(int F, int A8, int R, int T, const void *const *w, const job *j, int64_t t0, const float *scale, float *found) {
  VF acc[8];
  float tail[8];
  const matrix *m = j->m;
#pragma GCC unroll 8
  for (int k = 0; k < R * T; k++) acc[k] = v_zero(), tail[k] = 0;
  if (A8) rounded(R, T, w, j, t0, scale, acc);
  else
    for (int64_t g = 0, c = 0; g < m->groups; g++, c += m->group) {
      int64_t end = c + m->group < m->cols ? c + m->group : m->cols;
      segment(F, R, T, w, j->x + t0 * j->ldx, j->ldx, c, end, scale + g, m->groups, acc, tail);
    }
  sums(R * T, acc, found);
#pragma GCC unroll 8
  for (int k = 0; k < R * T; k++) found[k] += tail[k];
}

INL void low_rank_as(int F, const void *w, const job *j, int64_t t0, int T, float *found) {
  const float scale = 1;
  for (int t = 0; t < T; t++) {
    VF acc = v_zero();
    float tail = 0;
    segment(F, 1, 1, &w, j->t + (t0 + t) * j->ldt, j->ldt, 0, j->u->cols, &scale, 1, &acc, &tail);
    found[t] += v_sum(acc) + tail;
  }
}
/* Adds row r of u times t; u is dense, so that its rows lie in the file as they are. */
static void low_rank(const job *j, int64_t r, int64_t t0, int T, float *found) {
  const uint8_t *w = j->u->data + start_of(j->u, r);
  switch (format_of(j->u)) {
    case F_FP32: low_rank_as(F_FP32, w, j, t0, T, found); break;
    case F_BF16: low_rank_as(F_BF16, w, j, t0, T, found); break;
    case F_FP16: low_rank_as(F_FP16, w, j, t0, T, found); break;
    default: low_rank_as(F_S8, w, j, t0, T, found);
  }
}
INL void put(const job *j, int64_t r, int64_t t, float found) {
  float y = found + (j->bias ? j->bias[r] : 0);
  j->y[t * j->ldy + r] = j->fold ? y * j->fold[r] : y;
}
static void finish(const job *j, int64_t r, int64_t t0, int T, float *found) {
  if (j->u) low_rank(j, r, t0, T, found);
  for (int t = 0; t < T; t++) put(j, r, t0 + t, found[t]);
}

/* Some rows (1 or 4) and all tokens. Two rows and four tokens go together, so that a decoded number is used for each. */
INL void tokens(int F, int A8, int R, const void *const *w, const int64_t *r, const job *j, const float *scale) {
  float found[8];
  int64_t t = 0;
  for (; R == 4 && j->tokens - t >= 4; t += 4)
    for (int i = 0; i < 4; i += 2) {
      dots(F, A8, 2, 4, w + i, j, t, scale + i * j->m->groups, found);
      finish(j, r[i], t, 4, found), finish(j, r[i + 1], t, 4, found + 4);
    }
  for (; t < j->tokens; t++) {
    dots(F, A8, R, 1, w, j, t, scale, found);
    for (int i = 0; i < R; i++) finish(j, r[i], t, 1, found + i);
  }
}

static void scales_of(const matrix *m, int64_t r, float *to) {
  const uint16_t *from = m->scale + r * m->groups;
  if (!m->scale) to[0] = m->unit;
  else if (m->scale_kind == BF16)
#pragma GCC unroll 4
    for (int64_t g = 0; g < m->groups; g++) to[g] = m->unit * of_bf16(from[g]);
  else for (int64_t g = 0; g < m->groups; g++) to[g] = m->unit * of_fp16(from[g]);
}

/* Buffers of n rows, their scales, and some more floats behind these; where there is no memory, none. */
static int buffers_of(const matrix *m, int n, int64_t more, buffers *b, float **scale) {
  size_t size = 4 * (size_t)padded(m->cols) + 2 * PAD;
  uint8_t *p = scratch((size_t)n * (4 * size + 4 * (size_t)m->groups) + 4 * (size_t)more + 64);
  if (!p) return 0;
  p += (64 - (uintptr_t)p % 64) % 64;
  for (int i = 0; i < n; i++, p += 4 * size) b[i] = (buffers){p, p + size, p + 2 * size, p + 3 * size};
  *scale = (float *)p;
  return 1;
}

INL void rows_as(int F, int A8, const job *j, int64_t from, int64_t to, buffers *b, float *scale) {
  const matrix *m = j->m;
  int64_t apart = (to - from) / 4; /* four rows, each a stream of its own in pages of its own */
  for (int64_t q = from; q < from + apart; q++) {
    int64_t r[4] = {q, q + apart, q + 2 * apart, q + 3 * apart};
    const void *w[4];
    for (int i = 0; i < 4; i++) w[i] = decoded(m, r[i], b[i]), scales_of(m, r[i], scale + i * m->groups);
    tokens(F, A8, 4, w, r, j, scale);
  }
  for (int64_t q = from + 4 * apart; q < to; q++) {
    const void *w = decoded(m, q, b[0]);
    scales_of(m, q, scale);
    tokens(F, A8, 1, &w, &q, j, scale);
  }
}

#ifdef STREAMS
#include "stream.h"
static int order(const job *j) { return order_of(way_of(j)); }
#else
static int order(const job *j) { return (void)j, 0; }
#endif

static void product(const job *j, int64_t from, int64_t to) {
  buffers b[4];
  float *scale;
  if (!buffers_of(j->m, 4, j->u ? (to - from) * j->tokens : 0, b, &scale)) { /* seen by the caller: no number is made up */
    for (int64_t t = 0; t < j->tokens; t++)
      for (int64_t r = from; r < to; r++) memset(&j->y[t * j->ldy + r], 0xff, 4);
    return;
  }
#ifdef STREAMS
  if (j->xp && streamed(j, from, to, b, scale)) return;
#endif
  switch (format_of(j->m)) {
    case F_FP32: rows_as(F_FP32, 0, j, from, to, b, scale); break;
    case F_BF16: rows_as(F_BF16, 0, j, from, to, b, scale); break;
    case F_FP16: rows_as(F_FP16, 0, j, from, to, b, scale); break;
    case F_S8: rows_as(F_S8, 0, j, from, to, b, scale); break;
    default:
      if (j->xq) rows_as(F_U8, 1, j, from, to, b, scale);
      else rows_as(F_U8, 0, j, from, to, b, scale);
  }
}

/* A decoded row times its scales, in float32 or rounded to bf16. */
INL void expanded_as(int F, int bf16, const matrix *m, const void *w, const float *scale, void *to) {
  float *floats = to;
  uint16_t *halves = to;
  for (int64_t g = 0, c = 0; g < m->groups; g++) {
    int64_t end = c + m->group < m->cols ? c + m->group : m->cols;
    for (; c + W <= end; c += W) {
      VF v = v_fma(v_load(F, w, c), v_set(scale[g]), v_zero());
      if (bf16) v_put_bf16(halves + c, v);
      else memcpy(floats + c, &v, sizeof v);
    }
    for (; c < end; c++) {
      float f = one(F, w, c) * scale[g];
      if (bf16) halves[c] = to_bf16(f);
      else floats[c] = f;
    }
  }
}
INL void decoded_to(int bf16, const matrix *m, int64_t from, int64_t to, void *out) {
  const int64_t bytes = m->cols * (bf16 ? 2 : 4);
  buffers b;
  float *scale;
  int some = buffers_of(m, 1, 0, &b, &scale);
  if (!some) memset(out, 0xff, (size_t)((to - from) * bytes));
  for (int64_t r = from; some && r < to; r++, out = (uint8_t *)out + bytes) {
    const void *w = decoded(m, r, b);
    if (bf16 && m->kind == BF16) { memcpy(out, w, (size_t)bytes); continue; }
    scales_of(m, r, scale);
    switch (format_of(m)) {
      case F_FP32: expanded_as(F_FP32, bf16, m, w, scale, out); break;
      case F_BF16: expanded_as(F_BF16, bf16, m, w, scale, out); break;
      case F_FP16: expanded_as(F_FP16, bf16, m, w, scale, out); break;
      case F_S8: expanded_as(F_S8, bf16, m, w, scale, out); break;
      default: expanded_as(F_U8, bf16, m, w, scale, out);
    }
  }
}
static void decode(const matrix *m, int64_t from, int64_t to, float *out) { decoded_to(0, m, from, to, out); }
static void decode_bf16(const matrix *m, int64_t from, int64_t to, uint16_t *out) { decoded_to(1, m, from, to, out); }

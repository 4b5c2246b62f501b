/* What the files of the kernel share: a matrix as it lies in a file, and the job of one call.

   Nothing here needs torch. Numbers are read where the file's mapping has them; no byte behind a tensor's end is read,
   because the last rows are taken from a padded copy. */
#ifndef SPARLOW_H
#define SPARLOW_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INL static inline __attribute__((always_inline))
#define PAD 128      /* bytes that may be read, and written, behind a row */
#define BLOCK 64     /* columns of one step with rounded inputs */
#define X_GROUP 128  /* columns of an input whose rounding to int8 is described together, see inputs.h: */
#define FINE 4       /* by so many scales, */
#define X_SCALES 12  /* which lie there once, and then each of them twice */
#define ORDERS 6     /* of x that layers of one call may ask for: three of floats, three of bytes */
/* Orders of x, see stream.h: k = 1, 2, 4 or 8 for floats, and of bytes these. */
enum order { AS_IT_IS = 9, EVEN_ODD, HALVES, ALL_ORDERS };
#define TOKENS 8     /* that one call takes */
#define SAME 0x80    /* of a byte that stands for level + 128: the level 0 */

/* How the numbers of a matrix are stored. The order is that of packed.py. */
enum kind { FP32, BF16, FP16, S8, CODES8, CODES4, CODES3, CODES2 };
/* What a row is after decoding: floats, signed bytes, or bytes that stand for level + 128. */
enum format { F_FP32, F_BF16, F_FP16, F_S8, F_U8 };

typedef struct {
  const uint8_t *data;   /* kept values or codes, row after row */
  const int64_t *start;  /* (rows + 1) where each row begins, in bytes */
  const uint8_t *mask;   /* (rows, ceil(cols / 8)), or NULL: every entry is kept */
  const uint16_t *scale; /* (rows, groups), or NULL: 1 */
  const uint8_t *narrow; /* (16) code -> level / unit + 128, for codes below 8 bits whose levels are integers */
  const uint16_t *wide;  /* (256) code -> level in 16 bits, or NULL */
  int64_t rows, cols, group, groups;
  int64_t each;          /* bytes of a row where all have as many, or 0 */
  int32_t kind, scale_kind, wide_kind;
  int32_t pairs;         /* whether two of each four columns are kept, of whole fours */
  float unit;            /* what an integer level is multiplied by */
} matrix;

/* A layer x Sᵀ + (x Vᵀ · fold) Uᵀ + bias; all but S may be NULL. */
typedef struct {
  const matrix *S, *V, *U;
  const float *fold, *bias;
} layer;

typedef struct {
  const matrix *m, *u;        /* y = m x + u t + bias, times fold */
  const float *x, *t, *bias, *fold;
  const void *xp;             /* (ordered cols) one token in the order that the path asked for, or NULL; see stream.h */
  const int8_t *xq;           /* (tokens, ordered cols) x rounded, or NULL: x as it is */
  const float *xs;            /* (tokens, groups of X_GROUP, X_SCALES) its scales */
  const float *xsum;          /* (tokens, groups of X_GROUP) sums of what xq stands for */
  float *y;
  int64_t ldx, ldt, ldy, tokens;
} job;

typedef struct {
  void (*product)(const job *, int64_t from, int64_t to);
  void (*decode)(const matrix *, int64_t from, int64_t to, float *out);
  void (*decode_bf16)(const matrix *, int64_t from, int64_t to, uint16_t *out); /* rounded to nearest */
  int (*order)(const job *); /* of xp, see stream.h; 0: not wanted */
  void (*round)(const float *x, int64_t ldx, int64_t tokens, int64_t cols, int8_t *q, float *scales, float *totals); /* inputs.h */
  void (*lay_out)(const int8_t *q, int64_t cols, int order, int8_t *to);                                             /* inputs.h */
  int lanes;
} path;

extern const path path_plain, path_avx2, path_avx512, path_neon, path_dotprod;
extern const path *const paths[]; /* by the number that Python knows them by */

uint8_t *scratch(size_t bytes); /* of this thread, kept for the next call; NULL: no memory */

/* Where row r begins, in bytes; a list of it would be another thing to wait for. */
INL int64_t start_of(const matrix *m, int64_t r) { return m->each ? r * m->each : m->start[r]; }
INL int format_of(const matrix *m) {
  if (m->kind <= S8) return m->kind == FP32 ? F_FP32 : m->kind == BF16 ? F_BF16 : m->kind == FP16 ? F_FP16 : F_S8;
  return m->wide ? (m->wide_kind == BF16 ? F_BF16 : F_FP16) : F_U8;
}
INL int width_of(int format) { return format == F_FP32 ? 4 : format <= F_FP16 ? 2 : 1; }
INL int64_t padded(int64_t cols) { return (cols + BLOCK - 1) / BLOCK * BLOCK; }
INL int64_t ordered(int64_t cols) { return (cols + X_GROUP - 1) / X_GROUP * X_GROUP; }
INL int64_t mask_bytes(int64_t cols) { return (cols + 7) / 8; }

INL float of_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INL uint16_t to_bf16(float f) { /* to nearest, halves to even; NaN stays NaN */
  uint32_t u;
  memcpy(&u, &f, 4);
  return (uint16_t)(f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INL float of_fp16(uint16_t h) { /* 2^112 moves the exponent, subnormal numbers included; infinity and NaN stay what they are */
  uint32_t u = (uint32_t)(h & 0x7fff) << 13, big = (h & 0x7c00) == 0x7c00;
  float f;
  if (big) u |= 0x7f800000;
  memcpy(&f, &u, 4);
  if (!big) f *= 0x1p112f;
  memcpy(&u, &f, 4);
  u |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&f, &u, 4);
  return f;
}
INL float of_16(int kind, uint16_t h) { return kind == BF16 ? of_bf16(h) : of_fp16(h); }

/* The number in column c of a decoded row. */
INL float one(int format, const void *w, int64_t c) {
  if (format == F_FP32) return ((const float *)w)[c];
  if (format == F_BF16) return of_bf16(((const uint16_t *)w)[c]);
  if (format == F_FP16) return of_fp16(((const uint16_t *)w)[c]);
  return format == F_S8 ? (float)((const int8_t *)w)[c] : (float)((int)((const uint8_t *)w)[c] - 128);
}
/* Up to 64 mask bits from column c on; bits behind the last column are 0, whatever the file says. */
INL uint64_t mask_word(const uint8_t *mask, int64_t c, int64_t cols) {
  uint64_t word = 0;
  int64_t left = cols - c;
  if (left >= 64) memcpy(&word, mask + c / 8, 8);
  else memcpy(&word, mask + c / 8, (size_t)((left + 7) / 8)), word &= (1ull << left) - 1;
  return word;
}
#endif

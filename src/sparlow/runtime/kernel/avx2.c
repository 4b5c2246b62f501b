/* AVX2, FMA and F16C: every x86-64 processor since Haswell and Zen. No pdep, which Zen 1 and 2 have in microcode.

     unpack      codes of 4, 3, 2 bits widened to 16 or 32 bits; shifted copies of it or-ed; vpshufb as the table of levels
     spread8/16  8 columns a mask byte: vpshufb by a table of 256 controls (2 and 4 KiB)
     spread32    vpermd by a table of 256 indices (8 KiB)
     v_block     vpmaddubsw of |x| and w with the sign of x: both within 127, so that no sum of two saturates */
#include "sparlow.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "sums.h"

#define W 8
typedef __m256 VF;
typedef __m256i VI;

INL VF v_zero(void) { return _mm256_setzero_ps(); }
INL VF v_set(float f) { return _mm256_set1_ps(f); }
INL VF v_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
INL VF v_add(VF a, VF b) { return _mm256_add_ps(a, b); }
INL float v_sum(VF a) { return sum_of(folded(a)); }
INL void v_sums(const VF *a, float *to) { _mm_storeu_ps(to, sums_of(folded(a[0]), folded(a[1]), folded(a[2]), folded(a[3]))); }
INL void v_put_bf16(uint16_t *to, VF v) {
  VI u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)), none = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), none);
  _mm_storeu_si128((void *)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 8)));
}
INL VF v_load(int format, const void *w, int64_t c) {
  if (format == F_FP32) return _mm256_loadu_ps((const float *)w + c);
  if (format == F_BF16)
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)((const uint16_t *)w + c))), 16));
  if (format == F_FP16) return _mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)w + c)));
  __m128i b = _mm_loadl_epi64((const void *)((const uint8_t *)w + c));
  if (format == F_U8) b = _mm_xor_si128(b, _mm_set1_epi8((char)SAME));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
}
INL VI v_half_block(const uint8_t *w, const int8_t *xq) {
  VI x = _mm256_loadu_si256((const void *)xq), v = _mm256_xor_si256(_mm256_loadu_si256((const void *)w), _mm256_set1_epi8((char)SAME));
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(v, x)), _mm256_set1_epi16(1));
}
INL VF v_block(const uint8_t *w, const int8_t *xq, const float *xs) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(v_half_block(w, xq), v_half_block(w + 32, xq + 32))), _mm256_loadu_ps(xs));
}

/* 32 codes, a byte each. */
INL VI codes4(const uint8_t *p) {
  VI b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p));
  return _mm256_and_si256(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), _mm256_set1_epi8(15));
}
INL VI codes3(const uint8_t *p) { /* 12 bits, four codes, to each of eight 32-bit words */
  const VI place = _mm256_setr_epi8(0, 1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 7, 8, -1, -1, 9, 10, -1, -1, 10, 11, -1, -1);
  VI shift = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4), even = _mm256_set1_epi32(0x00070007), odd = _mm256_set1_epi32(0x07000700);
  VI b = _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p)), place), shift);
  b = _mm256_and_si256(b, _mm256_set1_epi32(0xfff)); /* codes 0, 2 in bits 0, 6 and 1, 3 in bits 3, 9 */
  VI low = _mm256_and_si256(b, _mm256_set1_epi32(0x3f)), high = _mm256_slli_epi32(_mm256_srli_epi32(b, 6), 16), two = _mm256_or_si256(low, high);
  return _mm256_or_si256(_mm256_and_si256(two, even), _mm256_and_si256(_mm256_slli_epi32(two, 5), odd));
}
INL VI codes2(const uint8_t *p) {
  VI b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
  b = _mm256_or_si256(_mm256_or_si256(b, _mm256_slli_epi32(b, 6)), _mm256_or_si256(_mm256_slli_epi32(b, 12), _mm256_slli_epi32(b, 18)));
  return _mm256_and_si256(b, _mm256_set1_epi8(3));
}
INL VI table_of(const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)); }
#define UNPACK(bits)                                                                                    \
  INL void unpack##bits(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {              \
    VI levels = table_of(table);                                                                        \
    for (int64_t i = 0; i < n; i += 32)                                                                 \
      _mm256_storeu_si256((void *)(to + i), _mm256_shuffle_epi8(levels, codes##bits(p + i * bits / 8))); \
  }
UNPACK(4)
UNPACK(3)
UNPACK(2)
INL void wide16(const uint8_t *codes, int64_t n, const uint16_t *table, uint16_t *to) {
  uint8_t half[2][16];
  for (int k = 0; k < 16; k++) half[0][k] = (uint8_t)table[k], half[1][k] = (uint8_t)(table[k] >> 8);
  __m128i low = _mm_loadu_si128((const void *)half[0]), high = _mm_loadu_si128((const void *)half[1]);
  for (int64_t i = 0; i < n; i += 16) {
    __m128i c = _mm_loadu_si128((const void *)(codes + i)), a = _mm_shuffle_epi8(low, c), b = _mm_shuffle_epi8(high, c);
    _mm_storeu_si128((void *)(to + i), _mm_unpacklo_epi8(a, b));
    _mm_storeu_si128((void *)(to + i + 8), _mm_unpackhi_epi8(a, b));
  }
}

static uint8_t by8[256][8] __attribute__((aligned(64))), by16[256][16] __attribute__((aligned(64)));
static int32_t by32[256][8] __attribute__((aligned(64)));
__attribute__((constructor)) static void fill_tables(void) {
  for (int m = 0; m < 256; m++)
    for (int k = 0, kept = 0; k < 8; k++) {
      int on = m >> k & 1, i = kept;
      kept += on;
      by8[m][k] = by16[m][2 * k] = by16[m][2 * k + 1] = 128, by32[m][k] = INT32_MIN;
      if (on) by8[m][k] = (uint8_t)i, by16[m][2 * k] = (uint8_t)(2 * i), by16[m][2 * k + 1] = (uint8_t)(2 * i + 1), by32[m][k] = i;
    }
}
/* Calls step(mask byte, columns from c on) for every eight columns; bits behind the last column are 0. */
#define BY_BYTES(step)                                                                    \
  for (int64_t c = 0; c < cols; c += 8) {                                                 \
    unsigned b = mask[c / 8];                                                             \
    if (cols - c < 8) b &= (1u << (cols - c)) - 1;                                        \
    step;                                                                                 \
    p += __builtin_popcount(b);                                                           \
  }
INL void spread8(const uint8_t *p, const uint8_t *mask, int64_t cols, uint8_t *to) {
  const __m128i same = _mm_set1_epi8((char)SAME); /* xor: what is not kept is 0 behind the shuffle, and SAME at the end */
  BY_BYTES(_mm_storel_epi64((void *)(to + c), _mm_xor_si128(same, _mm_shuffle_epi8(_mm_xor_si128(same, _mm_loadl_epi64((const void *)p)), _mm_loadl_epi64((const void *)by8[b])))))
}
INL void spread16(const uint16_t *p, const uint8_t *mask, int64_t cols, uint16_t *to) {
  BY_BYTES(_mm_storeu_si128((void *)(to + c), _mm_shuffle_epi8(_mm_loadu_si128((const void *)p), _mm_load_si128((const void *)by16[b]))))
}
INL void spread32(const float *p, const uint8_t *mask, int64_t cols, float *to) {
  BY_BYTES(VI i = _mm256_load_si256((const void *)by32[b]);
           VF v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), i);
           _mm256_storeu_ps(to + c, _mm256_blendv_ps(v, _mm256_setzero_ps(), _mm256_castsi256_ps(i))))
}

/* ---- One token in registers (see stream.h) */
#define STREAMS
#define WIDE_BITS 3
#define PAIRS 1
#include "spread.h"
INL int order_of(int way) {
  if (way > ROUNDED) return way == R_DENSE4 || way == R_BOOK4 ? EVEN_ODD : way < R_MASKED8 ? AS_IT_IS : HALVES;
  return way == BUFFERED ? 0 : way <= MASKED_CODES ? 1 : way == DENSE8 || way == DENSE2 ? 4 : 8;
}
INL int columns_of(int way) { return way == DENSE4 || way == DENSE3 ? 64 : 32; }
INL int shifted(int way) { return way == R_DENSE4; }
INL VF v_first(float f) { return _mm256_zextps128_ps256(_mm_set_ss(f)); }

typedef struct { VI bytes; VF floats; float factor, shift; } levels;
INL levels levels_of(int way, const matrix *m) {
  levels t = {.bytes = _mm256_setzero_si256(), .floats = v_zero(), .factor = 1, .shift = 0};
  if (way == MASKED8 || way == MASKED_CODES || way == DENSE8 || way == DENSE4) t.factor = 0x1p-24f; /* see dot_upper */
  if (way == R_DENSE4) t.factor = m->narrow[1] - m->narrow[0], t.shift = (m->narrow[0] - 128) / t.factor;
  if (way == DENSE4 || way == R_BOOK4 || way == R_DENSE3 || way == R_DENSE2) t.bytes = _mm256_xor_si256(table_of(m->narrow), _mm256_set1_epi8((char)SAME));
  if (way == DENSE3 || way == DENSE2) {
    float f[8];
    for (int k = 0; k < 8; k++) f[k] = level_of(m, way == DENSE2 ? k & 3 : k);
    t.floats = _mm256_loadu_ps(f);
  }
  return t;
}

INL void add_product(VF w, floats x, int64_t on, int T, VF *s) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) s[t] = v_fma(w, _mm256_loadu_ps(x.at + on + t * x.apart), s[t]);
}
/* 32 signed bytes: each in turn to the top of its int32, which is 2^24 times as much. */
INL void dot_upper(VI v, floats x, int64_t on, int T, VF *s) {
  const VI second = _mm256_setr_epi8(-1, -1, -1, 1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13, -1, -1, -1, 1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13);
  const VI third = _mm256_setr_epi8(-1, -1, -1, 2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14, -1, -1, -1, 2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14);
  add_product(_mm256_cvtepi32_ps(_mm256_slli_epi32(v, 24)), x, 0, T, s);
  add_product(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, second)), x, on, T, s);
  add_product(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, third)), x, 2 * on, T, s);
  add_product(_mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xff000000))), x, 3 * on, T, s);
}
INL void step_dense4(VI v, VI levels, floats x, int T, VF *s) { /* even nibbles of each int32, then odd ones */
  const VI low = _mm256_set1_epi8(15);
  dot_upper(_mm256_shuffle_epi8(levels, _mm256_and_si256(v, low)), x, 16, T, s);
  x.at += 8;
  dot_upper(_mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)), x, 16, T, s);
}
INL VI three_of_four(const uint8_t *p) { /* 24 bits, eight codes, to each int32 */
  const VI place = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)p)), _mm_loadu_si128((const void *)(p + 12)), 1), place);
}
/* The levels of 3 or 2 bits are found by a permutation of floats, which looks at the lowest bits. */
INL void step_few_bits(int bits, VI v, VF levels, floats x, int T, VF *s) {
#pragma GCC unroll 8
  for (int n = 0; n < (bits == 3 ? 8 : 4); n++) {
    VI code = _mm256_srli_epi32(v, bits * n);
    add_product(bits == 3 ? _mm256_permutevar8x32_ps(levels, code) : _mm256_permutevar_ps(levels, code), x, 8 * n, T, s);
  }
}
INL void step(int way, cursor *a, floats x, int T, const levels *t, VF *s) {
  const uint8_t *p = a->at;
  switch (way) {
    case DENSE8: a->at += 32; dot_upper(_mm256_xor_si256(_mm256_loadu_si256((const void *)p), _mm256_set1_epi8((char)SAME)), x, 8, T, s); break;
    case DENSE4: a->at += 32; step_dense4(_mm256_loadu_si256((const void *)p), t->bytes, x, T, s); break;
    case DENSE3: a->at += 24; step_few_bits(3, three_of_four(p), t->floats, x, T, s); break;
    case DENSE2: a->at += 8; step_few_bits(2, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)), t->floats, x, T, s); break;
    default: spread_dot(way, a, x, T, s);
  }
}

/* 32 products of bytes within 127: |x| and w with the sign of x, so that no sum of two saturates. */
INL void dot_rounded(VI w, bytes x, int64_t on, int T, VI *s) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const int8_t *at = x.at + on + 4 * t * x.apart;
    VI signs = _mm256_loadu_si256((const void *)at), size = _mm256_loadu_si256((const void *)(at + x.apart));
    s[t] = _mm256_add_epi32(s[t], _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(w, signs)), _mm256_set1_epi16(1)));
  }
}
INL VI signed_codes(int way, const uint8_t *p, VI levels) {
  if (way == R_DENSE8) return _mm256_xor_si256(_mm256_loadu_si256((const void *)p), _mm256_set1_epi8((char)SAME));
  return _mm256_shuffle_epi8(levels, way == R_DENSE3 ? codes3(p) : codes2(p));
}
INL void rounded_dense(int way, cursor *a, bytes x, int T, VI levels, VI *s) {
  const int each = way == R_DENSE8 ? 32 : way == R_DENSE3 ? 12 : 8;
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) dot_rounded(signed_codes(way, a->at + each * k, levels), x, 32 * k, T, s);
  a->at += 4 * each;
}
/* Codes of 4 bits stand for themselves: 16 of their products with x stay below 2^15. */
INL void rounded_dense4(cursor *a, bytes x, int T, VI *s) {
  const VI low = _mm256_set1_epi8(15);
  VI w[4];
#pragma GCC unroll 2
  for (int k = 0; k < 2; k++, a->at += 32) {
    VI v = _mm256_loadu_si256((const void *)a->at);
    w[2 * k] = _mm256_and_si256(v, low), w[2 * k + 1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const int8_t *at = x.at + 4 * t * x.apart;
    VI pairs = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[k], _mm256_loadu_si256((const void *)(at + 32 * k))));
    s[t] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
}

INL void rounded_book4(cursor *a, bytes x, int T, VI levels, VI *s) {
  const VI low = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int k = 0; k < 2; k++, a->at += 32) {
    VI v = _mm256_loadu_si256((const void *)a->at);
    dot_rounded(_mm256_shuffle_epi8(levels, _mm256_and_si256(v, low)), x, 64 * k, T, s);
    dot_rounded(_mm256_shuffle_epi8(levels, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)), x, 64 * k + 32, T, s);
  }
}
/* Whether a lane sums four of each run of eight columns, and its neighbour the other four; else a lane sums all eight. */
INL int in_fours(int way) { return way == R_DENSE8 || way == R_DENSE3 || way == R_DENSE2; }

#define BOTH(...) _mm256_setr_epi8(__VA_ARGS__, __VA_ARGS__)
#define NO (char)128
/* The nibbles of 128 mask bits, a byte each: words of 32 columns 0, 1 in the lower half and 2, 3 in the upper one. */
INL VI nibbles_of(const uint8_t *mask) {
  const __m128i low = _mm_set1_epi8(15);
  __m128i m = _mm_loadu_si128((const void *)mask), even = _mm_and_si128(m, low), odd = _mm_and_si128(_mm_srli_epi16(m, 4), low);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)), _mm_unpackhi_epi8(even, odd), 1);
}
INL VI halves(const uint8_t *low, const uint8_t *high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)low)), _mm_loadu_si128((const void *)high), 1);
}
/* Where each of 16 columns finds its value, in each half. Columns 0 and 1 of a nibble count up from the values before it, columns 2
   and 3 down from those behind it, so that one or two bits of the nibble decide: 12 cases, which fit one table. */
INL VI places(VI nibbles, VI sums, int quarter) {
  const VI bits = BOTH(1, 3, 12, 8, 1, 3, 12, 8, 1, 3, 12, 8, 1, 3, 12, 8), cases = BOTH(6, 0, 0, 5, 6, 0, 0, 5, 6, 0, 0, 5, 6, 0, 0, 5);
  const VI of_case = BOTH(NO, NO, 0, 1, -1, NO, NO, 0, NO, NO, NO, NO, -2, -1, NO, NO);
  const VI nibble = BOTH(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), before = BOTH(NO, NO, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3);
  VI on = _mm256_set1_epi8((char)(4 * quarter));
  VI which = _mm256_or_si256(_mm256_and_si256(_mm256_shuffle_epi8(nibbles, _mm256_add_epi8(nibble, on)), bits), cases);
  return _mm256_add_epi8(_mm256_shuffle_epi8(of_case, which), _mm256_shuffle_epi8(sums, _mm256_or_si256(before, on)));
}
INL void rounded_masked(int way, cursor *a, bytes x, int T, VI *s, VI *other) {
  const VI kept = BOTH(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  VI n = nibbles_of(a->mask), sums = _mm256_shuffle_epi8(kept, n);
  sums = _mm256_add_epi8(sums, _mm256_slli_epi32(sums, 8)), sums = _mm256_add_epi8(sums, _mm256_slli_epi32(sums, 16)); /* of 16 columns */
  uint64_t low, high;
  memcpy(&low, a->mask, 8), memcpy(&high, a->mask + 8, 8);
  const uint8_t *p = a->at, *q = p + _mm_popcnt_u64(low);
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    VI v = _mm256_shuffle_epi8(way == R_MASKED8 ? _mm256_xor_si256(halves(p, q), _mm256_set1_epi8((char)SAME)) : halves(p, q), places(n, sums, k));
    dot_rounded(v, x, 32 * k, T, k & 1 ? other : s);
    p += _mm_popcnt_u64(low >> 16 * k & 0xffff), q += _mm_popcnt_u64(high >> 16 * k & 0xffff);
  }
  a->at = q, a->mask += 16;
}
/* Two of four columns: 32 kept values stay as they lie, and x is gathered for them. A nibble's bits {0, 1} decide where the
   first is, its bits {2, 3} where the second is. */
INL VI gathered(VI nibbles, int half, const int8_t *x) {
  const VI bits = BOTH(3, 12, 3, 12, 3, 12, 3, 12, 3, 12, 3, 12, 3, 12, 3, 12), cases = BOTH(0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2);
  const VI of_case = BOTH(2, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3, 0), four = BOTH(0, 0, 4, 4, 8, 8, 12, 12, 0, 0, 4, 4, 8, 8, 12, 12);
  const VI nibble = BOTH(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  VI which = _mm256_shuffle_epi8(nibbles, _mm256_add_epi8(nibble, _mm256_set1_epi8((char)(8 * half))));
  VI at = _mm256_add_epi8(four, _mm256_shuffle_epi8(of_case, _mm256_or_si256(_mm256_and_si256(which, bits), cases)));
  VI first = _mm256_shuffle_epi8(_mm256_loadu_si256((const void *)x), at), second = _mm256_shuffle_epi8(_mm256_loadu_si256((const void *)(x + 32)), at);
  return _mm256_blend_epi32(first, second, 0xcc);
}
INL void rounded_pairs(int way, cursor *a, bytes x, int T, VI *s) {
  VI n = nibbles_of(a->mask);
#pragma GCC unroll 2
  for (int k = 0; k < 2; k++) {
    VI w = halves(a->at + 16 * k, a->at + 32 + 16 * k);
    if (way == R_PAIRS8) w = _mm256_xor_si256(w, _mm256_set1_epi8((char)SAME));
    VI size = _mm256_abs_epi8(w);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      VI g = gathered(n, k, x.at + 64 * k + 4 * t * x.apart);
      s[t] = _mm256_add_epi32(s[t], _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(g, w)), _mm256_set1_epi16(1)));
    }
  }
  a->at += 64, a->mask += 16;
}
INL VF scales_at(const float *at) { return _mm256_broadcast_ps((const void *)at); }
INL void step_rounded(int way, cursor *a, bytes x, floats xs, int T, const levels *t, VF *found) {
  VI s[4], other[4]; /* of masked ones: columns of scales 0 and 1, and of 2 and 3 */
#pragma GCC unroll 4
  for (int k = 0; k < T; k++) s[k] = other[k] = _mm256_setzero_si256();
  if (way == R_DENSE4) rounded_dense4(a, x, T, s);
  else if (way == R_BOOK4) rounded_book4(a, x, T, t->bytes, s);
  else if (way < R_MASKED8) rounded_dense(way, a, x, T, t->bytes, s);
  else if (way < R_PAIRS8) rounded_masked(way, a, x, T, s, other);
  else rounded_pairs(way, a, x, T, s);
#pragma GCC unroll 4
  for (int k = 0; k < T; k++) {
    const float *by = xs.at + k * xs.apart;
    if (way == R_MASKED8 || way == R_MASKED_CODES)
      found[k] = v_fma(_mm256_cvtepi32_ps(s[k]), scales_at(by + FINE), _mm256_mul_ps(_mm256_cvtepi32_ps(other[k]), scales_at(by + FINE + 4)));
    else found[k] = _mm256_mul_ps(_mm256_cvtepi32_ps(s[k]), in_fours(way) ? _mm256_loadu_ps(by + FINE) : scales_at(by));
  }
}

#include "rows.h"
const path path_avx2 = {product, decode, decode_bf16, order, round_inputs, lay_out_bytes, W};
#else
const path path_avx2 = {0};
#endif

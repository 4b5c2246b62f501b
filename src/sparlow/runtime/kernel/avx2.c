/* AVX2, FMA and F16C: every x86-64 processor since Haswell and Zen. No pdep, which Zen 1 and 2 have in microcode.

     unpack      codes of 4, 3, 2 bits widened to 16 or 32 bits; shifted copies of it or-ed; vpshufb as the table of levels
     spread8/16  8 columns a mask byte: vpshufb by a table of 256 controls (2 and 4 KiB)
     spread32    vpermd by a table of 256 indices (8 KiB)
     v_block     vpmaddubsw of |x| and w with the sign of x: both within 127, so that no sum of two saturates */
#include "sparlow.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#define W 8
typedef __m256 VF;
typedef __m256i VI;

INL VF v_zero(void) { return _mm256_setzero_ps(); }
INL VF v_set(float f) { return _mm256_set1_ps(f); }
INL VF v_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
INL VF v_add(VF a, VF b) { return _mm256_add_ps(a, b); }
INL float v_sum(VF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
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
INL VF v_block(const uint8_t *w, const int8_t *xq, const int32_t *xc) {
  (void)xc;
  return _mm256_cvtepi32_ps(_mm256_add_epi32(v_half_block(w, xq), v_half_block(w + 32, xq + 32)));
}

INL VI table_of(const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)); }
INL void unpack4(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  VI levels = table_of(table), low = _mm256_set1_epi8(15);
  for (int64_t i = 0; i < n; i += 32) {
    VI b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(p + i / 2)));
    b = _mm256_and_si256(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), low);
    _mm256_storeu_si256((void *)(to + i), _mm256_shuffle_epi8(levels, b));
  }
}
INL void unpack3(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  const VI place = _mm256_setr_epi8(0, 1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 7, 8, -1, -1, 9, 10, -1, -1, 10, 11, -1, -1);
  VI levels = table_of(table), shift = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
  VI even = _mm256_set1_epi32(0x00070007), odd = _mm256_set1_epi32(0x07000700);
  for (int64_t i = 0; i < n; i += 32, p += 12) { /* 12 bits, four codes, to each of eight 32-bit words */
    VI b = _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p)), place), shift);
    b = _mm256_and_si256(b, _mm256_set1_epi32(0xfff)); /* codes 0, 2 in bits 0, 6 and 1, 3 in bits 3, 9 */
    VI low = _mm256_and_si256(b, _mm256_set1_epi32(0x3f)), high = _mm256_slli_epi32(_mm256_srli_epi32(b, 6), 16), two = _mm256_or_si256(low, high);
    b = _mm256_or_si256(_mm256_and_si256(two, even), _mm256_and_si256(_mm256_slli_epi32(two, 5), odd));
    _mm256_storeu_si256((void *)(to + i), _mm256_shuffle_epi8(levels, b));
  }
}
INL void unpack2(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  VI levels = table_of(table), low = _mm256_set1_epi8(3);
  for (int64_t i = 0; i < n; i += 32) {
    VI b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p + i / 4)));
    b = _mm256_or_si256(_mm256_or_si256(b, _mm256_slli_epi32(b, 6)), _mm256_or_si256(_mm256_slli_epi32(b, 12), _mm256_slli_epi32(b, 18)));
    _mm256_storeu_si256((void *)(to + i), _mm256_shuffle_epi8(levels, _mm256_and_si256(b, low)));
  }
}
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
#define WIDE4 0
#include "spread.h"
INL int order_of(int way) { return way == BUFFERED ? 0 : way <= MASKED_CODES ? 1 : way == DENSE8 || way == DENSE2 ? 4 : 8; }
INL int columns_of(int way) { return way == DENSE4 || way == DENSE3 ? 64 : 32; }
INL float factor_of(int way) { return way == MASKED16 || way >= DENSE3 ? 1 : 0x1p-24f; }

typedef struct { VI bytes; VF floats; } levels;
INL levels levels_of(int way, const matrix *m) {
  levels t = {_mm256_setzero_si256(), v_zero()};
  if (way == DENSE4) t.bytes = _mm256_xor_si256(table_of(m->narrow), _mm256_set1_epi8((char)SAME));
  if (way >= DENSE3) {
    float f[8];
    for (int k = 0; k < 8; k++) f[k] = level_of(m, way == DENSE2 ? k & 3 : k);
    t.floats = _mm256_loadu_ps(f);
  }
  return t;
}

/* 32 signed bytes: each in turn to the top of its int32. */
INL VF dot_upper(VI v, const float *x, int64_t apart, VF s) {
  const VI second = _mm256_setr_epi8(-1, -1, -1, 1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13, -1, -1, -1, 1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13);
  const VI third = _mm256_setr_epi8(-1, -1, -1, 2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14, -1, -1, -1, 2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14);
  s = v_fma(_mm256_cvtepi32_ps(_mm256_slli_epi32(v, 24)), _mm256_loadu_ps(x), s);
  s = v_fma(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, second)), _mm256_loadu_ps(x + apart), s);
  s = v_fma(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, third)), _mm256_loadu_ps(x + 2 * apart), s);
  return v_fma(_mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xff000000))), _mm256_loadu_ps(x + 3 * apart), s);
}
INL VF step_dense8(cursor *a, const float *x, VF s) {
  VI v = _mm256_xor_si256(_mm256_loadu_si256((const void *)a->at), _mm256_set1_epi8((char)SAME));
  a->at += 32;
  return dot_upper(v, x, 8, s);
}
INL VF step_dense4(cursor *a, const float *x, VI bytes, VF s) { /* even nibbles of each int32, then odd ones */
  const VI low = _mm256_set1_epi8(15);
  VI v = _mm256_loadu_si256((const void *)a->at);
  a->at += 32;
  s = dot_upper(_mm256_shuffle_epi8(bytes, _mm256_and_si256(v, low)), x, 16, s);
  return dot_upper(_mm256_shuffle_epi8(bytes, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)), x + 8, 16, s);
}
INL VF step_dense3(cursor *a, const float *x, VF floats, VF s) { /* 24 bits, eight codes, to each int32 */
  const VI place = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  VI v = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)a->at)), _mm_loadu_si128((const void *)(a->at + 12)), 1);
  v = _mm256_shuffle_epi8(v, place);
  a->at += 24;
#pragma GCC unroll 8
  for (int n = 0; n < 8; n++) s = v_fma(_mm256_permutevar8x32_ps(floats, _mm256_srli_epi32(v, 3 * n)), _mm256_loadu_ps(x + 8 * n), s);
  return s;
}
INL VF step_dense2(cursor *a, const float *x, VF floats, VF s) {
  VI v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)a->at));
  a->at += 8;
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) s = v_fma(_mm256_permutevar_ps(floats, _mm256_srli_epi32(v, 2 * n)), _mm256_loadu_ps(x + 8 * n), s);
  return s;
}
INL VF step(int way, cursor *a, const float *x, const levels *t, VF s) {
  switch (way) {
    case DENSE8: return step_dense8(a, x, s);
    case DENSE4: return step_dense4(a, x, t->bytes, s);
    case DENSE3: return step_dense3(a, x, t->floats, s);
    case DENSE2: return step_dense2(a, x, t->floats, s);
    default: return spread_dot(way, a, x, s);
  }
}

#include "rows.h"
const path path_avx2 = {product, decode, order, W};
#else
const path path_avx2 = {0};
#endif

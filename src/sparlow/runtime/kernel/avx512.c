/* AVX-512 with BW, VL, VBMI, VBMI2 and VNNI: Ice Lake and Zen 4 on.

     unpack      as AVX2, twice as wide; three bits by vpermb and vpmultishiftqb
     spread      vpexpandb, vpexpandw, vpexpandd: bit j of mask byte b is column 8b + j, the order that they want
     v_block     vpdpbusd of level + 128 and x; what 128 adds is taken off, lane by lane, by where the sums begin: exact */
#include "sparlow.h"
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#define W 16
typedef __m512 VF;
typedef __m512i VI;

INL VF v_zero(void) { return _mm512_setzero_ps(); }
INL VF v_set(float f) { return _mm512_set1_ps(f); }
INL VF v_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INL VF v_add(VF a, VF b) { return _mm512_add_ps(a, b); }
INL float v_sum(VF a) { return _mm512_reduce_add_ps(a); }
INL VF v_load(int format, const void *w, int64_t c) {
  if (format == F_FP32) return _mm512_loadu_ps((const float *)w + c);
  if (format == F_BF16)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const uint16_t *)w + c))), 16));
  if (format == F_FP16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)w + c)));
  __m128i b = _mm_loadu_si128((const void *)((const uint8_t *)w + c));
  if (format == F_U8) b = _mm_xor_si128(b, _mm_set1_epi8((char)SAME));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
}
INL VF v_block(const uint8_t *w, const int8_t *xq, const int32_t *xc) {
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(xc), _mm512_loadu_si512(w), _mm512_loadu_si512(xq)));
}

INL VI table_of(const uint8_t *table) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)); }
INL void unpack4(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  VI levels = table_of(table), low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < n; i += 64) {
    VI b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(p + i / 2)));
    b = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi16(b, 4)), low);
    _mm512_storeu_si512(to + i, _mm512_shuffle_epi8(levels, b));
  }
}
INL void unpack3(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  uint8_t at[64];
  for (int k = 0; k < 64; k++) at[k] = (uint8_t)(k % 8 < 3 ? 3 * (k / 8) + k % 8 : 24); /* three bytes to each eight */
  VI levels = table_of(table), low = _mm512_set1_epi8(7), place = _mm512_loadu_si512(at);
  VI shift = _mm512_set1_epi64(0x15120f0c09060300);
  for (int64_t i = 0; i < n; i += 64, p += 24) {
    VI b = _mm512_permutexvar_epi8(place, _mm512_castsi256_si512(_mm256_loadu_si256((const void *)p)));
    b = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, b), low);
    _mm512_storeu_si512(to + i, _mm512_shuffle_epi8(levels, b));
  }
}
INL void unpack2(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  VI levels = table_of(table), low = _mm512_set1_epi8(3);
  for (int64_t i = 0; i < n; i += 64) {
    VI b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(p + i / 4)));
    b = _mm512_or_si512(_mm512_or_si512(b, _mm512_slli_epi32(b, 6)), _mm512_or_si512(_mm512_slli_epi32(b, 12), _mm512_slli_epi32(b, 18)));
    _mm512_storeu_si512(to + i, _mm512_shuffle_epi8(levels, _mm512_and_si512(b, low)));
  }
}
INL void wide16(const uint8_t *codes, int64_t n, const uint16_t *table, uint16_t *to) {
  VI levels = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)table));
  for (int64_t i = 0; i < n; i += 32) {
    VI c = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(codes + i)));
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(c, levels));
  }
}
INL void spread8(const uint8_t *p, const uint8_t *mask, int64_t cols, uint8_t *to) {
  const VI same = _mm512_set1_epi8((char)SAME);
  for (int64_t c = 0; c < cols; c += 64) {
    uint64_t k = mask_word(mask, c, cols);
    _mm512_storeu_si512(to + c, _mm512_mask_expand_epi8(same, k, _mm512_loadu_si512(p)));
    p += __builtin_popcountll(k);
  }
}
INL void spread16(const uint16_t *p, const uint8_t *mask, int64_t cols, uint16_t *to) {
  for (int64_t c = 0; c < cols; c += 64) {
    uint64_t k = mask_word(mask, c, cols);
    _mm512_storeu_si512(to + c, _mm512_maskz_expand_epi16((uint32_t)k, _mm512_loadu_si512(p)));
    p += __builtin_popcount((uint32_t)k);
    _mm512_storeu_si512(to + c + 32, _mm512_maskz_expand_epi16((uint32_t)(k >> 32), _mm512_loadu_si512(p)));
    p += __builtin_popcount((uint32_t)(k >> 32));
  }
}
INL void spread32(const float *p, const uint8_t *mask, int64_t cols, float *to) {
  for (int64_t c = 0; c < cols; c += 64) {
    uint64_t k = mask_word(mask, c, cols);
    for (int i = 0; i < 4; i++, k >>= 16) {
      _mm512_storeu_ps(to + c + 16 * i, _mm512_maskz_expand_ps((uint16_t)k, _mm512_loadu_ps(p)));
      p += __builtin_popcount((uint16_t)k);
    }
  }
}

#include "rows.h"
const path path_avx512 = {product, decode, order, W};
#else
const path path_avx512 = {0};
#endif

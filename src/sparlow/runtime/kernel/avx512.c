/* AVX-512 with BW, VL, VBMI, VBMI2 and VNNI: Ice Lake and Zen 4 on.

     unpack      as AVX2, twice as wide; three bits by vpermb and vpmultishiftqb
     spread      vpexpandb, vpexpandw, vpexpandd: bit j of mask byte b is column 8b + j, the order that they want
     v_block     vpdpbusd of level + 128 and x; what 128 adds is taken off, lane by lane: exact */
#include "sparlow.h"
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
#include "sums.h"

#define W 16
typedef __m512 VF;
typedef __m512i VI;

INL VF v_zero(void) { return _mm512_setzero_ps(); }
INL VF v_set(float f) { return _mm512_set1_ps(f); }
INL VF v_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INL VF v_add(VF a, VF b) { return _mm512_add_ps(a, b); }
INL __m128 lanes_of(VF a) { return folded(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
INL float v_sum(VF a) { return sum_of(lanes_of(a)); }
INL void v_sums(const VF *a, float *to) { _mm_storeu_ps(to, sums_of(lanes_of(a[0]), lanes_of(a[1]), lanes_of(a[2]), lanes_of(a[3]))); }
INL void v_put_bf16(uint16_t *to, VF v) {
  VI u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((void *)to, _mm512_cvtepi32_epi16(u));
}
INL VF v_load(int format, const void *w, int64_t c) {
  if (format == F_FP32) return _mm512_loadu_ps((const float *)w + c);
  if (format == F_BF16)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const uint16_t *)w + c))), 16));
  if (format == F_FP16) return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)w + c)));
  __m128i b = _mm_loadu_si128((const void *)((const uint8_t *)w + c));
  if (format == F_U8) b = _mm_xor_si128(b, _mm_set1_epi8((char)SAME));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
}
INL VF v_block(const uint8_t *w, const int8_t *xq, const float *xs) {
  VI x = _mm512_loadu_si512(xq), none = _mm512_setzero_si512(), more = _mm512_dpbusd_epi32(none, _mm512_set1_epi8((char)SAME), x);
  VI s = _mm512_sub_epi32(_mm512_dpbusd_epi32(none, _mm512_loadu_si512(w), x), more);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(s), _mm512_broadcast_f32x8(_mm256_loadu_ps(xs)));
}

INL VI table_of(const uint8_t *table) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)); }
/* 64 codes, a byte each. */
INL VI codes4(const uint8_t *p) {
  VI b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)p));
  return _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi16(b, 4)), _mm512_set1_epi8(15));
}
#define EIGHT(k) 3 * (k), 3 * (k) + 1, 3 * (k) + 2, 24, 24, 24, 24, 24
static const uint8_t eights[64] = {EIGHT(0), EIGHT(1), EIGHT(2), EIGHT(3), EIGHT(4), EIGHT(5), EIGHT(6), EIGHT(7)};
INL VI codes3(const uint8_t *p) { /* three bytes to each eight */
  VI b = _mm512_permutexvar_epi8(_mm512_loadu_si512(eights), _mm512_castsi256_si512(_mm256_loadu_si256((const void *)p)));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x15120f0c09060300), b), _mm512_set1_epi8(7));
}
INL VI codes2(const uint8_t *p) {
  VI b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
  b = _mm512_or_si512(_mm512_or_si512(b, _mm512_slli_epi32(b, 6)), _mm512_or_si512(_mm512_slli_epi32(b, 12), _mm512_slli_epi32(b, 18)));
  return _mm512_and_si512(b, _mm512_set1_epi8(3));
}
#define UNPACK(bits)                                                                                    \
  INL void unpack##bits(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {              \
    VI levels = table_of(table);                                                                        \
    for (int64_t i = 0; i < n; i += 64)                                                                 \
      _mm512_storeu_si512(to + i, _mm512_shuffle_epi8(levels, codes##bits(p + i * bits / 8)));           \
  }
UNPACK(4)
UNPACK(3)
UNPACK(2)
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

/* ---- One token in registers (see stream.h) */
#define STREAMS
#define WIDE_BITS 4
#define PAIRS 0
#include "spread.h"
INL int order_of(int way) {
  if (way > ROUNDED) return way == R_DENSE4 || way == R_BOOK4 ? EVEN_ODD : AS_IT_IS;
  return way == BUFFERED ? 0 : way == MASKED16 ? 2 : way == MASKED_HALF ? 1 : way == DENSE4 || way == DENSE3 ? 8 : 4;
}
INL int columns_of(int way) { return way == DENSE4 || way == DENSE3 ? 128 : 64; }
INL int shifted(int way) { return way == R_DENSE4; }
INL VF v_first(float f) { return _mm512_zextps128_ps512(_mm_set_ss(f)); }

typedef struct { VI bytes; VF floats; float factor, shift; } levels;
INL levels levels_of(int way, const matrix *m) {
  levels t = {.bytes = _mm512_setzero_si512(), .floats = v_zero(), .factor = 1, .shift = 0};
  if (way == MASKED8 || way == MASKED_CODES || way == DENSE8) t.factor = 0x1p-24f; /* see dot_upper */
  if (way == R_DENSE4) t.factor = m->narrow[1] - m->narrow[0], t.shift = (m->narrow[0] - 128) / t.factor;
  if (way == R_BOOK4 || way == R_DENSE3 || way == R_DENSE2) t.bytes = table_of(m->narrow);
  if (way == DENSE4 || way == DENSE3 || way == DENSE2) {
    float f[16];
    for (int k = 0; k < 16; k++) f[k] = level_of(m, way == DENSE4 ? k : way == DENSE3 ? k & 7 : k & 3);
    t.floats = _mm512_loadu_ps(f);
  }
  return t;
}
INL uint64_t next_mask(cursor *a) {
  uint64_t k;
  memcpy(&k, a->mask, 8);
  a->mask += 8;
  return k;
}
INL void add_product(VF w, floats x, int64_t on, int T, VF *s) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) s[t] = v_fma(w, _mm512_loadu_ps(x.at + on + t * x.apart), s[t]);
}
/* 32 columns twice, of which the even ones come first: a bf16 is the upper half of a float. */
INL void step_bf16(cursor *a, floats x, int T, VF *s) {
#pragma GCC unroll 2
  for (int n = 0; n < 64; n += 32, a->mask += 4) {
    uint32_t k;
    memcpy(&k, a->mask, 4);
    VI v = _mm512_loadu_si512(a->at);
    __asm__("" : "+v"(v)); /* or vpexpandw reads memory itself */
    v = _mm512_maskz_expand_epi16(k, v);
    add_product(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), x, n, T, s);
    add_product(_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000))), x, n + 16, T, s);
    a->at += 2 * __builtin_popcount(k);
  }
}
/* On Zen 4, vpexpandw and vcvtph2ps of 16 numbers take twice as long as the tables of AVX2. */
INL void step_fp16(cursor *a, floats x, int T, VF *s) {
  __m256 low[4];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) low[t] = _mm512_castps512_ps256(s[t]);
  spread_dot(MASKED_HALF, a, x, T, low);
  x.at += 32;
  spread_dot(MASKED_HALF, a, x, T, low);
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) s[t] = _mm512_zextps256_ps512(low[t]);
}
/* 64 signed bytes: each in turn to the top of its int32, which is 2^24 times as much. */
INL void dot_upper(VI v, floats x, int T, VF *s) {
  const VI second = _mm512_set4_epi32(0x0dffffff, 0x09ffffff, 0x05ffffff, 0x01ffffff), third = _mm512_set4_epi32(0x0effffff, 0x0affffff, 0x06ffffff, 0x02ffffff);
  add_product(_mm512_cvtepi32_ps(_mm512_slli_epi32(v, 24)), x, 0, T, s);
  add_product(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(v, second)), x, 16, T, s);
  add_product(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(v, third)), x, 32, T, s);
  add_product(_mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xff000000))), x, 48, T, s);
}
INL void step_bytes(int way, cursor *a, floats x, int T, VF *s) {
  VI v = _mm512_loadu_si512(a->at);
  if (way != MASKED_CODES) v = _mm512_xor_si512(v, _mm512_set1_epi8((char)SAME));
  uint64_t k = way == DENSE8 ? ~0ull : next_mask(a);
  a->at += way == DENSE8 ? 64 : __builtin_popcountll(k);
  dot_upper(way == DENSE8 ? v : _mm512_maskz_expand_epi8(k, v), x, T, s);
}
/* Codes in turn to the lowest bits of their int32, where a permutation of 16 floats finds their levels. */
INL void dot_codes(int bits, int codes, VI v, floats x, int T, VF levels, VF *s) {
#pragma GCC unroll 8
  for (int n = 0; n < codes; n++) add_product(_mm512_permutexvar_ps(_mm512_srli_epi32(v, bits * n), levels), x, 16 * n, T, s);
}
#define FOUR(k) 3 * (k), 3 * (k) + 1, 3 * (k) + 2, 63
static const uint8_t fours[64] = {FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)};
INL VI three_of_four(const uint8_t *p) { /* 24 bits to each int32 */
  return _mm512_permutexvar_epi8(_mm512_loadu_si512(fours), _mm512_loadu_si512(p));
}
INL void step(int way, cursor *a, floats x, int T, const levels *t, VF *s) {
  const uint8_t *p = a->at;
  switch (way) {
    case DENSE4: a->at += 64; dot_codes(4, 8, _mm512_loadu_si512(p), x, T, t->floats, s); break;
    case DENSE3: a->at += 48; dot_codes(3, 8, three_of_four(p), x, T, t->floats, s); break;
    case DENSE2: a->at += 16; dot_codes(2, 4, _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)), x, T, t->floats, s); break;
    case MASKED16: step_bf16(a, x, T, s); break;
    case MASKED_HALF: step_fp16(a, x, T, s); break;
    default: step_bytes(way, a, x, T, s);
  }
}

INL VI rounded_bytes(int way, cursor *a, const levels *t) { /* 64 bytes that stand for level + 128 */
  const VI same = _mm512_set1_epi8((char)SAME);
  const uint8_t *p = a->at;
  if (way == R_DENSE3) return a->at += 24, _mm512_shuffle_epi8(t->bytes, codes3(p));
  if (way == R_DENSE2) return a->at += 16, _mm512_shuffle_epi8(t->bytes, codes2(p));
  VI v = _mm512_loadu_si512(p);
  if (way == R_DENSE8) return a->at += 64, v;
  if (way == R_MASKED_CODES) v = _mm512_xor_si512(v, same);
  uint64_t k = next_mask(a);
  a->at += __builtin_popcountll(k);
  return _mm512_mask_expand_epi8(same, k, v);
}
/* vpdpbusd wants one side without signs: level + 128, whose 128 are taken off exactly, or a code of 4 bits itself. */
INL void step_rounded(int way, cursor *a, bytes x, floats xs, int T, const levels *t, VF *found) {
  VI first, second;
  if (way == R_DENSE4 || way == R_BOOK4) {
    VI v = _mm512_loadu_si512(a->at);
    a->at += 64;
    first = _mm512_and_si512(v, _mm512_set1_epi8(15)), second = _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
    if (way == R_BOOK4) first = _mm512_shuffle_epi8(t->bytes, first), second = _mm512_shuffle_epi8(t->bytes, second);
  } else first = rounded_bytes(way, a, t), second = rounded_bytes(way, a, t);
#pragma GCC unroll 4
  for (int k = 0; k < T; k++) {
    const int8_t *at = x.at + 4 * k * x.apart;
    VI s = _mm512_setzero_si512();
    const float *by = xs.at + k * xs.apart;
    if (way != R_DENSE4) s = _mm512_loadu_si512(x.sums + 4 * k * x.apart);
    s = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(s, first, _mm512_loadu_si512(at)), second, _mm512_loadu_si512(at + 64));
    VF scales = way == R_DENSE4 || way == R_BOOK4 ? _mm512_broadcast_f32x4(_mm_loadu_ps(by)) : _mm512_broadcast_f32x8(_mm256_loadu_ps(by + FINE));
    found[k] = _mm512_mul_ps(_mm512_cvtepi32_ps(s), scales);
  }
}

#include "rows.h"
const path path_avx512 = {product, decode, decode_bf16, order, round_inputs, lay_out_bytes, W};
#else
const path path_avx512 = {0};
#endif

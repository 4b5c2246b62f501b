/* NEON, which every 64-bit ARM has; dotprod.c is the same with SDOT.

     unpack      zips and shifts; tbl as the table of levels
     spread8/16  8 columns a mask byte: tbl by a table of 256 controls
     spread      the same to float32 at once: a bf16 is its upper half, an int8 the uppermost byte of an int32
     v_block     SDOT, or smull and sums of neighbours */
#include "sparlow.h"
#ifndef NAME
#define NAME path_neon
#endif
#if defined(__aarch64__) && defined(__ARM_NEON) && (defined(__ARM_FEATURE_DOTPROD) || !defined(NEEDS_SDOT))
#include <arm_neon.h>

#define W 4
typedef float32x4_t VF;
typedef uint8x16_t VI;

INL VF v_zero(void) { return vdupq_n_f32(0); }
INL VF v_set(float f) { return vdupq_n_f32(f); }
INL VF v_fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
INL VF v_add(VF a, VF b) { return vaddq_f32(a, b); }
INL float v_sum(VF a) { return vaddvq_f32(a); }
INL void v_sums(const VF *a, float *to) { vst1q_f32(to, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3]))); }
INL void v_put_bf16(uint16_t *to, VF v) {
  uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  u = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  vst1_u16(to, vmovn_u32(vbslq_u32(vceqq_f32(v, v), u, vdupq_n_u32(0x7fc0))));
}
INL VI same(void) { return vdupq_n_u8(SAME); }
INL VF v_load(int format, const void *w, int64_t c) {
  if (format == F_FP32) return vld1q_f32((const float *)w + c);
  if (format == F_BF16) return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)w + c), 16));
  if (format == F_FP16) return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)w + c)));
  uint32_t four;
  memcpy(&four, (const uint8_t *)w + c, 4);
  if (format == F_U8) four ^= 0x80808080;
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}
/* 16 products of signed bytes, four to a lane. */
INL int32x4_t dot16(int32x4_t s, VI w, const int8_t *x) {
  int8x16_t a = vreinterpretq_s8_u8(w), b = vld1q_s8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(s, a, b);
#else
  int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
  return vaddq_s32(s, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
/* Two sums of four lanes times their scales: of columns with the scales 0 and 1, and with 2 and 3. */
INL VF with_scales(const int32x4_t *s, const float *xs) {
  return vfmaq_f32(vmulq_f32(vcvtq_f32_s32(s[0]), vld1q_f32(xs)), vcvtq_f32_s32(s[1]), vld1q_f32(xs + 4));
}
INL VF v_block(const uint8_t *w, const int8_t *xq, const float *xs) {
  int32x4_t s[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) s[k & 1] = dot16(s[k & 1], veorq_u8(vld1q_u8(w + 16 * k), same()), xq + 16 * k);
  return with_scales(s, xs);
}

/* 16 codes, a byte each. */
INL VI codes4(const uint8_t *p) {
  uint8x8_t v = vld1_u8(p), low = vand_u8(v, vdup_n_u8(15)), high = vshr_n_u8(v, 4);
  return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
}
INL VI codes3(const uint8_t *p) { /* the two bytes around each code to 16 bits */
  const uint8_t first[16] = {0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3}, second[16] = {3, 4, 3, 4, 3, 4, 4, 5, 4, 5, 4, 5, 5, 6, 5, 6};
  const int16_t shift[8] = {0, -3, -6, -1, -4, -7, -2, -5};
  VI v = vld1q_u8(p);
  uint16x8_t a = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(v, vld1q_u8(first))), vld1q_s16(shift));
  uint16x8_t b = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(v, vld1q_u8(second))), vld1q_s16(shift));
  return vandq_u8(vcombine_u8(vmovn_u16(a), vmovn_u16(b)), vdupq_n_u8(7));
}
INL VI codes2(const uint8_t *p) { /* each of four bytes to four */
  const uint8_t place[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const int8_t shift[16] = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
  uint32_t four;
  memcpy(&four, p, 4);
  VI v = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), vld1q_u8(place));
  return vandq_u8(vshlq_u8(v, vld1q_s8(shift)), vdupq_n_u8(3));
}
#define UNPACK(bits)                                                                                                 \
  INL void unpack##bits(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {                           \
    VI levels = vld1q_u8(table);                                                                                     \
    for (int64_t i = 0; i < n; i += 16) vst1q_u8(to + i, vqtbl1q_u8(levels, codes##bits(p + i * bits / 8)));         \
  }
UNPACK(4)
UNPACK(3)
UNPACK(2)
INL void wide16(const uint8_t *codes, int64_t n, const uint16_t *table, uint16_t *to) {
  for (int64_t i = 0; i < n; i++) to[i] = table[codes[i]];
}

static uint8_t by8[256][8] __attribute__((aligned(64))), by16[256][16] __attribute__((aligned(64))), kept_of[256];
__attribute__((constructor)) static void fill_tables(void) {
  memset(by8, 128, sizeof by8), memset(by16, 128, sizeof by16);
  for (int m = 0; m < 256; m++)
    for (int k = 0; k < 8; k++)
      if (m >> k & 1) {
        by16[m][2 * k] = (uint8_t)(2 * kept_of[m]), by16[m][2 * k + 1] = (uint8_t)(2 * kept_of[m] + 1);
        by8[m][k] = kept_of[m]++;
      }
}
INL unsigned mask_byte(const uint8_t *mask, int64_t c, int64_t cols) {
  unsigned b = mask[c / 8];
  return cols - c < 8 ? b & ((1u << (cols - c)) - 1) : b;
}
INL void spread8(const uint8_t *p, const uint8_t *mask, int64_t cols, uint8_t *to) {
  for (int64_t c = 0; c < cols; c += 8) {
    unsigned b = mask_byte(mask, c, cols);
    vst1_u8(to + c, veor_u8(vdup_n_u8(SAME), vqtbl1_u8(veorq_u8(vcombine_u8(vld1_u8(p), vdup_n_u8(0)), same()), vld1_u8(by8[b]))));
    p += kept_of[b];
  }
}
INL void spread16(const uint16_t *p, const uint8_t *mask, int64_t cols, uint16_t *to) {
  for (int64_t c = 0; c < cols; c += 8) {
    unsigned b = mask_byte(mask, c, cols);
    vst1q_u8((uint8_t *)(to + c), vqtbl1q_u8(vld1q_u8((const uint8_t *)p), vld1q_u8(by16[b])));
    p += kept_of[b];
  }
}
INL void spread32(const float *p, const uint8_t *mask, int64_t cols, float *to) {
  for (int64_t c = 0; c < cols; c++) to[c] = mask[c / 8] >> (c & 7) & 1 ? *p++ : 0;
}

/* ---- One token in registers (see stream.h) */
#define STREAMS
#define WIDE_BITS 0
#define PAIRS 0
#include "spread.h"
INL int order_of(int way) { return way > ROUNDED ? AS_IT_IS : way != BUFFERED; }
INL int columns_of(int way) { return way < DENSE8 ? 32 : 16; }
INL int shifted(int way) { return (void)way, 0; }
INL VF v_first(float f) { return vsetq_lane_f32(f, v_zero(), 0); }

typedef struct { VI bytes; float factor, shift; } levels;
INL levels levels_of(int way, const matrix *m) {
  levels t = {.bytes = vdupq_n_u8(0), .factor = 1, .shift = 0};
  if (way == DENSE4 || way == DENSE3 || way == DENSE2 || way == R_DENSE4 || way == R_BOOK4 || way == R_DENSE3 || way == R_DENSE2) t.bytes = veorq_u8(vld1q_u8(m->narrow), same());
  return t;
}
INL VF spread_upper(int way, VI v, const uint8_t *table) {
  VI upper = vqtbl1q_u8(v, vld1q_u8(table));
  return way == MASKED16 ? vreinterpretq_f32_u8(upper) : vcvtq_n_f32_s32(vreinterpretq_s32_u8(upper), 24);
}
INL void add_product(VF w, floats x, int64_t on, int T, VF *s) {
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) s[t] = v_fma(w, vld1q_f32(x.at + on + t * x.apart), s[t]);
}
INL void step_masked(int way, cursor *a, floats x, int T, VF *s) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    unsigned b = *a->mask++;
    const uint8_t *table = way == MASKED_HALF ? halves16[b] : way == MASKED16 ? upper16[b] : upper8[b];
    VI v = in_halves(way) ? vld1q_u8(a->at) : vcombine_u8(vld1_u8(a->at), vdup_n_u8(0));
    if (way == MASKED8) v = veorq_u8(v, same());
    if (way == MASKED_HALF) {
      float16x8_t h = vreinterpretq_f16_u8(vqtbl1q_u8(v, vld1q_u8(table)));
      add_product(vcvt_f32_f16(vget_low_f16(h)), x, 8 * k, T, s);
      add_product(vcvt_f32_f16(vget_high_f16(h)), x, 8 * k + 4, T, s);
    } else {
      add_product(spread_upper(way, v, table), x, 8 * k, T, s);
      add_product(spread_upper(way, v, table + 16), x, 8 * k + 4, T, s);
    }
    a->at += (in_halves(way) ? 2 : 1) * kept_of[b];
  }
}
/* 16 signed bytes of dense codes. */
INL VI next_dense(int way, cursor *a, VI bytes) {
  const uint8_t *p = a->at;
  switch (way) {
    case DENSE4: case R_DENSE4: case R_BOOK4: return a->at += 8, vqtbl1q_u8(bytes, codes4(p));
    case DENSE3: case R_DENSE3: return a->at += 6, vqtbl1q_u8(bytes, codes3(p));
    case DENSE2: case R_DENSE2: return a->at += 4, vqtbl1q_u8(bytes, codes2(p));
    default: return a->at += 16, veorq_u8(vld1q_u8(p), same());
  }
}
INL void step(int way, cursor *a, floats x, int T, const levels *t, VF *s) {
  if (way < DENSE8) {
    step_masked(way, a, x, T, s);
    return;
  }
  int8x16_t v = vreinterpretq_s8_u8(next_dense(way, a, t->bytes));
  int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
  add_product(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), x, 0, T, s);
  add_product(vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))), x, 4, T, s);
  add_product(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), x, 8, T, s);
  add_product(vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))), x, 12, T, s);
}
/* 16 columns of masked bytes; what is not kept stays out of the table's range. */
INL VI next_masked(int way, cursor *a) {
  unsigned b = a->mask[0], c = a->mask[1];
  VI v = vld1q_u8(a->at), at = vcombine_u8(vld1_u8(by8[b]), vadd_u8(vld1_u8(by8[c]), vdup_n_u8(kept_of[b])));
  a->at += kept_of[b] + kept_of[c], a->mask += 2;
  return vqtbl1q_u8(way == R_MASKED8 ? veorq_u8(v, same()) : v, at);
}
INL void step_rounded(int way, cursor *a, bytes x, floats xs, int T, const levels *t, VF *found) {
  int32x4_t s[4][2];
#pragma GCC unroll 4
  for (int k = 0; k < T; k++) s[k][0] = s[k][1] = vdupq_n_s32(0);
#pragma GCC unroll 8
  for (int c = 0; c < X_GROUP / 16; c++) {
    VI w = way < R_MASKED8 ? next_dense(way, a, t->bytes) : next_masked(way, a);
#pragma GCC unroll 4
    for (int k = 0; k < T; k++) s[k][c & 1] = dot16(s[k][c & 1], w, x.at + 16 * c + 4 * k * x.apart);
  }
#pragma GCC unroll 4
  for (int k = 0; k < T; k++) found[k] = with_scales(s[k], xs.at + k * xs.apart + FINE);
}

#include "rows.h"
const path NAME = {product, decode, decode_bf16, order, round_inputs, lay_out_bytes, W};
#else
const path NAME = {0};
#endif

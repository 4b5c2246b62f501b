/* Portable C with vectors of four floats, which the compiler turns into what the processor has (SSE2, NEON, or loops). */
#include "sparlow.h"

#define W 4
typedef float VF __attribute__((vector_size(16)));

INL VF v_zero(void) { return (VF){0, 0, 0, 0}; }
INL VF v_set(float f) { return (VF){f, f, f, f}; }
INL VF v_fma(VF a, VF b, VF c) { return a * b + c; }
INL VF v_add(VF a, VF b) { return a + b; }
INL float v_sum(VF a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INL void v_sums(const VF *a, float *to) { for (int k = 0; k < 4; k++) to[k] = v_sum(a[k]); }
INL void v_put_bf16(uint16_t *to, VF v) { for (int k = 0; k < W; k++) to[k] = to_bf16(v[k]); }
INL VF v_load(int format, const void *w, int64_t c) {
  return (VF){one(format, w, c), one(format, w, c + 1), one(format, w, c + 2), one(format, w, c + 3)};
}
INL VF v_block(const uint8_t *w, const int8_t *xq, const float *xs) {
  int32_t s[FINE] = {0, 0, 0, 0};
  for (int k = 0; k < BLOCK; k++) s[k / 8 % FINE] += ((int)w[k] - 128) * xq[k];
  return (VF){(float)s[0] * xs[0], (float)s[1] * xs[2], (float)s[2] * xs[4], (float)s[3] * xs[6]};
}

INL void unpack4(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  for (int64_t i = 0; i < n; i++) to[i] = table[p[i / 2] >> 4 * (i & 1) & 15];
}
INL void unpack3(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  for (int64_t i = 0; i < n; i += 8, p += 3) {
    uint32_t u = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16;
    for (int k = 0; k < 8; k++) to[i + k] = table[u >> 3 * k & 7];
  }
}
INL void unpack2(const uint8_t *p, int64_t n, const uint8_t *table, uint8_t *to) {
  for (int64_t i = 0; i < n; i++) to[i] = table[p[i / 4] >> 2 * (i & 3) & 3];
}
INL void wide16(const uint8_t *codes, int64_t n, const uint16_t *table, uint16_t *to) {
  for (int64_t i = 0; i < n; i++) to[i] = table[codes[i]];
}
#define SPREAD(name, type, none)                                                                        \
  INL void name(const type *p, const uint8_t *mask, int64_t cols, type *to) {                           \
    for (int64_t c = 0; c < cols; c++) to[c] = mask[c / 8] >> (c & 7) & 1 ? *p++ : (type)none;          \
  }
SPREAD(spread8, uint8_t, SAME)
SPREAD(spread16, uint16_t, 0)
SPREAD(spread32, float, 0)

#include "rows.h"
const path path_plain = {product, decode, decode_bf16, order, round_inputs, lay_out_bytes, W};

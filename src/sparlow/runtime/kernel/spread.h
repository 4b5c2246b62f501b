/* Masked values to float32 by tables: for NEON, AVX2, and AVX-512 where they are quicker. */
#include "ways.h"

/* A table of 32 bytes for each mask byte spreads and widens at once: a bf16 is the upper half of a float32, and an int8
   the uppermost byte of an int32 that is 2^24 times as much. An fp16 is spread by 16 bytes, and widened then. */
static uint8_t upper16[256][32] __attribute__((aligned(64))), upper8[256][32] __attribute__((aligned(64)));
static uint8_t halves16[256][16] __attribute__((aligned(64)));
__attribute__((constructor)) static void fill_upper(void) {
  memset(upper16, 128, sizeof upper16), memset(upper8, 128, sizeof upper8), memset(halves16, 128, sizeof halves16);
  for (int m = 0; m < 256; m++)
    for (int k = 0, kept = 0; k < 8; k++)
      if (m >> k & 1) {
        upper16[m][4 * k + 2] = (uint8_t)(2 * kept), upper16[m][4 * k + 3] = (uint8_t)(2 * kept + 1);
        halves16[m][2 * k] = (uint8_t)(2 * kept), halves16[m][2 * k + 1] = (uint8_t)(2 * kept + 1);
        upper8[m][4 * k + 3] = (uint8_t)kept++;
      }
}

#if defined(__AVX2__)
#include <immintrin.h>
INL __m256 spread_upper(int way, const uint8_t *p, uint64_t offset) { /* offset: 32 times the mask byte */
  if (way == MASKED16)
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p)), *(const __m256i *)((const uint8_t *)upper16 + offset)));
  if (way == MASKED_HALF)
    return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const void *)p), *(const __m128i *)((const uint8_t *)halves16 + offset / 2)));
  int64_t eight;
  memcpy(&eight, p, 8);
  __m256i v = _mm256_set1_epi64x(eight);
  if (way == MASKED8) v = _mm256_xor_si256(v, _mm256_set1_epi8((char)SAME));
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, *(const __m256i *)((const uint8_t *)upper8 + offset)));
}
/* Adds the products of 32 columns; a mask byte and a table at a time. */
INL void spread_dot(int way, cursor *a, floats x, int T, __m256 *s) {
  const int size = in_halves(way) ? 2 : 1;
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++, x.at += 8) {
    uint64_t offset = (uint64_t)a->mask[k] << 5; /* as many bits are set as in the byte */
    __asm__("" : "+r"(offset));                  /* or gcc widens the byte again at each use */
    __m256 w = spread_upper(way, a->at, offset);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) s[t] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.at + t * x.apart), s[t]);
    a->at += size * _mm_popcnt_u64(offset);
  }
  a->mask += 4;
}
#endif

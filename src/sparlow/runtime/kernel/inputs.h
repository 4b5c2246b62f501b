/* Inputs rounded to int8, and laid out as a path reads them; included by rows.h, so that each instruction set has its own.

   The columns of a group of X_GROUP share FINE scales: column c has that of number c / 8 % FINE, 32 columns to a scale. Sums of
   products then stay apart in lanes, whatever the width of a vector, and a scale meets them once a group; and a single large
   input makes 31 others coarser, not all that are near it. */
#include "sparlow.h"

/* x (cols), cols up to X_GROUP, in int8 with X_SCALES numbers: the scales, and then each of them twice. Returns the sum of what is
   represented. NaN and infinity make a scale NaN; below 1e-36 all is zero. */
static float round_group(const float *x, int64_t cols, int8_t *q, float *scales) {
  float v[X_GROUP] = {0}, total = 0;
  memcpy(v, x, (size_t)cols * 4);
  for (int s = 0; s < FINE; s++) {
    float most[8] = {0}, none[8] = {0}, big = 0, bad = 0;
    int sum = 0;
    for (int c = 8 * s; c < X_GROUP; c += 8 * FINE)
      for (int e = 0; e < 8; e++) {
        float size = v[c + e] < 0 ? -v[c + e] : v[c + e];
        most[e] = size > most[e] ? size : most[e], none[e] += v[c + e] * 0;
      }
    for (int e = 0; e < 8; e++) big = most[e] > big ? most[e] : big, bad += none[e];
    float per = 127 / big;
    int fine = bad == 0 && per < (float)1e38;
    if (!fine) per = 0;
    for (int c = 8 * s; c < X_GROUP; c += 8 * FINE)
      for (int e = 0; e < 8; e++) { /* 1.5 * 2^23 leaves no room for a fraction: to nearest, halves to even */
        int n = fine ? (int)(v[c + e] * per + 12582912.f - 12582912.f) : 0;
        q[c + e] = (int8_t)n, sum += n;
      }
    scales[s] = scales[FINE + 2 * s] = scales[FINE + 2 * s + 1] = fine ? big / 127 : bad == 0 ? 0 : __builtin_nanf("");
    total += scales[s] * (float)sum;
  }
  return total;
}
/* x (tokens, cols), ldx apart: q (tokens, ordered cols), scales (tokens, groups, X_SCALES), totals (tokens, groups). */
static void round_inputs(const float *x, int64_t ldx, int64_t tokens, int64_t cols, int8_t *q, float *scales, float *totals) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t c = 0; c < cols; c += X_GROUP, q += X_GROUP, scales += X_SCALES)
      *totals++ = round_group(x + t * ldx + c, cols - c < X_GROUP ? cols - c : X_GROUP, q, scales);
}

/* Rounded inputs of a token in an order; behind them what they are without their signs, and then, 32 bits each, -128 times the sums
   of what meets in each of W lanes of a group. */
static void lay_out_bytes(const int8_t *q, int64_t cols, int order, int8_t *to) {
  int64_t end = ordered(cols);
  if (order == AS_IT_IS) memcpy(to, q, (size_t)end);
  for (int64_t c = 0; order == EVEN_ODD && c < end; c += 8 * W)
    for (int k = 0; k < 4 * W; k++) to[c + k] = q[c + 2 * k], to[c + 4 * W + k] = q[c + 2 * k + 1];
  for (int64_t c = 0; order == HALVES && c < end; c += X_GROUP)
    for (int k = 0; k < 4; k++) memcpy(to + c + 32 * k, q + c + 16 * k, 16), memcpy(to + c + 32 * k + 16, q + c + 16 * k + 64, 16);
  for (int64_t i = 0; i < end; i++) to[end + i] = (int8_t)(to[i] < 0 ? -to[i] : to[i]);
  int32_t *sums = (int32_t *)(to + 2 * end);
  for (int64_t c = 0; c < end; c += X_GROUP, sums += W)
    for (int l = 0; l < W; l++) {
      int s = 0;
      for (int k = 4 * l; k < X_GROUP; k += 4 * W) s += to[c + k] + to[c + k + 1] + to[c + k + 2] + to[c + k + 3];
      sums[l] = -128 * s;
    }
}

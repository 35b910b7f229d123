// Attention of one token to all before it, for some heads of queries that share keys and values. Compiled once per
// instruction set; the loops are plain so that each makes vectors of them: sixteen sums side by side.

// e^x for x <= 0, relative error below 1e-6; exactly 0 where x is below -87, NaN for NaN. Source: e^x = 2^n e^r with
// n = round(x / log 2), e^r by its series.
WHIT_INLINE float exponential(float x) {
  const float kept = x < -87.0f ? -87.0f : x;
  const float shifted = kept * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits are n
  const float n = shifted - 12582912.0f;
  const float r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  float e = 1.0f / 720;
  e = e * r + 1.0f / 120, e = e * r + 1.0f / 24, e = e * r + 1.0f / 6, e = e * r + 0.5f, e = e * r + 1.0f, e = e * r + 1.0f;
  const float value = e * from_bits((to_bits(shifted) << 23) + 0x3f800000);
  return x < -87.0f ? 0.0f : value;
}

// n numbers (a multiple of sixteen) of a key, a value or a query as float32.
template <int TYPE>
WHIT_INLINE void widen(const void* x, int64_t at, int64_t n, float* out) {
  if constexpr (TYPE == F32) {
    memcpy(out, static_cast<const float*>(x) + at, size_t(n) * 4);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(x) + at;
    for (int64_t i = 0; i < n; i++) {
      if constexpr (TYPE == BF16) {
        out[i] = from_bf16(half[i]);
      } else {  // without a branch: a half's bits, moved to float32's places, are 2^-112 of it
        const uint32_t rest = half[i] & 0x7fff;
        const float value = from_bits(rest << 13) * 5.192296858534828e33f;
        out[i] = from_bits(to_bits(value) | uint32_t(half[i] & 0x8000) << 16 | (rest >= 0x7c00 ? 0x7f800000 : 0));
      }
    }
  }
}

// Queries first .. last of a row of the batch, which all meet head `key` of the keys. room: floats, see attend.cpp.
template <int TYPE>
void heads(const Attention& a, int64_t row, int64_t key, int64_t first, int64_t last, float* room) {
  const int64_t G = last - first, d = a.width, dv = a.value_width, n = a.n;
  const int64_t k_at = row * a.k_row + key * a.k_head, v_at = row * a.v_row + key * a.v_head;
  float *q = room, *one = q + G * d, *sums = one + (d > dv ? d : dv), *score = sums + G * dv;
  for (int64_t g = 0; g < G; g++) {
    widen<TYPE>(a.q, (row * a.heads + first + g) * d, d, q + g * d);
    for (int64_t j = 0; j < d; j++) q[g * d + j] *= a.scale;
  }
  for (int64_t t = 0; t < n; t++) {
    widen<TYPE>(a.k, k_at + t * a.k_token, d, one);
    for (int64_t g = 0; g < G; g++) {
      const float* mine = q + g * d;
      float sum[16] = {};
      for (int64_t j = 0; j < d; j += 16)
        for (int64_t l = 0; l < 16; l++) sum[l] += mine[j + l] * one[j + l];
      for (int64_t l = 0; l < 8; l++) sum[l] += sum[l + 8];
      for (int64_t l = 0; l < 4; l++) sum[l] += sum[l + 4];
      score[g * n + t] = (sum[0] + sum[2]) + (sum[1] + sum[3]) + (a.mask ? a.mask[row * n + t] : 0.0f);
    }
  }
  for (int64_t g = 0; g < G; g++) {
    float *mine = score + g * n, *sum = sums + g * dv;
    float most = -INFINITY, total[16] = {};
    for (int64_t t = 0; t < n; t++) most = mine[t] > most ? mine[t] : most;
    if (most == -INFINITY) most = 0.0f;  // nothing may be seen: all weights are 0
    for (int64_t t = 0; t < n; t++) mine[t] = exponential(mine[t] - most);
    for (int64_t t = 0; t < n; t++) total[t % 16] += mine[t];
    float all = 0.0f;
    for (int64_t l = 0; l < 16; l++) all += total[l];
    const float factor = all == 0.0f ? 0.0f : 1.0f / all;
    for (int64_t t = 0; t < n; t++) mine[t] *= factor;
    memset(sum, 0, size_t(dv) * 4);
  }
  for (int64_t t = 0; t < n; t++) {
    widen<TYPE>(a.v, v_at + t * a.v_token, dv, one);
    for (int64_t g = 0; g < G; g++) {
      const float weight = score[g * n + t];
      float* sum = sums + g * dv;
      for (int64_t j = 0; j < dv; j++) sum[j] += weight * one[j];
    }
  }
  for (int64_t g = 0; g < G; g++)
    for (int64_t j = 0; j < dv; j++) store(a.out, (row * a.heads + first + g) * dv + j, sums[g * dv + j], TYPE);
}

void heads_of(const Attention& a, int64_t row, int64_t key, int64_t first, int64_t last, float* room) {
  if (a.type == F32) return heads<F32>(a, row, key, first, last, room);
  if (a.type == BF16) return heads<BF16>(a, row, key, first, last, room);
  return heads<F16>(a, row, key, first, last, room);
}

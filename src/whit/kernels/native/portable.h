// The kernels in portable C++: what they mean. Each instruction set compiles them once more, for what it has no version of.

inline float level(const Matrix& w, int code) { return w.levels ? w.levels[code] : float(code - w.zero); }

[[maybe_unused]] void plain_tile_float(const Matrix& w, const Activations& a, int64_t tile, int64_t first, int64_t n, float* out) {
  const int64_t block = block_of(w.bits), block_bytes = block * LANES * w.bits / 8;
  for (int64_t i = 0; i < n * LANES; i++) out[i] = 0;
  const uint8_t* codes = w.codes + tile * w.row_bytes;
  for (int64_t g = 0; g < w.groups; g++) {
    float sums[MOST][LANES] = {};
    const int64_t at_params = (tile * w.groups + g) * LANES;
    for (int64_t col = g * w.group; col < (g + 1) * w.group; col += block, codes += block_bytes) {
      for (int64_t quad = 0; quad < block / 4; quad++) {
        uint8_t code[QUAD];
        unpack_quad(codes, w.bits, int(quad), code);
        for (int64_t lane = 0; lane < LANES; lane++) {
          const int zero = w.offset_kind == ZERO_POINT ? w.offset[at_params + lane] : 0;
          for (int64_t j = 0; j < 4; j++) {
            const float value = level(w, code[4 * lane + j]) - float(zero);
            for (int64_t i = 0; i < n; i++)
              sums[i][lane] += value * a.x[(first + i) * a.stride + col + 4 * quad + j];
          }
        }
      }
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t lane = 0; lane < LANES; lane++) {
        const float scale = load(w.scale, at_params + lane, w.scale_type) * w.unit;
        out[i * LANES + lane] += scale * sums[i][lane];
        if (w.offset_kind == MINIMUM)
          out[i * LANES + lane] += load(w.offset, at_params + lane, w.scale_type) * a.sums[(first + i) * w.groups + g];
      }
  }
}

[[maybe_unused]] void plain_tile_int8(const Matrix& w, const Activations& a, int64_t tile, int64_t first, int64_t n, float* out) {
  const int64_t block = block_of(w.bits), block_bytes = block * LANES * w.bits / 8;
  for (int64_t i = 0; i < n * LANES; i++) out[i] = 0;
  const uint8_t* codes = w.codes + tile * w.row_bytes;
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t at_params = (tile * w.groups + g) * LANES;
    const int64_t end = (g + 1) * w.group;
    for (int64_t from = g * w.group; from < end; from += SEGMENT) {
      const int64_t to = from + SEGMENT < end ? from + SEGMENT : end;
      int32_t sums[MOST][LANES] = {}, q_sums[MOST] = {};
      for (int64_t col = from; col < to; col += block, codes += block_bytes) {
        for (int64_t quad = 0; quad < block / 4; quad++) {
          uint8_t code[QUAD];
          unpack_quad(codes, w.bits, int(quad), code);
          for (int64_t i = 0; i < n; i++) {
            const int8_t* q = a.q + (first + i) * a.stride + col + 4 * quad;
            for (int64_t j = 0; j < 4; j++) {
              q_sums[i] += q[j];
              for (int64_t lane = 0; lane < LANES; lane++) {
                const int u = w.levels ? w.unsigned_levels[code[4 * lane + j]] : code[4 * lane + j];
                sums[i][lane] += u * q[j];
              }
            }
          }
        }
      }
      for (int64_t i = 0; i < n; i++)
        for (int64_t lane = 0; lane < LANES; lane++) {
          const int zero = w.offset_kind == ZERO_POINT ? w.offset[at_params + lane] : w.bias;
          const float scale = load(w.scale, at_params + lane, w.scale_type) * w.unit * w.factor;
          out[i * LANES + lane] += scale * float(sums[i][lane] - zero * q_sums[i]);
          if (w.offset_kind == MINIMUM)
            out[i * LANES + lane] += load(w.offset, at_params + lane, w.scale_type) * float(q_sums[i]);
        }
    }
  }
}

[[maybe_unused]] void plain_row_float(const Matrix& w, const float* x, int64_t n, int64_t row, float* out) {
  const uint8_t* codes = w.codes + row * w.row_bytes;
  const int64_t block = row_block_of(w.bits);
  const uint16_t* book = nullptr;
  float levels[256], sums[MOST][LANES] = {};
  for (int64_t col = 0; col < w.padded; col += block, codes += row_bytes_of(w.bits)) {
    uint8_t code[64];
    unpack_row(codes, w.bits, block, code);
    for (int64_t from = 0; from < block; from += LANES) {
      const uint16_t* found = book_of(w, row, col + from);
      for (int i = 0; found != book && i < 1 << w.bits; i++) levels[i] = from_f16(found[i]);
      book = found;
      for (int64_t k = 0; k < n; k++)
        for (int64_t i = 0; i < LANES; i++) sums[k][i] += levels[code[from + i]] * x[k * w.padded + col + from + i];
    }
  }
  for (int64_t k = 0; k < n; k++) {
    out[k] = 0;
    for (float each : sums[k]) out[k] += each;
  }
}

[[maybe_unused]] void plain_row_beside(const Matrix& w, const float* x, int64_t n, int64_t row, float* out) {
  float sums[MOST] = {};
  for (int64_t at = row * w.count; at < (row + 1) * w.count; at++) {
    const int64_t col = column_of(w, at);
    const float value = from_f16(w.beside[at]);
    for (int64_t k = 0; k < n; k++) sums[k] += value * x[k * w.padded + col];
  }
  for (int64_t k = 0; k < n; k++) out[k] += sums[k];
}

[[maybe_unused]] void plain_unpack(const Matrix& w, int64_t tile, uint8_t* codes) {
  const int64_t block = block_of(w.bits);
  const uint8_t* at = w.codes + tile * w.row_bytes;
  for (int64_t col = 0; col < w.padded; col += block, at += block * LANES * w.bits / 8)
    for (int64_t quad = 0; quad < block / 4; quad++) {
      uint8_t code[QUAD];
      unpack_quad(at, w.bits, int(quad), code);
      for (int64_t lane = 0; lane < LANES; lane++)
        memcpy(codes + lane * w.padded + col + 4 * quad, code + 4 * lane, 4);
    }
}

[[maybe_unused]] void plain_decode(const Matrix& w, const uint8_t* codes, int64_t tile, int64_t lane, void* out, int type) {
  if (w.books) {
    for (int64_t from = 0; from < w.cols; from += w.group) {
      const uint16_t* levels = book_of(w, tile, from);
      const int64_t end = from + w.group < w.cols ? from + w.group : w.cols;
      for (int64_t col = from; col < end; col++) store(out, col, from_f16(levels[codes[col]]), type);
    }
    return;
  }
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t at = (tile * w.groups + g) * LANES + lane;
    const float scale = load(w.scale, at, w.scale_type) * w.unit;
    const float zero = w.offset_kind == ZERO_POINT ? float(w.offset[at]) : 0.0f;
    const float minimum = w.offset_kind == MINIMUM ? load(w.offset, at, w.scale_type) : 0.0f;
    const int64_t end = (g + 1) * w.group < w.cols ? (g + 1) * w.group : w.cols;
    for (int64_t col = g * w.group; col < end; col++) {
      float value = level(w, codes[col]);
      if (w.offset_kind == ZERO_POINT) value -= zero;
      value *= scale;
      if (w.offset_kind == MINIMUM) value += minimum;
      store(out, col, value, type);
    }
  }
}

// Fixed point: q = x / scale in 24 bits, as digits of base 256 from -128 to 127.
[[maybe_unused]] void plain_fixed(const float* x, int64_t n, int8_t* digits, Places to, float* scale, int32_t* sums) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const int exponent = exponent_of(largest);
  *scale = power_of_two(exponent - 22);
  const float inverse = power_of_two(22 - exponent);
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const int32_t q = int32_t(std::nearbyint(x[i] * inverse));
    const int32_t upper = (q + 128) >> 8, high = (upper + 128) >> 8;
    int8_t* at = digits + to.at(i);
    at[0] = int8_t(high), at[to.part] = int8_t(upper), at[2 * to.part] = int8_t(q);
    high_sum += high, low_sum += q - high * 65536;
  }
  sums[0] = high_sum, sums[1] = low_sum;
}

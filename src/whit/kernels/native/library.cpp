// The C interface: prepares activations, chooses the kernels for this processor, shares tiles among threads.
//
// A row of the result is computed by one thread, in one order: the number of threads does not change it.
#include "host.h"

#include <initializer_list>

namespace whit {

const bool AMD = [] {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_cpu_init();
  return bool(__builtin_cpu_is("amd"));
#else
  return false;
#endif
}();

namespace {

const Kernels* chosen = nullptr;

const Kernels* best() {
  // one thread of an Intel processor gets more from memory with four tiles under way, one of AMD's a quarter less
  for (const Kernels* each : {AMD ? avx512() : avx512_four_tiles(), avx2(), neon()})
    if (each) return each;
  return generic();
}

// Activations as they are: [m][padded] floats, and the sums over groups that minima are multiplied with.
Activations as_floats(const Matrix& w, const float* padded, int64_t m) {
  Activations a = {};
  a.m = m, a.stride = w.padded, a.groups = w.groups, a.x = padded;
  if (w.offset_kind != MINIMUM) return a;
  float* sums = scratch.take<float>(m * w.groups);
  for (int64_t i = 0; i < m * w.groups; i++) {
    const float* x = padded + i / w.groups * w.padded + i % w.groups * w.group;
    float sum[8] = {};
    for (int64_t j = 0; j < w.group; j += 8)
      for (int64_t k = 0; k < 8; k++) sum[k] += x[j + k];
    sums[i] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
  }
  a.sums = sums;
  return a;
}

// What integer sums begin with, so that nothing has to be taken off them: n sums of x, times what makes the codes unsigned.
const int32_t* starts(const Matrix& w, const int32_t* sums, int64_t n) {
  int32_t* found = scratch.take<int32_t>(n);
  const bool flipped = kernels()->flips && (w.bits == 8 || w.levels);
  const int32_t bias = w.offset_kind == ZERO_POINT ? 0 : w.bias - 128 * flipped;
  for (int64_t i = 0; i < n; i++) found[i] = -bias * sums[i];
  return found;
}

// Activations in fixed point of so many digits, each segment of a group with a scale of its own.
Activations as_fixed(const Matrix& w, const float* padded, int64_t m, int parts) {
  const int64_t per_group = segments_of(w.group, FIXED), n = w.groups * per_group;
  int8_t* digits = scratch.take<int8_t>(m * w.padded * PARTS);
  float* scale = scratch.take<float>(m * n);
  int32_t* sums = scratch.take<int32_t>(m * n * 2);
  for (int64_t i = 0; i < m * n; i++) {
    const int64_t group = i % n / per_group, from = group * w.group + i % per_group * FIXED;
    const int64_t end = (group + 1) * w.group, at = i / n * w.padded + from;
    const auto fixed = parts == PARTS ? kernels()->fixed : kernels()->fixed_half;
    fixed(padded + at, end - from < FIXED ? end - from : FIXED, digits + at * parts, Places{4, 4 * parts, 4}, scale + i,
          sums + 2 * i);
  }
  Activations a = {};
  a.m = m, a.stride = w.padded, a.groups = w.groups, a.q = digits, a.q_scale = scale, a.q_sums = sums;
  a.q_start = starts(w, sums, m * n * 2);
  return a;
}

// y[i][row] = sums * x_scale[i] + bias[row]; x_scale null for 1.
void finish(const float* sums, int64_t first, int64_t n, int64_t row, int64_t n_rows, int64_t rows, const float* x_scale,
            int64_t scale_step, const void* bias, void* y, int type) {
  for (int64_t i = 0; i < n; i++) {
    const float factor = x_scale ? x_scale[(first + i) * scale_step] : 1.0f;
    if (type == BF16 && !bias && n_rows == LANES) {  // the usual case, without a branch, so that it becomes vectors
      uint16_t* to = static_cast<uint16_t*>(y) + (first + i) * rows + row;
      for (int64_t lane = 0; lane < LANES; lane++) {
        const float value = sums[i * LANES + lane] * factor;
        const uint32_t bits = to_bits(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[lane] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
      }
      continue;
    }
    for (int64_t lane = 0; lane < n_rows; lane++) {
      float value = sums[i * LANES + lane] * factor;
      if (bias) value += load(static_cast<const uint8_t*>(bias), row + lane, type);
      store(y, (first + i) * rows + row + lane, value, type);
    }
  }
}

using Tile = decltype(Kernels::tile_int8);
using Streams = decltype(Kernels::streams_int8);

// A matrix in the tile form, x as its kernels take it, and where the result goes; x_scale as in `finish`. `streams`, where
// there is one, serves a single row of x. What a tile gives does not depend on which of the two served it.
struct Product {
  Tile tile_of;
  Streams streams;
  Matrix w;
  Activations a;
  const float* x_scale;
  int64_t scale_step;
  const void* bias;
  void* y;
  int type;

  int64_t tiles() const { return (w.rows + LANES - 1) / LANES; }

  void run(int64_t tile) const {
    alignas(64) float out[MOST * LANES];
    const int64_t row = tile * LANES, n_rows = w.rows - row < LANES ? w.rows - row : LANES;
    for (int64_t first = 0; first < a.m; first += MOST) {
      const int64_t n = a.m - first < MOST ? a.m - first : MOST;
      tile_of(w, a, tile, first, n, out);
      finish(out, first, n, row, n_rows, w.rows, x_scale, scale_step, bias, y, type);
    }
  }

  void run_streams(int64_t from) const {
    alignas(64) float out[STREAMS * LANES];
    streams(w, a, from, out);
    for (int64_t t = 0; t < STREAMS; t++) {
      const int64_t row = (from + t) * LANES, n_rows = w.rows - row < LANES ? w.rows - row : LANES;
      finish(out + t * LANES, 0, 1, row, n_rows, w.rows, x_scale, scale_step, bias, y, type);
    }
  }
};

void run_tiles(const Product& p, int threads) {
  const int64_t tiles = p.tiles();
  if (threads == 1) {  // no parallel region, which alone costs as much as a small product
    int64_t tile = 0;
    // one thread may get more from memory with several tiles under way; two or more are faster with one each
    if (p.streams && p.a.m == 1)
      for (; tile + STREAMS <= tiles; tile += STREAMS) p.run_streams(tile);
    for (; tile < tiles; tile++) p.run(tile);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; tile++) p.run(tile);
}

void run_rows(const Matrix& w, const float* x, int64_t m, const float* x_scale, int64_t scale_step, const void* bias,
              void* y, int type, int threads) {
  const Kernels* k = kernels();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < w.rows; row++) {
    for (int64_t first = 0; first < m; first += MOST) {
      const int64_t n = m - first < MOST ? m - first : MOST;
      float sums[MOST], spread[MOST * LANES];
      k->row_float(w, x + first * w.padded, n, row, sums);
      if (w.count) k->row_beside(w, x + first * w.padded, n, row, sums);
      for (int64_t i = 0; i < n; i++) spread[i * LANES] = sums[i];
      finish(spread, first, n, row, 1, w.rows, x_scale, scale_step, bias, y, type);
    }
  }
}

// Decodes one row from its codes; `lane` names its parameters in the tile.
void decode_row(const Matrix& w, const uint8_t* codes, int64_t tile, int64_t lane, void* out, int type) {
  kernels()->decode(w, codes, tile, lane, out, type);
  for (int64_t at = tile * w.count; at < (tile + 1) * w.count; at++) {  // in the row form, where a tile is a row
    const int64_t col = column_of(w, at);
    store(out, col, from_f16(book_of(w, tile, col)[codes[col]]) + from_f16(w.beside[at]), type);
  }
}

// One row's codes in column order, [padded].
void row_codes(const Matrix& w, int64_t row, uint8_t* codes) {
  if (w.books) return unpack_row(w.codes + row * w.row_bytes, w.bits, w.padded, codes);
  const int64_t block = block_of(w.bits), lane = row % LANES;
  const uint8_t* at = w.codes + row / LANES * w.row_bytes;
  for (int64_t col = 0; col < w.padded; col += block, at += block * LANES * w.bits / 8) {
    const int64_t quads = block / 4;
    const uint8_t* plane = at;
    memset(codes + col, 0, size_t(block));
    int shift = 0;
    for (int width = 8; width; width >>= 1) {
      if (!(w.bits & width)) continue;
      const int64_t fields = 8 / width;
      const int mask = (1 << width) - 1;
      for (int64_t i = 0; i < block; i++) {
        const int64_t quad = i / 4;
        const uint8_t byte = plane[quad / fields * QUAD + 4 * lane + i % 4];
        codes[col + i] |= uint8_t(((byte >> (quad % fields * width)) & mask) << shift);
      }
      plane += quads / fields * QUAD;
      shift += width;
    }
  }
}

}  // namespace

const Kernels* kernels() {
  if (!chosen) chosen = best();
  return chosen;
}

}  // namespace whit

using namespace whit;

WHIT_EXPORT const char* whit_name() { return kernels()->name; }

// For tests: use the kernels of this name. Returns whether this processor has them.
WHIT_EXPORT int whit_choose(const char* name) {
  for (const Kernels* each : {avx512(), avx512_four_tiles(), avx2(), neon(), generic()})
    if (each && !strcmp(each->name, name)) {
      chosen = each;
      return 1;
    }
  return 0;
}

// y [m][rows] = x [m][cols] times the transposed matrix + bias [rows]; x, bias and y of `type`.
WHIT_EXPORT void whit_linear(const void* x, int64_t m, const void* bias, void* y, int type, int threads, const Given* given) {
  const Matrix w = matrix(given);
  threads = threads_for(w, m, threads);
  const int64_t n_segments = w.groups * segments_of(w.group, FIXED);
  scratch.reserve(m * (w.padded * (4 + PARTS) + n_segments * 20) + 8 * ALIGN);
  float* padded = scratch.take<float>(m * w.padded);
  for (int64_t i = 0; i < m; i++) {
    to_floats(x, i * w.cols, w.cols, type, padded + i * w.padded);
    memset(padded + i * w.padded + w.cols, 0, size_t(w.padded - w.cols) * 4);
  }
  if (w.books) return run_rows(w, padded, m, nullptr, 0, bias, y, type, threads);
  const Kernels* k = kernels();
  Product p = {k->tile_float, nullptr, w, {}, nullptr, 0, bias, y, type};
  if (!w.integer || !k->tile_fixed || !finite(padded, m * w.padded)) {
    p.a = as_floats(w, padded, m);
  } else if (type != F32 && k->tile_half) {
    p.tile_of = k->tile_half, p.streams = k->streams_half, p.a = as_fixed(w, padded, m, HALF_PARTS);
  } else {
    p.tile_of = k->tile_fixed, p.streams = k->streams_fixed, p.a = as_fixed(w, padded, m, PARTS);
  }
  run_tiles(p, threads);
}

// y [m][rows] = x_scale [m or 1] * x [m][cols] int8 times the transposed matrix + bias.
WHIT_EXPORT void whit_linear_int8(const int8_t* x, int64_t m, const float* x_scale, int64_t scale_step, const void* bias,
                                  void* y, int type, int threads, const Given* given) {
  const Matrix w = matrix(given);
  threads = threads_for(w, m, threads);
  if (w.books || !w.integer) {  // levels that are no integers: codes of activations are exact floats
    scratch.reserve(m * (w.padded + w.groups) * 4 + 4 * ALIGN);
    float* padded = scratch.take<float>(m * w.padded);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < w.padded; j++) padded[i * w.padded + j] = j < w.cols ? float(x[i * w.cols + j]) : 0.0f;
    if (w.books) return run_rows(w, padded, m, x_scale, scale_step, bias, y, type, threads);
    const Product p = {kernels()->tile_float, nullptr, w, as_floats(w, padded, m), x_scale, scale_step, bias, y, type};
    return run_tiles(p, threads);
  }
  const int64_t per_group = segments_of(w.group, SEGMENT), n_sums = w.groups * per_group;
  scratch.reserve(m * (w.padded + n_sums * 8) + 4 * ALIGN);
  int8_t* padded = scratch.take<int8_t>(m * w.padded);
  int32_t* sums = scratch.take<int32_t>(m * n_sums);
  for (int64_t i = 0; i < m; i++) {
    memcpy(padded + i * w.padded, x + i * w.cols, size_t(w.cols));
    memset(padded + i * w.padded + w.cols, 0, size_t(w.padded - w.cols));
    for (int64_t s = 0; s < n_sums; s++) {
      const int64_t end = (s / per_group + 1) * w.group, from = s / per_group * w.group + s % per_group * SEGMENT;
      const int64_t to = from + SEGMENT < end ? from + SEGMENT : end;
      int32_t sum = 0;
      for (int64_t j = from; j < to; j++) sum += padded[i * w.padded + j];
      sums[i * n_sums + s] = sum;
    }
  }
  Activations a = {};
  a.m = m, a.stride = w.padded, a.groups = w.groups, a.q = padded, a.q_sums = sums, a.q_start = starts(w, sums, m * n_sums);
  const Product p = {kernels()->tile_int8, kernels()->streams_int8, w, a, x_scale, scale_step, bias, y, type};
  run_tiles(p, threads);
}

namespace {

// q [m][cols] of x [m][cols], symmetric, halves to even, with the scale that is given or one for each row, put in scale [m].
void quantize_rows(const void* x, int64_t m, int64_t cols, int8_t* q, float* scale, const float* given, int type,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (m * cols >= SMALL)
  for (int64_t i = 0; i < m; i++) {
    scratch_of_part.reserve(cols * 4 + ALIGN);
    float* row = scratch_of_part.take<float>(cols);
    to_floats(x, i * cols, cols, type, row);
    float step = given ? *given : 1.0f;
    if (!given) {
      uint32_t most = 0;  // magnitudes compare as their bits do, and NaN is above all
      for (int64_t j = 0; j < cols; j++) {
        const uint32_t magnitude = to_bits(row[j]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
      }
      if (most) step = from_bits(most) / 127.0f;
      scale[i] = step;
    }
    for (int64_t j = 0; j < cols; j++) {
      float value = row[j] / step;
      value = value > 127.0f ? 127.0f : value;  // NaN stays
      value = value < -127.0f ? -127.0f : value;
      // adding and taking away 1.5 * 2^23 rounds to even
      const float rounded = (value + 12582912.0f) - 12582912.0f;
      q[i * cols + j] = rounded == rounded ? int8_t(int(rounded)) : int8_t(0);
    }
  }
}

}  // namespace

// q [m][cols] and scale [m] of x [m][cols].
WHIT_EXPORT void whit_quantize_rows(const void* x, int64_t m, int64_t cols, int8_t* q, float* scale, int type,
                                    int threads) {
  quantize_rows(x, m, cols, q, scale, nullptr, type, threads);
}

// whit_linear_int8 of x [m][cols] of `type`, which is put in int8 first, with one scale for all or, without it, one for
// each row.
WHIT_EXPORT void whit_linear_rounded(const void* x, int64_t m, const float* x_scale, const void* bias, void* y, int type,
                                     int threads, const Given* given) {
  thread_local Scratch codes;
  codes.reserve(m * (given->cols + 4) + 2 * ALIGN);
  int8_t* q = codes.take<int8_t>(m * given->cols);
  float* scale = codes.take<float>(m);
  quantize_rows(x, m, given->cols, q, scale, x_scale, type, threads);
  whit_linear_int8(q, m, x_scale ? x_scale : scale, x_scale ? 0 : 1, bias, y, type, threads, given);
}

// out [last - first][cols] of `type`: rows first .. last; in the tile form `first` is a multiple of 16.
WHIT_EXPORT void whit_dequantize(int64_t first, int64_t last, void* out, int type, int threads, const Given* given) {
  const Matrix w = matrix(given);
  const Kernels* k = kernels();
  const int64_t step = w.books ? 1 : LANES, size = type == F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads((last - first) * w.cols < SMALL ? 1 : threads)
  for (int64_t row = first; row < last; row += step) {
    scratch_of_part.reserve(step * w.padded + ALIGN);
    uint8_t* buffer = scratch_of_part.take<uint8_t>(step * w.padded);
    if (w.books) row_codes(w, row, buffer);
    else k->unpack(w, row / LANES, buffer);
    for (int64_t lane = 0; lane < step && row + lane < last; lane++)
      decode_row(w, buffer + lane * w.padded, row / step, lane,
                 static_cast<char*>(out) + (row + lane - first) * w.cols * size, type);
  }
}

// out [n][cols] of `type`: the rows that index names; they are not checked.
WHIT_EXPORT void whit_rows(const int64_t* index, int64_t n, void* out, int type, int threads, const Given* given) {
  const Matrix w = matrix(given);
  const int64_t step = w.books ? 1 : LANES, size = type == F32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(n * w.cols < SMALL ? 1 : threads)
  for (int64_t i = 0; i < n; i++) {
    scratch_of_part.reserve(w.padded + ALIGN);
    uint8_t* buffer = scratch_of_part.take<uint8_t>(w.padded);
    row_codes(w, index[i], buffer);
    decode_row(w, buffer, index[i] / step, index[i] % step, static_cast<char*>(out) + i * w.cols * size, type);
  }
}

// A Python extension module by name only: it is built like one, and loaded with ctypes.
WHIT_EXPORT void* PyInit__native() { return nullptr; }

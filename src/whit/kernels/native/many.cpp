// Many rows of x on tile units: x is rearranged for them, then tiles of weights are shared among threads.
#include "host.h"

namespace whit {
namespace {

constexpr int64_t NEAR_BYTES = 5 << 18;  // of x that tile units keep near: more falls out of a second-level cache of 2 MiB

// Rows of x that are rearranged together, and that every tile of weights then meets: what stays in the nearer cache.
int64_t at_once(const Matrix& w, int64_t m, int64_t bytes) {
  const int64_t passes = (m * w.padded * bytes + NEAR_BYTES - 1) / NEAR_BYTES;
  const int64_t rows = (m + passes - 1) / passes;
  return rows < 64 ? 64 : (rows + LANES - 1) / LANES * LANES;
}

// Room in [blocks][parts][segments][stretch][16] for x of `m` rows, with segments of at most `longest` columns.
Tiled places_of(const Matrix& w, int64_t m, int64_t longest) {
  Tiled a = {};
  a.blocks = (m + LANES - 1) / LANES;
  a.segment = w.group < longest ? w.group : longest;
  a.per_group = segments_of(w.group, a.segment);
  a.segments = w.groups * a.per_group;
  a.depth = a.segment <= 16 ? 16 : a.segment <= 32 ? 32 : 64;
  a.stretch = (a.segment + a.depth - 1) / a.depth * a.depth;
  a.part_bytes = a.segments * a.stretch * LANES;
  return a;
}

// A tile of weights after the other, for all rows of x.
void run_wide(const Wide* wide, decltype(Wide::integers) product, const Matrix& w, const Tiled& a, int64_t m,
              const float* x_scale, int64_t scale_step, const void* bias, void* y, int type, int threads) {
  const int64_t tiles = (w.rows + LANES - 1) / LANES, room = (w.padded + 64) * LANES * 2 + 2 * a.part_bytes;
#pragma omp parallel num_threads(threads)
  {
    scratch_of_part.reserve(room + a.blocks * 1024 + 2 * ALIGN);
    int8_t* weights = scratch_of_part.take<int8_t>(room);
    float* out = scratch_of_part.take<float>(a.blocks * 256);
    wide->begin(a.depth);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = tile * LANES, n_rows = w.rows - row < LANES ? w.rows - row : LANES;
      product(w, a, tile, weights, out);
      wide->finish(out, m, n_rows, row, w.rows, x_scale, scale_step, bias, y, type);
    }
    wide->end();
  }
}

void wide_halves(const Wide* wide, const Matrix& w, const uint16_t* x, int64_t m, const void* bias, void* y, int threads) {
  Tiled a = {};
  a.blocks = (m + LANES - 1) / LANES, a.depth = 64;
  const int64_t steps = (w.padded + 31) / 32;  // of 32 columns
  a.part_bytes = steps * 1024;
  scratch.reserve(a.blocks * a.part_bytes + ALIGN);
  int8_t* to = scratch.take<int8_t>(a.blocks * a.part_bytes);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < a.blocks * LANES; i++)
    for (int64_t step = 0; step < steps; step++) {
      int8_t* at = to + i / LANES * a.part_bytes + step * 1024 + i % LANES * 64;
      const int64_t left = i < m ? w.cols - step * 32 : 0, n = left < 0 ? 0 : left < 32 ? left : 32;
      memcpy(at, x + i * w.cols + step * 32, size_t(n) * 2);
      memset(at + n * 2, 0, size_t(64 - n * 2));
    }
  a.x = to;
  run_wide(wide, wide->halves, w, a, m, nullptr, 0, bias, y, BF16, threads);
}

// Returns false when a number is not finite.
bool wide_fixed(const Wide* wide, const Matrix& w, const void* x, int64_t m, const void* bias, void* y, int type,
                int threads) {
  Tiled a = places_of(w, m, FIXED);
  const int64_t rows = a.blocks * LANES;
  scratch.reserve(a.blocks * a.part_bytes * PARTS + a.segments * rows * 12 + 4 * ALIGN);
  int8_t* to = scratch.take<int8_t>(a.blocks * a.part_bytes * PARTS);
  int32_t* sums = scratch.take<int32_t>(a.segments * rows * 2);
  float* scale = scratch.take<float>(a.segments * rows);
  int infinite = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : infinite)
  for (int64_t i = 0; i < m; i++) {
    scratch_of_part.reserve(w.padded * 4 + ALIGN);
    float* row = scratch_of_part.take<float>(w.padded);
    to_floats(x, i * w.cols, w.cols, type, row);
    memset(row + w.cols, 0, size_t(w.padded - w.cols) * 4);
    infinite += !finite(row, w.cols);
    if (infinite) continue;
    for (int64_t s = 0; s < a.segments; s++) {
      const int64_t group = s / a.per_group, inside = s % a.per_group * a.segment, left = w.group - inside;
      int8_t* at = to + i / LANES * a.part_bytes * PARTS + s * a.stretch * LANES + i % LANES * a.depth;
      kernels()->fixed(row + group * w.group + inside, left < a.segment ? left : a.segment, at,
                       Places{a.depth, a.depth * LANES, a.part_bytes}, scale + s * rows + i, sums + 2 * (s * rows + i));
    }
  }
  if (infinite) return false;
  a.x = to, a.sums = sums, a.scale = scale;
  run_wide(wide, wide->fixed, w, a, m, nullptr, 0, bias, y, type, threads);
  return true;
}

void wide_integers(const Wide* wide, const Matrix& w, const int8_t* x, int64_t m, const float* x_scale,
                   int64_t scale_step, const void* bias, void* y, int type, int threads) {
  Tiled a = places_of(w, m, SEGMENT);
  const int64_t rows = a.blocks * LANES;
  scratch.reserve(a.blocks * a.part_bytes + a.segments * rows * 4 + 4 * ALIGN);
  int8_t* to = scratch.take<int8_t>(a.blocks * a.part_bytes);
  int32_t* sums = scratch.take<int32_t>(a.segments * rows);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < m; i++)
    for (int64_t s = 0; s < a.segments; s++) {
      const int64_t from = s / a.per_group * w.group + s % a.per_group * a.segment;
      int64_t n = (s / a.per_group + 1) * w.group - from;
      n = n < a.segment ? n : a.segment;
      n = from + n > w.cols ? w.cols - from : n;
      int8_t* at = to + i / LANES * a.part_bytes + s * a.stretch * LANES + i % LANES * a.depth;
      int32_t sum = 0;
      for (int64_t c = 0; c < n; c += a.depth) {
        const int64_t some = n - c < a.depth ? n - c : a.depth;
        memcpy(at + c * LANES, x + i * w.cols + from + c, size_t(some));
        for (int64_t j = 0; j < some; j++) sum += x[i * w.cols + from + c + j];
        if (some < a.depth) memset(at + c * LANES + some, 0, size_t(a.depth - some));
      }
      sums[s * rows + i] = sum;
    }
  a.x = to, a.sums = sums;
  run_wide(wide, wide->integers, w, a, m, x_scale, scale_step, bias, y, type, threads);
}

// Whether codes less zero points fit int8, as tile units take them.
bool fits(const Matrix& w) {
  if (w.bits == 8 || w.offset_kind != ZERO_POINT) return true;
  const int64_t n = (w.rows + LANES - 1) / LANES * w.groups * LANES;
  uint8_t most = 0;
  for (int64_t i = 0; i < n; i++) most = w.offset[i] > most ? w.offset[i] : most;
  return most <= 128;
}

}  // namespace
}  // namespace whit

using namespace whit;

// As whit_linear, with tile units; returns 0 when there are none for this matrix and x.
WHIT_EXPORT int whit_linear_many(const void* x, int64_t m, const void* bias, void* y, int type, int threads,
                                 const Given* given) {
  const Matrix w = matrix(given);
  const Wide* wide = kernels()->wide ? kernels()->wide() : nullptr;
  if (!wide || w.books || (type != BF16 && !(w.integer && fits(w)))) return 0;
  const int64_t size = type == F32 ? 4 : 2, step = at_once(w, m, type == BF16 ? 2 : PARTS);
  for (int64_t first = 0; first < m; first += step) {
    const int64_t n = m - first < step ? m - first : step;
    const char* from = static_cast<const char*>(x) + first * w.cols * size;
    char* to = static_cast<char*>(y) + first * w.rows * size;
    if (type == BF16) wide_halves(wide, w, reinterpret_cast<const uint16_t*>(from), n, bias, to, threads);
    else if (!wide_fixed(wide, w, from, n, bias, to, type, threads)) return 0;
  }
  return 1;
}

WHIT_EXPORT void whit_linear_int8(const int8_t* x, int64_t m, const float* x_scale, int64_t scale_step, const void* bias,
                                  void* y, int type, int threads, const Given* given);  // of library.cpp

// As whit_linear_int8, with tile units where there are some; returns 0 for levels that are no integers, and
// where nothing but plain loops would multiply them.
WHIT_EXPORT int whit_linear_int8_many(const int8_t* x, int64_t m, const float* x_scale, int64_t scale_step,
                                      const void* bias, void* y, int type, int threads, const Given* given) {
  const Matrix w = matrix(given);
  const Wide* wide = kernels()->wide ? kernels()->wide() : nullptr;
  if (w.books || !w.integer || kernels() == generic()) return 0;
  if (!wide || !fits(w)) {  // the products of few rows, again and again, are still the fastest with sums of integers
    const int64_t some = 256, size = type == F32 ? 4 : 2;  // so that copies of x stay small
    for (int64_t first = 0; first < m; first += some)
      whit_linear_int8(x + first * w.cols, m - first < some ? m - first : some, x_scale + first * scale_step, scale_step,
                       bias, static_cast<char*>(y) + first * w.rows * size, type, threads, given);
    return 1;
  }
  const int64_t size = type == F32 ? 4 : 2, step = at_once(w, m, 1);
  for (int64_t first = 0; first < m; first += step)
    wide_integers(wide, w, x + first * w.cols, m - first < step ? m - first : step, x_scale + first * scale_step,
                  scale_step, bias, static_cast<char*>(y) + first * w.rows * size, type, threads);
  return 1;
}

// Nearest rounding of whole matrices in one pass: from numbers as a checkpoint holds them to codes and parameters.
//
// A group is worked on by one thread, and groups share nothing: the number of threads does not change the result.
#include "host.h"

#include <cmath>

#define WHIT_INLINE static inline __attribute__((always_inline))

namespace whit {
namespace {

constexpr int64_t SUPERBLOCK = 256, MOST_SUBS = 16;
constexpr int64_t CHUNK = 1 << 14;  // numbers that a thread takes at a time

// All groups of a matrix. x is `n` groups of `size`; levels are code - zero, codes 0..top.
struct Groups {
  const void* x;
  int type;
  int64_t n, size;
  int offset_kind, zero, top, mirrored;
  uint8_t* codes;
  int scale_type;
  void *scale, *offset;
};

// All superblocks of a matrix, of sub-blocks whose scales are integers from low to high.
struct Superblocks {
  const void* x;
  int type;
  int64_t n, sub;
  int zero, top, low, high;
  bool minima;
  uint8_t* codes;
  uint16_t *scale, *minimum;
  int8_t* sub_scale;
  uint8_t* sub_minimum;
};

// Codes [..][k][m] of which k become one byte.
struct Codes {
  const uint8_t* codes;
  int64_t k, m;
  int shift;
  uint8_t* out;
};

// Records of several fields, each in memory of its own.
struct Fields {
  const uint8_t* const* fields;
  const int64_t* widths;
  int n_fields;
  int64_t record;
  uint8_t* out;
};

namespace plain {
#include "groups.h"
}

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__) && !defined(__clang__)
#define WHIT_MORE
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")
namespace wide {
#include "groups.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
namespace medium {
#include "groups.h"
}
#pragma GCC pop_options
#endif

enum Width { PLAIN, MEDIUM, WIDE };

Width width() {
#ifdef WHIT_MORE
  if (kernels() == avx512() || kernels() == avx512_four_tiles()) return WIDE;
  if (kernels() == avx2()) return MEDIUM;
#endif
  return PLAIN;
}

template <int64_t SIZE>
bool groups(Width width, const Groups& all, int64_t first, int64_t last, float* x) {
#ifdef WHIT_MORE
  if (width == WIDE) return wide::round_groups<SIZE>(all, first, last, x);
  if (width == MEDIUM) return medium::round_groups<SIZE>(all, first, last, x);
#endif
  return plain::round_groups<SIZE>(all, first, last, x);
}

bool superblocks(Width width, const Superblocks& all, int64_t first, int64_t last) {
#ifdef WHIT_MORE
  if (width == WIDE) return wide::round_superblocks(all, first, last);
  if (width == MEDIUM) return medium::round_superblocks(all, first, last);
#endif
  return plain::round_superblocks(all, first, last);
}

void joined(Width width, const Codes& all, int64_t first, int64_t last) {
#ifdef WHIT_MORE
  if (width == WIDE) return wide::join_all(all, first, last);
  if (width == MEDIUM) return medium::join_all(all, first, last);
#endif
  plain::join_all(all, first, last);
}

// `part` of all items, `step` at a time, on so many threads; false when a part says so.
template <typename Part>
bool shared(int64_t n, int64_t step, int threads, Part part) {
  bool good = true;
  const int64_t n_steps = (n + step - 1) / step;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(&& : good) if (threads > 1 && n_steps > 1)
  for (int64_t k = 0; k < n_steps; k++) {
    const int64_t last = (k + 1) * step < n ? (k + 1) * step : n;
    good = good && part(k * step, last);
  }
  return good;
}

}  // namespace
}  // namespace whit

// Codes [n][size], scales [n] of scale_type, zero points (bytes) or minima (as scales) [n]. 0 where a number is not finite,
// or a scale or minimum in its type.
WHIT_EXPORT int whit_nearest_groups(const void* x, int type, int64_t n, int64_t size, int offset_kind, int zero, int top,
                                    int mirrored, uint8_t* codes, int scale_type, void* scale, void* offset,
                                    int threads) {
  using namespace whit;
  const Groups all = {x, type, n, size, offset_kind, zero, top, mirrored, codes, scale_type, scale, offset};
  const int64_t step = size < CHUNK ? CHUNK / size : 1;
  const Width how = width();
  return shared(n, step, threads, [&](int64_t first, int64_t last) {
    scratch_of_part.reserve(size * 4 + ALIGN);
    float* x = scratch_of_part.take<float>(size);
    return size == 32 ? groups<32>(how, all, first, last, x) : groups<0>(how, all, first, last, x);
  });
}

// Codes [n][256], half-precision scales and minima [n], integer ones [n][256 / sub]. 0 where a number is not finite, or a
// scale in half precision.
WHIT_EXPORT int whit_nearest_superblocks(const void* x, int type, int64_t n, int sub, int zero, int top, int low,
                                         int high, int minima, uint8_t* codes, uint16_t* scale, int8_t* sub_scale,
                                         uint16_t* minimum, uint8_t* sub_minimum, int threads) {
  using namespace whit;
  const Superblocks all = {x,           type,  n,     sub,     zero,      top,        low, high,
                           minima != 0, codes, scale, minimum, sub_scale, sub_minimum};
  const Width how = width();
  return shared(n, CHUNK / SUPERBLOCK, threads, [&](int64_t first, int64_t last) {
    return superblocks(how, all, first, last);
  });
}

// Bits `shift` and up, 8 / k of them, of codes [n][k][m] in bytes [n][m]; k is 2, 4 or 8.
WHIT_EXPORT void whit_join_codes(const uint8_t* codes, int64_t n, int64_t k, int64_t m, int shift, uint8_t* out,
                                 int threads) {
  using namespace whit;
  const Codes all = {codes, k, m, shift, out};
  const Width how = width();
  shared(n, CHUNK / (k * m) + 1, threads, [&](int64_t first, int64_t last) {
    joined(how, all, first, last);
    return true;
  });
}

// Fields [n][widths[k]], one after the other in every record of out.
WHIT_EXPORT void whit_interleave(const uint8_t* const* fields, const int64_t* widths, int n_fields, int64_t n,
                                 uint8_t* out, int threads) {
  using namespace whit;
  int64_t record = 0;
  for (int k = 0; k < n_fields; k++) record += widths[k];
  const Fields all = {fields, widths, n_fields, record, out};
  shared(n, CHUNK / record + 1, threads, [&](int64_t first, int64_t last) {
    plain::interleave(all, first, last);
    return true;
  });
}

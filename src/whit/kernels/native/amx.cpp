// Intel's tile units, for many rows of x at once. A tile of weights becomes 64-byte rows of sixteen weight rows times four
// codes (or two bfloat16), which is how the packed matrix lies already; it is unpacked once and meets all of x.
//
// Integers: sums of one segment of a group in int32, then scaled and added in float32, as everywhere else.
// bfloat16: weights are rounded to bfloat16 first, as in a product of torch with a decoded matrix.
#include "whit.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2,amx-tile,amx-int8,amx-bf16")
#endif

namespace whit {
namespace {

#include "vectors512.h"

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The compiler does not know what the tile instructions read: everything written so far has to be in memory.
WHIT_INLINE void settle() { asm volatile("" ::: "memory"); }

// Tiles 0 to 5 hold sums, 6 rows of x, 7 weights; `depth` bytes of x meet at a time.
void configure(int64_t depth) {
  Config config;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  config.bytes[6] = uint16_t(depth);
  config.rows[7] = uint8_t(depth / 4);
  settle();
  _tile_loadconfig(&config);
}

WHIT_INLINE void clear(int n) {
  _tile_zero(0);
  if (n > 1) _tile_zero(1);
  if (n > 2) _tile_zero(2);
  if (n > 3) _tile_zero(3);
  if (n > 4) _tile_zero(4);
  if (n > 5) _tile_zero(5);
}

WHIT_INLINE void keep(int n, int32_t* to) {
  _tile_stored(0, to, 64);
  if (n > 1) _tile_stored(1, to + 256, 64);
  if (n > 2) _tile_stored(2, to + 512, 64);
  if (n > 3) _tile_stored(3, to + 768, 64);
  if (n > 4) _tile_stored(4, to + 1024, 64);
  if (n > 5) _tile_stored(5, to + 1280, 64);
}

// One step of up to six tiles of x, `apart` bytes from each other, with the weights in tile 7.
#define WHIT_STEP(i, multiply)                          \
  if (n > i) {                                          \
    _tile_loadd(6, x + i * apart, depth);               \
    multiply(i, 6, 7);                                  \
  }

WHIT_INLINE void step_integers(int n, const int8_t* x, int64_t apart, int64_t depth) {
  WHIT_STEP(0, _tile_dpbssd)
  WHIT_STEP(1, _tile_dpbssd)
  WHIT_STEP(2, _tile_dpbssd)
  WHIT_STEP(3, _tile_dpbssd)
  WHIT_STEP(4, _tile_dpbssd)
  WHIT_STEP(5, _tile_dpbssd)
}

WHIT_INLINE void step_halves(int n, const int8_t* x, int64_t apart, int64_t depth) {
  WHIT_STEP(0, _tile_dpbf16ps)
  WHIT_STEP(1, _tile_dpbf16ps)
  WHIT_STEP(2, _tile_dpbf16ps)
  WHIT_STEP(3, _tile_dpbf16ps)
  WHIT_STEP(4, _tile_dpbf16ps)
  WHIT_STEP(5, _tile_dpbf16ps)
}

// Signed levels less the zero point; of eight bits less 128, and the rest is taken off the sums.
template <int BITS, bool TABLE>
void unpack_signed(const Matrix& w, const Tiled& a, int64_t tile, int8_t* to) {
  constexpr int n_quads = quads_of<BITS>;
  const __m512i table = V::table(w.unsigned_levels);
  const uint8_t* codes = w.codes + tile * w.row_bytes;
  for (int64_t g = 0; g < w.groups; g++) {
    __m512i less = _mm512_set1_epi8(char(BITS == 8 || TABLE ? 128 : w.zero));
    if (BITS < 8 && w.offset_kind == ZERO_POINT)
      less = _mm512_mullo_epi32(bytes16(w.offset + (tile * w.groups + g) * LANES), _mm512_set1_epi32(0x01010101));
    for (int64_t s = 0, left = w.group; s < a.per_group; s++, left -= a.segment) {
      const int64_t n = left < a.segment ? left : a.segment;
      int64_t col = 0;
      for (; col < n; col += 4 * n_quads, codes += n_quads * QUAD * BITS / 8) {
        __m512i code[n_quads];
        prefetch(codes, n_quads * QUAD * BITS / 8);
        quads<V, BITS>(codes, code);
        for (int q = 0; q < n_quads; q++) {
          if constexpr (TABLE) code[q] = V::lookup(table, code[q]);
          _mm512_storeu_si512(to + (col / 4 + q) * QUAD, _mm512_sub_epi8(code[q], less));
        }
      }
      for (; col < a.stretch; col += 4) _mm512_storeu_si512(to + col / 4 * QUAD, _mm512_setzero_si512());
      to += a.stretch / 4 * QUAD;
    }
  }
}

void unpack_integers(const Matrix& w, const Tiled& a, int64_t tile, int8_t* to) {
  switch (w.bits) {
    case 2: return w.levels ? unpack_signed<2, true>(w, a, tile, to) : unpack_signed<2, false>(w, a, tile, to);
    case 3: return w.levels ? unpack_signed<3, true>(w, a, tile, to) : unpack_signed<3, false>(w, a, tile, to);
    case 4: return w.levels ? unpack_signed<4, true>(w, a, tile, to) : unpack_signed<4, false>(w, a, tile, to);
    case 5: return unpack_signed<5, false>(w, a, tile, to);
    case 6: return unpack_signed<6, false>(w, a, tile, to);
    case 7: return unpack_signed<7, false>(w, a, tile, to);
    default: return unpack_signed<8, false>(w, a, tile, to);
  }
}

// Adds the int32 sums of one segment to y [n * 16][16].
template <int P>
WHIT_INLINE void add(const Matrix& w, const Tiled& a, int64_t tile, int64_t s, int64_t b, int64_t n, const int32_t* kept,
                     float* y) {
  const bool rest = w.bits == 8 && !w.levels && (w.zero != 128 || w.offset_kind != NONE);
  const bool lifted = w.offset_kind == MINIMUM;
  const int64_t at = (tile * w.groups + s / a.per_group) * LANES, row = s * a.blocks * 16 + b * 16;
  const __m512 scale = _mm512_mul_ps(scale16(w, at), _mm512_set1_ps(w.factor));
  const __m512 minimum = lifted ? load16(w.offset, at, w.scale_type) : _mm512_setzero_ps();
  __m512i left = _mm512_set1_epi32(w.zero - 128);
  if (w.offset_kind == ZERO_POINT) left = _mm512_sub_epi32(bytes16(w.offset + at), _mm512_set1_epi32(128));
  for (int64_t block = 0; block < n; block++, kept += 256 * P, y += 256) {
    for (int64_t i = 0; i < 16; i++) {
      const int64_t of_x = row + block * 16 + i;
      __m512i high = _mm512_load_si512(kept + i * 16);
      __m512 value = _mm512_loadu_ps(y + i * 16);
      if constexpr (P == 1) {
        if (rest) high = _mm512_sub_epi32(high, _mm512_mullo_epi32(left, _mm512_set1_epi32(a.sums[of_x])));
        value = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(high), value);
        if (lifted) value = _mm512_fmadd_ps(minimum, _mm512_set1_ps(float(a.sums[of_x])), value);
      } else {
        const int32_t* both = a.sums + 2 * of_x;
        const float step = a.scale[of_x];
        __m512i low = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(kept + 256 + i * 16), 8),
                                       _mm512_load_si512(kept + 512 + i * 16));
        if (rest) {
          high = _mm512_sub_epi32(high, _mm512_mullo_epi32(left, _mm512_set1_epi32(both[0])));
          low = _mm512_sub_epi32(low, _mm512_mullo_epi32(left, _mm512_set1_epi32(both[1])));
        }
        const __m512 sum =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), _mm512_cvtepi32_ps(low));
        value = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(step)), sum, value);
        if (lifted) {
          const float x_sum = (float(both[0]) * 65536.0f + float(both[1])) * step;
          value = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x_sum), value);
        }
      }
      _mm512_storeu_ps(y + i * 16, value);
    }
  }
}

template <int P>
void integers(const Matrix& w, const Tiled& a, int64_t tile, int8_t* weights, float* out) {
  constexpr int64_t most = P == 1 ? 6 : 2;  // blocks of x at a time
  unpack_integers(w, a, tile, weights);
  settle();
  alignas(64) int32_t kept[2][6 * 256];
  for (int64_t b = 0; b < a.blocks; b += most) {
    const int n = int(a.blocks - b < most ? a.blocks - b : most);
    float* y = out + b * 256;
    memset(y, 0, size_t(n) * 1024);
    for (int64_t s = 0; s < a.segments; s++) {
      const int8_t* x = a.x + b * a.part_bytes * P + s * a.stretch * 16;
      const int8_t* to = weights + s * a.stretch * 16;
      clear(n * P);
      for (int64_t k = 0; k < a.stretch; k += a.depth) {
        _tile_loadd(7, to + k * 16, 64);
        step_integers(n * P, x + k * 16, a.part_bytes, a.depth);  // digits of a block lie one after the other
      }
      keep(n * P, kept[s & 1]);
      settle();
      // the tile units need long for a segment; meanwhile the sums of the one before are added
      if (s) add<P>(w, a, tile, s - 1, b, n, kept[(s - 1) & 1], y);
    }
    add<P>(w, a, tile, a.segments - 1, b, n, kept[(a.segments - 1) & 1], y);
  }
}

// A tile decoded to bfloat16, two columns side by side.
template <int BITS>
void unpack_halves(const Matrix& w, int64_t tile, uint16_t* to) {
  constexpr int n_quads = quads_of<BITS>;
  const uint8_t* codes = w.codes + tile * w.row_bytes;
  const __m512 table = _mm512_loadu_ps(w.values);
  // word 2 i is i, word 2 i + 1 is 16 + i
  const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i side_by_side = _mm512_or_si512(count, _mm512_slli_epi32(_mm512_add_epi32(count, _mm512_set1_epi32(16)), 16));
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t at = (tile * w.groups + g) * LANES;
    const __m512 scale = scale16(w, at);
    __m512 less = _mm512_set1_ps(BITS <= 4 ? 0.0f : float(w.zero));
    if (w.offset_kind == ZERO_POINT) less = _mm512_cvtepi32_ps(bytes16(w.offset + at));
    const bool lifted = w.offset_kind == MINIMUM;
    const __m512 minimum = lifted ? load16(w.offset, at, w.scale_type) : _mm512_setzero_ps();
    for (int64_t col = 0; col < w.group; col += 4 * n_quads, codes += n_quads * QUAD * BITS / 8) {
      __m512i code[n_quads];
      prefetch(codes, n_quads * QUAD * BITS / 8);
      quads<V, BITS>(codes, code);
      for (int q = 0; q < n_quads; q++)
        for (int half = 0; half < 2; half++, to += 32) {
          __m512 pair[2];
          for (int j = 0; j < 2; j++) {
            __m512i index = _mm512_srli_epi32(code[q], unsigned(16 * half + 8 * j));
            __m512 value;
            if constexpr (BITS <= 4) {
              value = _mm512_permutexvar_ps(index, table);
            } else {
              index = _mm512_and_si512(index, _mm512_set1_epi32(255));
              value = w.levels ? _mm512_i32gather_ps(index, w.levels, 4) : _mm512_cvtepi32_ps(index);
            }
            if (BITS > 4 ? !w.levels : w.offset_kind == ZERO_POINT) value = _mm512_sub_ps(value, less);
            value = _mm512_mul_ps(value, scale);
            pair[j] = lifted ? _mm512_add_ps(value, minimum) : value;
          }
          const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(pair[1], pair[0]);
          const __m512i both = _mm512_permutexvar_epi16(side_by_side, halves);
          _mm512_storeu_si512(to, both);
        }
    }
  }
  for (int64_t col = w.padded; col % 32; col += 2, to += 32) _mm512_storeu_si512(to, _mm512_setzero_si512());
}

void halves(const Matrix& w, const Tiled& a, int64_t tile, int8_t* weights, float* out) {
  uint16_t* to = reinterpret_cast<uint16_t*>(weights);
  switch (w.bits) {
    case 2: unpack_halves<2>(w, tile, to); break;
    case 3: unpack_halves<3>(w, tile, to); break;
    case 4: unpack_halves<4>(w, tile, to); break;
    case 5: unpack_halves<5>(w, tile, to); break;
    case 6: unpack_halves<6>(w, tile, to); break;
    case 7: unpack_halves<7>(w, tile, to); break;
    default: unpack_halves<8>(w, tile, to);
  }
  settle();
  for (int64_t b = 0; b < a.blocks; b += 6) {
    const int n = int(a.blocks - b < 6 ? a.blocks - b : 6);
    clear(n);
    for (int64_t k = 0; k < a.part_bytes; k += 1024) {
      _tile_loadd(7, weights + k, 64);
      step_halves(n, a.x + b * a.part_bytes + k, a.part_bytes, 64);
    }
    keep(n, reinterpret_cast<int32_t*>(out + b * 256));
  }
  settle();
}

void finish(const float* sums, int64_t m, int64_t n_rows, int64_t row, int64_t rows, const float* x_scale,
            int64_t scale_step, const void* bias, void* y, int type) {
  alignas(64) float biases[16] = {};
  for (int64_t i = 0; bias && i < n_rows; i++) biases[i] = load(static_cast<const uint8_t*>(bias), row + i, type);
  const __m512 added = _mm512_load_ps(biases);
  const __mmask16 kept = __mmask16((1u << n_rows) - 1);
  for (int64_t i = 0; i < m; i++) {
    __m512 value = _mm512_loadu_ps(sums + i * 16);
    if (x_scale) value = _mm512_mul_ps(value, _mm512_set1_ps(x_scale[i * scale_step]));
    store16(y, i * rows + row, bias ? _mm512_add_ps(value, added) : value, type, kept);
  }
}

void release() { _tile_release(); }

const Wide wide = {configure, release, integers<1>, integers<PARTS>, halves, finish};

// The system hands out the tiles' registers on request, once for the process.
bool permitted() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

const Wide* amx() {
  static const Wide* found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool known = avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d);
    constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    return known && __builtin_cpu_supports("avx512bf16") && (d & needed) == needed && permitted() ? &wide : nullptr;
  }();
  return found;
}

}  // namespace whit

#else

namespace whit {
const Wide* amx() { return nullptr; }
}  // namespace whit

#endif

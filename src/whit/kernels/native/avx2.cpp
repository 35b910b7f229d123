// AVX2 with FMA and F16C. A register holds eight rows, a tile is two of them.
#include "whit.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

namespace whit {
namespace {

#define WHIT_INLINE inline __attribute__((always_inline))

#include "portable.h"

constexpr int64_t AHEAD = 2048;

WHIT_INLINE void prefetch(const uint8_t* from, int64_t n) {
  for (int64_t line = 0; line < n; line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(from + line + AHEAD), _MM_HINT_T0);
}

struct V {
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int ROWS = 8;
  static constexpr bool SIGNED = false;

  static WHIT_INLINE Bytes load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static WHIT_INLINE Bytes no_bytes() { return _mm256_setzero_si256(); }
  static WHIT_INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  template <int WIDTH, int FROM, int TO>
  static WHIT_INLINE Bytes place(Bytes bytes) {
    if constexpr (FROM > TO) bytes = _mm256_srli_epi16(bytes, FROM - TO);
    if constexpr (FROM < TO) bytes = _mm256_slli_epi16(bytes, TO - FROM);
    return _mm256_and_si256(bytes, _mm256_set1_epi8(char(((1 << WIDTH) - 1) << TO)));
  }
  static WHIT_INLINE Bytes table(const uint8_t* at) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static WHIT_INLINE Bytes lookup(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
  // SMALL: codes below 128, so that two products fit 16 bits (127 * 128 * 2 = 32512)
  template <bool SMALL>
  static WHIT_INLINE Ints dot(Ints sum, Bytes codes, const int8_t* x) {
    const __m256i four = _mm256_set1_epi32(four_of(x));
    if constexpr (SMALL)
      return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, four), _mm256_set1_epi16(1)));
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(four, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
  static WHIT_INLINE Ints ints(int32_t value) { return _mm256_set1_epi32(value); }
  static WHIT_INLINE Ints widened(const uint8_t* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
  static WHIT_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static WHIT_INLINE Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static WHIT_INLINE Ints times(Ints a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
  static WHIT_INLINE Ints times_256(Ints a) { return _mm256_slli_epi32(a, 8); }
  static WHIT_INLINE Floats converted(Ints a) { return _mm256_cvtepi32_ps(a); }
  static WHIT_INLINE Floats floats(float value) { return _mm256_set1_ps(value); }
  static WHIT_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static WHIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static WHIT_INLINE Floats load_floats(const uint8_t* base, int64_t at, int type) {
    if (type == F16) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(base + 2 * at)));
    if (type == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(base + 4 * at));
    float values[8];
    for (int i = 0; i < 8; i++) values[i] = whit::load(base, at + i, type);
    return _mm256_loadu_ps(values);
  }
  static WHIT_INLINE void store(float* out, Floats value) { _mm256_storeu_ps(out, value); }
};

#include "integers.h"

// Levels that are no integers, looked up as float32.
template <int BITS, int M>
void tile_gathered(const Matrix& w, const Activations& a, int64_t tile, int64_t first, float* out) {
  constexpr int n_quads = quads_of<BITS>;
  constexpr int64_t block = 4 * n_quads, block_bytes = block * LANES * BITS / 8;
  constexpr int64_t longest = 512;  // short sums err less
  for (int h = 0; h < 2; h++) {
    const uint8_t* codes = w.codes + tile * w.row_bytes + h * 32;
    __m256 y[M];
    for (int i = 0; i < M; i++) y[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < w.groups; g++) {
      const int64_t at = (tile * w.groups + g) * LANES + h * 8, end = (g + 1) * w.group;
      const __m256 scale = _mm256_mul_ps(V::load_floats(w.scale, at, w.scale_type), _mm256_set1_ps(w.unit));
      for (int64_t col = g * w.group; col < end;) {
        const int64_t stop = col + longest < end ? col + longest : end;
        __m256 sums[M];
        for (int i = 0; i < M; i++) sums[i] = _mm256_setzero_ps();
        for (; col < stop; col += block, codes += block_bytes) {
          __m256i code[n_quads];
          quads<V, BITS>(codes, code);
          for (int q = 0; q < n_quads; q++)
            for (int j = 0; j < 4; j++) {
              const __m256i index = _mm256_and_si256(_mm256_srli_epi32(code[q], 8 * j), _mm256_set1_epi32(255));
              const __m256 level = _mm256_i32gather_ps(w.levels, index, 4);
              for (int i = 0; i < M; i++)
                sums[i] = _mm256_fmadd_ps(level, _mm256_set1_ps(a.x[(first + i) * a.stride + col + 4 * q + j]), sums[i]);
            }
        }
        for (int i = 0; i < M; i++) y[i] = _mm256_fmadd_ps(scale, sums[i], y[i]);
      }
    }
    for (int i = 0; i < M; i++) _mm256_storeu_ps(out + i * LANES + h * 8, y[i]);
  }
}

template <int BITS, int M>
struct Gathered {
  static Rows of(const Matrix&) { return tile_gathered<BITS, M>; }
};

template <int BITS, int M>
struct Integers {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, 1>(w); }
};

template <int BITS, int M>
struct Fixed {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, PARTS>(w); }
};

void tile_float(const Matrix& w, const Activations& a, int64_t tile, int64_t first, int64_t n, float* out) {
  if (w.levels) return tiles_of<Gathered>(w, a, tile, first, n, out);
  plain_tile_float(w, a, tile, first, n, out);  // integers come here only with x that is not finite
}

// The levels of one table, looked up for eight columns.
template <int BITS>
struct Book {
  using Floats = __m256;
  static constexpr int COLUMNS = 8;
  __m256 low, high;
  float levels[BITS == 8 ? 256 : 1];

  static WHIT_INLINE __m256 eight(const uint16_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  WHIT_INLINE void read(const uint16_t* book) {
    if constexpr (BITS == 8) {
      for (int i = 0; i < 256; i += 8) _mm256_storeu_ps(levels + i, eight(book + i));
    } else if constexpr (BITS == 2) {  // repeated, so that higher bits of an index do not matter
      int64_t four;
      memcpy(&four, book, 8);
      low = _mm256_cvtph_ps(_mm_set1_epi64x(four));
    } else {
      low = eight(book);
      if constexpr (BITS == 4) high = eight(book + 8);
    }
  }
  // Field `f` (of WIDTH bits) of eight bytes; `third` holds the bits that three-bit codes have beyond it.
  template <int WIDTH>
  WHIT_INLINE __m256 at(const uint8_t* bytes, int f, const uint8_t* third) const {
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    if constexpr (BITS == 8) return _mm256_i32gather_ps(levels, code, 4);
    code = _mm256_srli_epi32(code, WIDTH * f);
    if constexpr (BITS == 3) {
      const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
      const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*third), bit), bit);
      code = _mm256_and_si256(code, _mm256_set1_epi32(3));
      code = _mm256_or_si256(code, _mm256_and_si256(set, _mm256_set1_epi32(4)));
    }
    const __m256 value = _mm256_permutevar8x32_ps(low, code);
    if constexpr (BITS < 4) return value;
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // the fourth bit as a sign
    return _mm256_blendv_ps(value, _mm256_permutevar8x32_ps(high, code), upper);
  }
  static WHIT_INLINE Floats none() { return _mm256_setzero_ps(); }
  static WHIT_INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static WHIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static WHIT_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static WHIT_INLINE float total(Floats a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
};

#include "books.h"

const Kernels kernels = {"avx2", false,    tile_float,       tiles_of<Integers>, tiles_of<Fixed>, plain_fixed,
                         row_float<Book>, plain_row_beside, plain_unpack,       plain_decode};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

const Kernels* avx2() {
  __builtin_cpu_init();
  const bool all = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return all ? &kernels : nullptr;
}

}  // namespace whit

#else

namespace whit {
const Kernels* avx2() { return nullptr; }
}  // namespace whit

#endif

// AVX-512 with VNNI. A register holds sixteen rows: four codes of each as bytes, or one value of each as float32.
//
// Float activations meet integer levels in fixed point: x becomes three int8 digits and a power of two per segment of at
// most 128 columns, and three integer products replace the conversion of every code to float32. What is lost is at most
// 2^-22 of the segment's largest |x| (2^-15 with the two digits that x of 16 bits gets); the sums are exact. bfloat16 products were slower than float32 ones here.
#include "whit.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")
#endif

namespace whit {
namespace {

constexpr int64_t FLOAT_SEGMENT = 512;  // columns after which a float sum is put aside: short sums err less

#include "vectors512.h"

enum Way { LOOK_UP, CONVERT, GATHER };

// Column J of a quad as float32, less `less` (for CONVERT with 2^23 added to it).
template <int BITS, Way WAY, int J>
WHIT_INLINE __m512 column(__m512i code, __m512 table, __m512 less, bool shifted, const float* levels) {
  if constexpr (J > 0) code = _mm512_srli_epi32(code, 8 * J);
  if constexpr (WAY == LOOK_UP) {
    const __m512 value = _mm512_permutexvar_ps(code, table);
    return shifted ? _mm512_sub_ps(value, less) : value;
  }
  if constexpr (WAY == GATHER)
    return _mm512_i32gather_ps(_mm512_and_si512(code, _mm512_set1_epi32(255)), levels, 4);
  // the integer as the last bits of 2^23 + integer: (code & 255) | 2^23's bits
  const __m512i bits = _mm512_ternarylogic_epi32(code, _mm512_set1_epi32(255), _mm512_set1_epi32(0x4b000000), 0xea);
  return _mm512_sub_ps(_mm512_castsi512_ps(bits), less);
}

// float32 products, for levels or processors that bfloat16 does not serve.
template <int BITS, int M, Way WAY>
void tile_singles(const Matrix& w, const Activations& a, int64_t tile, int64_t first, float* out) {
  constexpr int n_quads = quads_of<BITS>;
  constexpr int64_t block = 4 * n_quads, block_bytes = block * LANES * BITS / 8;
  const bool shifted = w.offset_kind == ZERO_POINT;
  const __m512 table = _mm512_loadu_ps(w.values);
  const uint8_t* codes = w.codes + tile * w.row_bytes;
  __m512 y[M];
  for (int i = 0; i < M; i++) y[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t at = (tile * w.groups + g) * LANES, end = (g + 1) * w.group;
    __m512 less = _mm512_set1_ps(float(w.zero));
    if (shifted) less = _mm512_cvtepi32_ps(bytes16(w.offset + at));
    if constexpr (WAY == CONVERT) less = _mm512_add_ps(less, _mm512_set1_ps(8388608.0f));
    __m512 sums[M];
    for (int i = 0; i < M; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t col = g * w.group; col < end;) {
      const int64_t stop = col + FLOAT_SEGMENT < end ? col + FLOAT_SEGMENT : end;
      __m512 part[M][2];
      for (int i = 0; i < M; i++) part[i][0] = part[i][1] = _mm512_setzero_ps();
      for (; col < stop; col += block, codes += block_bytes) {
        __m512i code[n_quads];
        prefetch(codes, block_bytes);
        quads<V, BITS>(codes, code);
        for (int q = 0; q < n_quads; q++) {
          const __m512 value[4] = {column<BITS, WAY, 0>(code[q], table, less, shifted, w.levels),
                                   column<BITS, WAY, 1>(code[q], table, less, shifted, w.levels),
                                   column<BITS, WAY, 2>(code[q], table, less, shifted, w.levels),
                                   column<BITS, WAY, 3>(code[q], table, less, shifted, w.levels)};
          for (int i = 0; i < M; i++) {
            const float* x = a.x + (first + i) * a.stride + col + 4 * q;
            for (int j = 0; j < 4; j++)
              part[i][j & 1] = _mm512_fmadd_ps(value[j], _mm512_set1_ps(x[j]), part[i][j & 1]);
          }
        }
      }
      for (int i = 0; i < M; i++) sums[i] = _mm512_add_ps(sums[i], _mm512_add_ps(part[i][0], part[i][1]));
    }
    const __m512 scale = scale16(w, at);
    for (int i = 0; i < M; i++) y[i] = _mm512_fmadd_ps(scale, sums[i], y[i]);
    if (w.offset_kind == MINIMUM) {
      const __m512 minimum = load16(w.offset, at, w.scale_type);
      for (int i = 0; i < M; i++)
        y[i] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(a.sums[(first + i) * w.groups + g]), y[i]);
    }
  }
  for (int i = 0; i < M; i++) _mm512_storeu_ps(out + i * LANES, y[i]);
}

// Fixed point: q = x / scale in 8 bits a part, as digits of base 256 from -128 to 127.
template <int P>
void fixed(const float* x, int64_t n, int8_t* digits, Places to, float* scale, int32_t* sums) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16)
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
  const int exponent = exponent_of(_mm512_reduce_max_epu32(most));
  constexpr int bits = 8 * P - 2;
  *scale = power_of_two(exponent - bits);
  const __m512 inverse = _mm512_set1_ps(power_of_two(bits - exponent));
  __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
  const __m512i half = _mm512_set1_epi32(128);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, half), 8);
    const __m512i high = P == 3 ? _mm512_srai_epi32(_mm512_add_epi32(upper, half), 8) : upper;
    high_sum = _mm512_add_epi32(high_sum, high);
    low_sum = _mm512_add_epi32(low_sum, _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8 * (P - 1))));
    // the low byte of each is its digit
    __m128i part[P];
    part[0] = _mm512_cvtepi32_epi8(high);
    if constexpr (P == 3) part[1] = _mm512_cvtepi32_epi8(upper);
    part[P - 1] = _mm512_cvtepi32_epi8(q);
    if (to.depth >= 16) {
      for (int p = 0; p < P; p++)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + to.at(i) + p * to.part), part[p]);
      continue;
    }
    if constexpr (P == 2) {
      if (to.depth == 4 && to.part == 4 && to.step == 8) {  // digits of four columns take turns
        int8_t* at = digits + to.at(i);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_unpacklo_epi32(part[0], part[1]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + 16), _mm_unpackhi_epi32(part[0], part[1]));
        continue;
      }
    }
    alignas(16) int32_t fours[P][4];
    for (int p = 0; p < P; p++) _mm_store_si128(reinterpret_cast<__m128i*>(fours[p]), part[p]);
    for (int j = 0; j < 4; j++)
      for (int p = 0; p < P; p++) memcpy(digits + to.at(i + 4 * j) + p * to.part, &fours[p][j], 4);
  }
  sums[0] = _mm512_reduce_add_epi32(high_sum);
  sums[1] = _mm512_reduce_add_epi32(low_sum);
}

template <int BITS, int M>
struct Floats {
  static Rows of(const Matrix& w) {
    if constexpr (BITS <= 4) return tile_singles<BITS, M, LOOK_UP>;
    else return w.levels ? tile_singles<BITS, M, GATHER> : tile_singles<BITS, M, CONVERT>;
  }
};

template <int BITS, int M>
struct Integers {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, 1>(w); }
};

template <int BITS, int M>
struct Fixed {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, PARTS>(w); }
};

template <int BITS, int M>
struct Halves {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, HALF_PARTS>(w); }
};

// STREAMS tiles for one row of x: out [STREAMS][16].
template <int P>
void streams_of(const Matrix& w, const Activations& a, int64_t tile, float* out) {
  switch (w.bits) {
    case 2: return integers_of<V, 2, 1, P, STREAMS>(w)(w, a, tile, 0, out);
    case 3: return integers_of<V, 3, 1, P, STREAMS>(w)(w, a, tile, 0, out);
    case 4: return integers_of<V, 4, 1, P, STREAMS>(w)(w, a, tile, 0, out);
    case 5: return integers_of<V, 5, 1, P, STREAMS>(w)(w, a, tile, 0, out);
    case 6: return integers_of<V, 6, 1, P, STREAMS>(w)(w, a, tile, 0, out);
    case 7: return integers_of<V, 7, 1, P, STREAMS>(w)(w, a, tile, 0, out);
    default: return integers_of<V, 8, 1, P, STREAMS>(w)(w, a, tile, 0, out);
  }
}

// The levels of one table, looked up for sixteen columns.
template <int BITS>
struct Book {
  using Floats = __m512;
  static constexpr int COLUMNS = 16;
  __m512 table;

  WHIT_INLINE void read(const uint16_t* book) {  // repeated, so that higher bits of an index do not matter
    __m256i halves;
    if constexpr (BITS == 4) {
      halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(book));
    } else if constexpr (BITS == 3) {
      halves = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book)));
    } else {
      int64_t four;
      memcpy(&four, book, 8);
      halves = _mm256_set1_epi64x(four);
    }
    table = _mm512_cvtph_ps(halves);
  }
  // Field `f` (of WIDTH bits) of sixteen bytes; `third` holds the bits that three-bit codes have beyond it.
  template <int WIDTH>
  WHIT_INLINE __m512 at(const uint8_t* bytes, int f, const uint8_t* third) const {
    __m512i code = bytes16(bytes);
    if (f) code = _mm512_srli_epi32(code, unsigned(WIDTH * f));
    if constexpr (BITS == 3) {
      uint16_t high;
      memcpy(&high, third, 2);
      code = _mm512_and_si512(code, _mm512_set1_epi32(3));
      code = _mm512_mask_add_epi32(code, __mmask16(high), code, _mm512_set1_epi32(4));
    }
    return _mm512_permutexvar_ps(code, table);
  }
  static WHIT_INLINE Floats none() { return _mm512_setzero_ps(); }
  static WHIT_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static WHIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static WHIT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static WHIT_INLINE float total(Floats a) { return _mm512_reduce_add_ps(a); }
};

struct Pair {
  __m512 low, high;
};

// 256 levels are eight registers of half precision; 32 columns look up all four quarters, which is faster than a gather.
template <>
struct Book<8> {
  using Floats = Pair;
  static constexpr int COLUMNS = 32;
  __m512i halves[8];

  WHIT_INLINE void read(const uint16_t* book) {
    for (int i = 0; i < 8; i++) halves[i] = _mm512_loadu_si512(book + 32 * i);
  }
  template <int>
  WHIT_INLINE Pair at(const uint8_t* bytes, int, const uint8_t*) const {
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __mmask32 second = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
    const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
    __m512i quarter[4];
    for (int i = 0; i < 4; i++) quarter[i] = _mm512_permutex2var_epi16(halves[2 * i], code, halves[2 * i + 1]);
    const __m512i found = _mm512_mask_blend_epi16(upper, _mm512_mask_blend_epi16(second, quarter[0], quarter[1]),
                                                  _mm512_mask_blend_epi16(second, quarter[2], quarter[3]));
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(found)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1))};
  }
  static WHIT_INLINE Pair none() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  static WHIT_INLINE Pair load(const float* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}; }
  static WHIT_INLINE Pair fma(Pair a, Pair b, Pair c) {
    return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
  }
  static WHIT_INLINE Pair add(Pair a, Pair b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
  static WHIT_INLINE float total(Pair a) { return _mm512_reduce_add_ps(_mm512_add_ps(a.low, a.high)); }
};

#include "books.h"

void row_beside(const Matrix& w, const float* x, int64_t n, int64_t row, float* out) {
  __m512 sums[MOST];
  for (int64_t k = 0; k < n; k++) sums[k] = _mm512_setzero_ps();
  for (int64_t from = 0; from < w.count; from += 16) {
    const int64_t left = w.count - from, at = row * w.count + from;
    const __mmask16 kept = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    const __m512i columns = w.column_bytes == 2
                                ? _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(kept, w.columns + 2 * at))
                                : _mm512_maskz_loadu_epi32(kept, w.columns + 4 * at);
    const __m512 values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kept, w.beside + at));
    for (int64_t k = 0; k < n; k++) {
      const __m512 some = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kept, columns, x + k * w.padded, 4);
      sums[k] = _mm512_fmadd_ps(values, some, sums[k]);
    }
  }
  for (int64_t k = 0; k < n; k++) out[k] += _mm512_reduce_add_ps(sums[k]);
}

// 16 x 16 words transposed, and the first `n` words of each row of the result stored.
WHIT_INLINE void transpose(__m512i* r, uint8_t* to, int64_t stride, __mmask16 kept) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    _mm512_mask_storeu_epi32(to + i * stride, kept, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_mask_storeu_epi32(to + (i + 8) * stride, kept, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

template <int BITS>
void unpack_of(const Matrix& w, int64_t tile, uint8_t* codes) {
  constexpr int n = quads_of<BITS>;
  const uint8_t* at = w.codes + tile * w.row_bytes;
  for (int64_t col = 0; col < w.padded; col += 64) {
    __m512i words[16];
    int64_t filled = 0;
    for (int i = 0; i < 16; i += n) {
      if (col + 4 * i >= w.padded) {
        for (int j = 0; j < n; j++) words[i + j] = _mm512_setzero_si512();
        continue;
      }
      quads<V, BITS>(at, words + i);
      at += n * QUAD * BITS / 8;
      filled = i + n;
    }
    transpose(words, codes + col, w.padded, __mmask16((1u << filled) - 1));
  }
}

void unpack(const Matrix& w, int64_t tile, uint8_t* codes) {
  static void (*const of_bits[])(const Matrix&, int64_t, uint8_t*) = {
      unpack_of<2>, unpack_of<3>, unpack_of<4>, unpack_of<5>, unpack_of<6>, unpack_of<7>, unpack_of<8>};
  of_bits[w.bits - 2](w, tile, codes);
}

void decode_row(const Matrix& w, const uint8_t* codes, int64_t row, void* out, int type) {
  alignas(64) float levels[256] = {};
  for (int64_t from = 0; from < w.cols; from += w.group) {
    const uint16_t* book = book_of(w, row, from);
    for (int i = 0; i < 1 << w.bits; i++) levels[i] = from_f16(book[i]);
    const __m512 table = _mm512_load_ps(levels);
    const int64_t end = from + w.group < w.cols ? from + w.group : w.cols;
    for (int64_t col = from; col < end; col += 16) {
      const __m512i code = bytes16(codes + col);
      const __m512 value = w.bits <= 4 ? _mm512_permutexvar_ps(code, table) : _mm512_i32gather_ps(code, levels, 4);
      store16(out, col, value, type, end - col >= 16 ? __mmask16(0xffff) : __mmask16((1u << (end - col)) - 1));
    }
  }
}

void decode(const Matrix& w, const uint8_t* codes, int64_t tile, int64_t lane, void* out, int type) {
  if (w.books) return decode_row(w, codes, tile, out, type);
  alignas(64) float levels[16] = {};
  const bool small = w.bits <= 4, shifted = w.offset_kind == ZERO_POINT;
  for (int i = 0; small && i < 1 << w.bits; i++)
    levels[i] = w.levels ? w.levels[i] : float(i - w.zero);
  const __m512 table = _mm512_load_ps(levels), zero = _mm512_set1_ps(float(w.zero));
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t at = (tile * w.groups + g) * LANES + lane;
    const __m512 scale = _mm512_set1_ps(load(w.scale, at, w.scale_type) * w.unit);
    const __m512 point = _mm512_set1_ps(shifted ? float(w.offset[at]) : 0.0f);
    const __m512 minimum = _mm512_set1_ps(w.offset_kind == MINIMUM ? load(w.offset, at, w.scale_type) : 0.0f);
    const int64_t end = (g + 1) * w.group < w.cols ? (g + 1) * w.group : w.cols;
    for (int64_t col = g * w.group; col < end; col += 16) {
      const __m512i code = bytes16(codes + col);  // buffers are padded to blocks of at least sixteen
      __m512 value;
      if (small) value = _mm512_permutexvar_ps(code, table);
      else if (w.levels) value = _mm512_i32gather_ps(code, w.levels, 4);
      else value = _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero);
      if (shifted) value = _mm512_sub_ps(value, point);
      value = _mm512_mul_ps(value, scale);
      if (w.offset_kind == MINIMUM) value = _mm512_add_ps(value, minimum);
      store16(out, col, value, type, end - col >= 16 ? __mmask16(0xffff) : __mmask16((1u << (end - col)) - 1));
    }
  }
}

constexpr Kernels kernels = {"avx512-vnni", false, tiles_of<Floats>, tiles_of<Integers>, tiles_of<Fixed>, fixed<PARTS>,
                             row_float<Book>, row_beside, unpack, decode, nullptr, nullptr, tiles_of<Halves>,
                             fixed<HALF_PARTS>, nullptr, amx};

constexpr Kernels with_streams() {
  Kernels k = kernels;
  k.name = "avx512-vnni, four tiles";
  k.streams_int8 = streams_of<1>, k.streams_fixed = streams_of<PARTS>, k.streams_half = streams_of<HALF_PARTS>;
  return k;
}

constexpr Kernels four_tiles = with_streams();

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace {

// Asked of any processor, and so outside of what is compiled for those that have it.
bool usable() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

}  // namespace

const Kernels* avx512() { return usable() ? &kernels : nullptr; }
const Kernels* avx512_four_tiles() { return usable() ? &four_tiles : nullptr; }

}  // namespace whit

#else

namespace whit {
const Kernels* avx512() { return nullptr; }
const Kernels* avx512_four_tiles() { return nullptr; }
}  // namespace whit

#endif

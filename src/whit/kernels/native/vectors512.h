// Sixteen rows, or sixteen columns, in a register of AVX-512. Included where the instruction set is turned on.

#define WHIT_INLINE inline __attribute__((always_inline))

// Bytes that are asked for ahead of their use: the hardware's own prefetching stops at every page of 4 KiB, and without
// this a matrix that comes from memory takes a third longer. AMD's processors can pass by the second-level cache, which
// leaves there what the rest of a model needs; on Intel's that takes twice the time.
constexpr int64_t AHEAD = 4096, AHEAD_PASSING_BY = 6144;

WHIT_INLINE void prefetch(const uint8_t* from, int64_t n) {
  const char* at = reinterpret_cast<const char*>(from);
  if (AMD)
    for (int64_t line = 0; line < n; line += 64) _mm_prefetch(at + line + AHEAD_PASSING_BY, _MM_HINT_NTA);
  else
    for (int64_t line = 0; line < n; line += 64) _mm_prefetch(at + line + AHEAD, _MM_HINT_T1);
}

WHIT_INLINE __m512i bytes16(const uint8_t* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// Sixteen stored floats from `index` on.
WHIT_INLINE __m512 load16(const uint8_t* base, int64_t index, int type) {
  if (type == F16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + 2 * index)));
  if (type == F32) return _mm512_loadu_ps(base + 4 * index);
  if (type == BF16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + 2 * index));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  const __m512i byte = bytes16(base + index);
  const __m512i nan = _mm512_set1_epi32(0x7fc00000);
  if (type == E8M0) {
    __m512i value = _mm512_slli_epi32(byte, 23);
    value = _mm512_mask_mov_epi32(value, _mm512_testn_epi32_mask(byte, byte), _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255)), nan));
  }
  const __m512i rest = _mm512_and_si512(byte, _mm512_set1_epi32(0x7f));
  const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(rest, 20), _mm512_set1_epi32(120 << 23));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(rest), _mm512_set1_ps(0.001953125f));
  __m512i value = _mm512_mask_mov_epi32(normal, _mm512_cmplt_epi32_mask(rest, _mm512_set1_epi32(8)),
                                        _mm512_castps_si512(small));
  value = _mm512_mask_mov_epi32(value, _mm512_cmpeq_epi32_mask(rest, _mm512_set1_epi32(0x7f)), nan);
  return _mm512_castsi512_ps(
      _mm512_or_si512(value, _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(0x80)), 24)));
}

WHIT_INLINE __m512 scale16(const Matrix& w, int64_t at) {
  prefetch(w.scale + at * bytes_of(w.scale_type), 1);
  const __m512 scale = load16(w.scale, at, w.scale_type);
  return w.unit == 1.0f ? scale : _mm512_mul_ps(scale, _mm512_set1_ps(w.unit));
}

struct V {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int ROWS = 16;
  static constexpr bool SIGNED = false;

  static WHIT_INLINE Bytes load(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static WHIT_INLINE Bytes no_bytes() { return _mm512_setzero_si512(); }
  static WHIT_INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  // Bits FROM .. FROM + WIDTH of every byte, moved to TO.
  template <int WIDTH, int FROM, int TO>
  static WHIT_INLINE Bytes place(Bytes bytes) {
    if constexpr (FROM > TO) bytes = _mm512_srli_epi16(bytes, FROM - TO);
    if constexpr (FROM < TO) bytes = _mm512_slli_epi16(bytes, TO - FROM);
    return _mm512_and_si512(bytes, _mm512_set1_epi8(char(((1 << WIDTH) - 1) << TO)));
  }
  static WHIT_INLINE Bytes table(const uint8_t* at) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static WHIT_INLINE Bytes lookup(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }
  // Four x for all rows, repeated by the instruction itself, which compilers make two of.
  template <bool SMALL>
  static WHIT_INLINE Ints dot(Ints sum, Bytes codes, const int8_t* x) {
    typedef int32_t __attribute__((may_alias, aligned(1))) Four;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Four*>(x)));
    return sum;
  }
  static WHIT_INLINE Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
  static WHIT_INLINE Ints widened(const uint8_t* at) { return bytes16(at); }
  static WHIT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static WHIT_INLINE Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static WHIT_INLINE Ints times(Ints a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
  static WHIT_INLINE Ints times_256(Ints a) { return _mm512_slli_epi32(a, 8); }
  static WHIT_INLINE Floats converted(Ints a) { return _mm512_cvtepi32_ps(a); }
  static WHIT_INLINE Floats floats(float value) { return _mm512_set1_ps(value); }
  static WHIT_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static WHIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static WHIT_INLINE Floats load_floats(const uint8_t* base, int64_t at, int type) { return load16(base, at, type); }
  static WHIT_INLINE void store(float* out, Floats value) { _mm512_storeu_ps(out, value); }
};

#include "integers.h"

WHIT_INLINE void store16(void* out, int64_t at, __m512 value, int type, __mmask16 kept) {
  if (type == F32) {
    _mm512_mask_storeu_ps(static_cast<float*>(out) + at, kept, value);
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(out) + at;
  if (type == F16) {
    _mm256_mask_storeu_epi16(halves, kept, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
  const __m512i bits = _mm512_castps_si512(value);  // to nearest, ties to even; the instruction would lose tiny numbers
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), bits,
                                 _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(halves, kept, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// ARM with dot products of int8 (ARMv8.2 and later). A register holds four rows, a tile is four of them.
#include "whit.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace whit {
namespace {

#define WHIT_INLINE inline __attribute__((always_inline))

#include "portable.h"

WHIT_INLINE void prefetch(const uint8_t* from, int64_t n) {
  for (int64_t line = 0; line < n; line += 64) __builtin_prefetch(from + line + 2048);
}

struct V {
  using Bytes = uint8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int ROWS = 4;
  static constexpr bool SIGNED = true;

  static WHIT_INLINE Bytes load(const uint8_t* at) { return vld1q_u8(at); }
  static WHIT_INLINE Bytes no_bytes() { return vdupq_n_u8(0); }
  static WHIT_INLINE Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  template <int WIDTH, int FROM, int TO>
  static WHIT_INLINE Bytes place(Bytes bytes) {
    if constexpr (FROM > TO) bytes = vshrq_n_u8(bytes, FROM - TO);
    if constexpr (FROM < TO) bytes = vshlq_n_u8(bytes, TO - FROM);
    return vandq_u8(bytes, vdupq_n_u8(uint8_t(((1 << WIDTH) - 1) << TO)));
  }
  static WHIT_INLINE Bytes table(const uint8_t* at) { return vld1q_u8(at); }
  static WHIT_INLINE Bytes lookup(Bytes table, Bytes codes) { return vqtbl1q_u8(table, codes); }
  static WHIT_INLINE Bytes flip(Bytes codes) { return veorq_u8(codes, vdupq_n_u8(128)); }
  template <bool SMALL>
  static WHIT_INLINE Ints dot(Ints sum, Bytes codes, const int8_t* x) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(codes), vreinterpretq_s8_s32(vdupq_n_s32(four_of(x))));
  }
  static WHIT_INLINE Ints ints(int32_t value) { return vdupq_n_s32(value); }
  static WHIT_INLINE Ints widened(const uint8_t* at) {
    const int32_t values[4] = {at[0], at[1], at[2], at[3]};
    return vld1q_s32(values);
  }
  static WHIT_INLINE Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static WHIT_INLINE Ints sub(Ints a, Ints b) { return vsubq_s32(a, b); }
  static WHIT_INLINE Ints times(Ints a, int32_t b) { return vmulq_n_s32(a, b); }
  static WHIT_INLINE Ints times_256(Ints a) { return vshlq_n_s32(a, 8); }
  static WHIT_INLINE Floats converted(Ints a) { return vcvtq_f32_s32(a); }
  static WHIT_INLINE Floats floats(float value) { return vdupq_n_f32(value); }
  static WHIT_INLINE Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static WHIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static WHIT_INLINE Floats load_floats(const uint8_t* base, int64_t at, int type) {
    if (type == F16) return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(base + 2 * at)));
    float values[4];
    for (int i = 0; i < 4; i++) values[i] = whit::load(base, at + i, type);
    return vld1q_f32(values);
  }
  static WHIT_INLINE void store(float* out, Floats value) { vst1q_f32(out, value); }
};

#include "integers.h"

template <int BITS, int M>
struct Integers {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, 1>(w); }
};

template <int BITS, int M>
struct Fixed {
  static Rows of(const Matrix& w) { return integers_of<V, BITS, M, PARTS>(w); }
};

const Kernels kernels = {"neon", true,          plain_tile_float, tiles_of<Integers>, tiles_of<Fixed>, plain_fixed,
                         plain_row_float, plain_row_beside, plain_unpack,       plain_decode};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

const Kernels* neon() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1 << 20) ? &kernels : nullptr;  // HWCAP_ASIMDDP
#else
  return &kernels;  // every processor of Apple's that runs this has them
#endif
}

}  // namespace whit

#else

namespace whit {
const Kernels* neon() { return nullptr; }
}  // namespace whit

#endif

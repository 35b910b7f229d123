// Nearest rounding under the range rule, one group or superblock after the other. Compiled once per instruction set; the
// loops are plain so that each makes vectors of them. Operations and their order are those of the same rules in torch
// (grids/scaled.py, grids/superblock.py): both give the same bits.

// Magnitudes as integers order like the numbers, NaN above all: a maximum of them also tells whether all are finite.
WHIT_INLINE int32_t magnitude(float value) { return int32_t(to_bits(value) & 0x7fffffff); }
WHIT_INLINE int32_t ordered(float value) {  // integers that order like the numbers do
  const int32_t bits = int32_t(to_bits(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
WHIT_INLINE float unordered(int32_t key) { return from_bits(uint32_t(key ^ ((key >> 31) & 0x7fffffff))); }

constexpr int32_t NOT_FINITE = 0x7f800000;

// n numbers from `at` on as float32; the largest magnitude.
WHIT_INLINE int32_t take(const void* x, int type, int64_t at, int64_t n, float* out) {
  int32_t most = 0;
  if (type == F32) {
    memcpy(out, static_cast<const float*>(x) + at, size_t(n) * 4);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(x) + at;
    if (type == BF16) {
      for (int64_t i = 0; i < n; i++) out[i] = from_bf16(half[i]);
    } else {
      // without a branch: a half's bits, moved to float32's places, are 2^-112 of it; not finite becomes so here, too
      for (int64_t i = 0; i < n; i++) {
        const uint32_t rest = half[i] & 0x7fff;
        const float value = from_bits(rest << 13) * 5.192296858534828e33f;
        out[i] = from_bits(to_bits(value) | uint32_t(half[i] & 0x8000) << 16 | (rest >= 0x7c00 ? NOT_FINITE : 0));
      }
    }
  }
  for (int64_t i = 0; i < n; i++) most = magnitude(out[i]) > most ? magnitude(out[i]) : most;
  return most;
}

WHIT_INLINE void range(const float* x, int64_t n, float& low, float& high) {
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < n; i++) {
    const int32_t key = ordered(x[i]);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  low = unordered(least) + 0.0f, high = unordered(most) + 0.0f;  // no negative zeros
}

// The number of largest magnitude with its sign, the first of several.
WHIT_INLINE float largest_of(const float* x, int64_t n) {
  uint32_t most = 0, both = 0;  // sign last, so that one maximum finds both; no branch that depends on numbers
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = to_bits(x[i]), key = bits << 1 | bits >> 31;
    most = key > most ? key : most;
  }
  const uint32_t size = most >> 1;
  for (int64_t i = 0; i < n; i++) both |= uint32_t(to_bits(x[i]) == size);
  if (both & most & uint32_t(size != 0))
    for (int64_t i = 0; i < n; i++)
      if (uint32_t(magnitude(x[i])) == size) return x[i];
  return from_bits(size ? size | most << 31 : 0);
}

WHIT_INLINE float inverse(float scale) {
  const float found = 1.0f / scale;
  return magnitude(found) >= NOT_FINITE ? 0.0f : found;
}

WHIT_INLINE float to_even(float value) { return std::nearbyintf(value); }

WHIT_INLINE float within(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

// Half precision in which nothing but zero becomes zero.
WHIT_INLINE uint16_t kept_half(float value) {
  const uint16_t half = to_f16(value);
  return (half & 0x7fff) == 0 && value != 0.0f ? uint16_t((half & 0x8000) | 1) : half;
}

// A number as a file stores it; false where it does not fit.
WHIT_INLINE bool put(void* base, int64_t at, float value, int type) {
  store(base, at, value, type);
  return magnitude(load(static_cast<const uint8_t*>(base), at, type)) < NOT_FINITE;
}

// Groups from `first` to `last`: codes, and scales and what stands beside them as they are stored. False where something
// is not finite.
// SIZE is that of all groups where it is known while compiling, else 0.
template <int64_t SIZE>
bool round_groups(const Groups& all, int64_t first, int64_t last, float* x) {
  const int64_t size = SIZE ? SIZE : all.size;
  const float top = float(all.top), low_level = float(all.mirrored - all.zero), high_level = float(all.top - all.zero);
  const float anchor = -low_level > high_level ? low_level : high_level, half = float(all.zero) + 0.5f;
  for (int64_t g = first; g < last; g++) {
    const int32_t most = take(all.x, all.type, g * size, size, x);
    if (most >= NOT_FINITE) return false;
    uint8_t* __restrict codes = all.codes + g * size;
    if (all.offset_kind == NONE) {
      const float scale = (all.mirrored ? from_bits(uint32_t(most)) : largest_of(x, size)) / anchor;
      const float factor = inverse(scale);
      if (!put(all.scale, g, scale, all.scale_type)) return false;
      if (all.mirrored) {
        for (int64_t i = 0; i < size; i++) {
          const float value = x[i] * factor;
          const float below_half = from_bits((to_bits(value) & 0x80000000) | 0x3effffff);
          codes[i] = uint8_t(int32_t(within(value + below_half, low_level, high_level)) + all.zero);
        }
      } else {
        for (int64_t i = 0; i < size; i++) codes[i] = uint8_t(int32_t(within(x[i] * factor + half, 0.0f, top)));
      }
      continue;
    }
    float low, high;
    range(x, size, low, high);
    if (all.offset_kind == ZERO_POINT) {
      low = low < 0 ? low : 0.0f, high = high > 0 ? high : 0.0f;
      const float scale = (high - low) / top, factor = inverse(scale), zero = to_even(-low * factor);
      if (!put(all.scale, g, scale, all.scale_type)) return false;
      static_cast<uint8_t*>(all.offset)[g] = uint8_t(int32_t(zero));
      for (int64_t i = 0; i < size; i++) codes[i] = uint8_t(int32_t(within((x[i] * factor + zero) + 0.5f, 0.0f, top)));
    } else {
      const float scale = (high - low) / top, factor = inverse(scale);
      if (!put(all.scale, g, scale, all.scale_type) || !put(all.offset, g, low, all.scale_type)) return false;
      for (int64_t i = 0; i < size; i++) codes[i] = uint8_t(int32_t(within((x[i] - low) * factor + 0.5f, 0.0f, top)));
    }
  }
  return true;
}

// Superblocks from `first` to `last`. False where something is not finite, stored scales too.
bool round_superblocks(const Superblocks& all, int64_t first, int64_t last) {
  // not known while compiling: loops of sixteen would be unrolled before they became vectors
  const int64_t sub = all.sub, N = SUPERBLOCK / sub;
  const float top = float(all.top), half = float(all.zero) + 0.5f;
  const float anchor = 2 * all.zero > all.top ? -float(all.zero) : float(all.top - all.zero);
  float x[SUPERBLOCK], scale[MOST_SUBS], minimum[MOST_SUBS], s[MOST_SUBS], m[MOST_SUBS];
  for (int64_t b = first; b < last; b++) {
    if (take(all.x, all.type, b * SUPERBLOCK, SUPERBLOCK, x) >= NOT_FINITE) return false;
    if (all.minima) {
      for (int64_t j = 0; j < N; j++) range(x + j * sub, sub, minimum[j], scale[j]);
      for (int64_t j = 0; j < N; j++) {
        minimum[j] = minimum[j] < 0 ? minimum[j] : 0.0f;
        const float width = scale[j] - minimum[j];
        scale[j] = (width > 0 ? width : 0.0f) / top;
      }
    } else {
      for (int64_t j = 0; j < N; j++) scale[j] = largest_of(x + j * sub, sub);
      for (int64_t j = 0; j < N; j++) scale[j] /= anchor;
    }
    float largest = scale[0], least = minimum[0];
    for (int64_t j = 1; j < N; j++) {
      if (all.low < 0 ? magnitude(scale[j]) > magnitude(largest) : scale[j] > largest) largest = scale[j];
      if (all.minima && minimum[j] < least) least = minimum[j];
    }
    const uint16_t d = kept_half(largest / float(all.low < 0 ? all.low : all.high));
    const float d_value = from_f16(d), d_inverse = inverse(d_value);
    all.scale[b] = d;
    float dmin_value = 0, dmin_inverse = 0;
    if (all.minima) {
      const uint16_t dmin = kept_half(-least / float(all.high));
      dmin_value = from_f16(dmin), dmin_inverse = inverse(dmin_value);
      all.minimum[b] = dmin;
    }
    if (magnitude(d_value) >= NOT_FINITE || magnitude(dmin_value) >= NOT_FINITE) return false;
    for (int64_t j = 0; j < N; j++) {
      s[j] = within(to_even(scale[j] * d_inverse), float(all.low), float(all.high));
      all.sub_scale[b * N + j] = int8_t(s[j]);
      if (all.minima) {
        m[j] = within(to_even(-minimum[j] * dmin_inverse), 0.0f, float(all.high));
        all.sub_minimum[b * N + j] = uint8_t(m[j]);
      }
    }
    float factor[MOST_SUBS], offset[MOST_SUBS];
    for (int64_t j = 0; j < N; j++) factor[j] = inverse(d_value * s[j]), offset[j] = all.minima ? dmin_value * m[j] : 0.0f;
    uint8_t* __restrict codes = all.codes + b * SUPERBLOCK;
    if (all.minima)
      for (int64_t j = 0; j < N; j++)
        for (int64_t i = j * sub; i < (j + 1) * sub; i++)
          codes[i] = uint8_t(int32_t(within((x[i] + offset[j]) * factor[j] + half, 0.0f, top)));
    else
      for (int64_t j = 0; j < N; j++)
        for (int64_t i = j * sub; i < (j + 1) * sub; i++)
          codes[i] = uint8_t(int32_t(within(x[i] * factor[j] + half, 0.0f, top)));
  }
  return true;
}

// Bits `shift` and up, `width` of them, of K codes in one byte, the first lowest; codes of a byte are `m` apart.
template <int K>
void join(const uint8_t* codes, int64_t m, int shift, uint8_t* __restrict out) {
  constexpr int width = 8 / K;
  for (int64_t i = 0; i < m; i++) {
    int byte = 0;
    for (int k = 0; k < K; k++) byte |= ((codes[k * m + i] >> shift) & ((1 << width) - 1)) << (k * width);
    out[i] = uint8_t(byte);
  }
}

void join_all(const Codes& all, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    const uint8_t* codes = all.codes + n * all.k * all.m;
    uint8_t* out = all.out + n * all.m;
    if (all.k == 2) join<2>(codes, all.m, all.shift, out);
    if (all.k == 4) join<4>(codes, all.m, all.shift, out);
    if (all.k == 8) join<8>(codes, all.m, all.shift, out);
  }
}

// Fields of records side by side: field k is `widths[k]` bytes of every record.
void interleave(const Fields& all, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; n++) {
    uint8_t* out = all.out + n * all.record;
    for (int k = 0; k < all.n_fields; k++) {
      memcpy(out, all.fields[k] + n * all.widths[k], size_t(all.widths[k]));
      out += all.widths[k];
    }
  }
}

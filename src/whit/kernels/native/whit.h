// What the files of the library share: a packed matrix, activations in the order of the kernels, number formats.
//
// The matrix layout is that of docs/kernels.md. Code for one instruction set includes this header before it turns that
// set on, and calls nothing from it that is not `static inline`, so that no function of another set is merged with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace whit {

constexpr int64_t LANES = 16;   // rows of a tile
constexpr int64_t QUAD = 64;    // codes of four columns of a tile
constexpr int64_t MOST = 4;     // rows of x that one call of a kernel takes
constexpr int64_t SEGMENT = 4096;  // columns that integer sums may run over: 255 * 128 * 4096 < 2^31
constexpr int64_t FIXED = 128;     // the same for x in fixed point: its parts' sums stay exact in float32
constexpr int64_t STREAMS = 4;     // tiles that one thread alone reads at a time for one row of x
constexpr int PARTS = 3;           // int8 digits of x in fixed point
constexpr int HALF_PARTS = 2;      // the same for bfloat16 and float16, which have 8 and 11 bits themselves

enum Type : int { F32 = 0, BF16 = 1, F16 = 2, E8M0 = 3, E4M3 = 4 };
enum Offset : int { NONE = 0, ZERO_POINT = 1, MINIMUM = 2 };

struct Matrix {
  const uint8_t* codes;
  const uint8_t* scale;    // [tiles][groups][16] of scale_type; null in the row form
  const uint8_t* offset;   // zero points (uint8) or minima (scale_type), as the scale
  const float* levels;     // [2^bits] when the levels are a table, else null
  // row form: float16 [groups][2^bits] of every row, `book_step` numbers from row to row (0: all rows share them)
  const uint16_t* books;
  int64_t book_step;
  // row form: numbers beside the codes, `count` of each row, ascending columns; or null
  const uint8_t* columns;  // [rows][count] int16 or int32
  const uint16_t* beside;  // float16 [rows][count]
  int64_t count;
  int column_bytes;
  int64_t rows, cols, padded, group, groups, row_bytes;  // row_bytes: of a tile, or of a row in the row form
  int bits, zero, scale_type, offset_kind;
  float unit;
  // derived, for at most four bits
  float values[16];        // levels by code, repeated; with zero points the codes
  uint8_t unsigned_levels[16];  // for integer sums: level = factor * (this - bias)
  bool integer;
  int bias;
  float factor;
};

struct Activations {
  int64_t m, stride, groups;
  const float* x;          // [m][stride], zeros beyond the columns
  const float* sums;       // [m][groups]
  // integers: x itself (one part), or digits of x in fixed point (PARTS, the highest first)
  const int8_t* q;         // [m][stride / 4][parts][4]
  const int32_t* q_sums;   // [m][groups][segments of a group][1 or 2]: of the highest digits, of the rest
  const int32_t* q_start;  // as q_sums, times what makes the codes unsigned, negative: what sums begin with
  const float* q_scale;    // fixed point: [m][groups][segments of a group]
};

// Where a column of x lies: `depth` (a power of two) columns together, then `step` bytes on; `part` bytes between digits.
struct Places {
  int64_t depth, step, part;
  int64_t at(int64_t col) const { return col / depth * step + col % depth; }
};

// Many rows of x, for tile units: blocks of sixteen rows, in each block the parts, in each part the segments of groups
// (`stretch` columns in memory), in each segment `depth` bytes of sixteen rows at a time.
struct Tiled {
  int64_t blocks, segments, per_group, segment, stretch, depth, part_bytes;
  const int8_t* x;
  const int32_t* sums;  // [segments][blocks * 16][1 or 2], as q_sums
  const float* scale;   // fixed point: [segments][blocks * 16]
};

// Functions of tile units, or null: out [blocks * 16][16]. `weights` has room for the unpacked tile.
struct Wide {
  void (*begin)(int64_t depth);
  void (*end)();
  void (*integers)(const Matrix&, const Tiled&, int64_t tile, int8_t* weights, float* out);
  void (*fixed)(const Matrix&, const Tiled&, int64_t tile, int8_t* weights, float* out);
  void (*halves)(const Matrix&, const Tiled&, int64_t tile, int8_t* weights, float* out);
  // y[i][row ..] = sums[i] * x_scale[i * scale_step] + bias, for n_rows <= 16 rows of the result
  void (*finish)(const float* sums, int64_t m, int64_t n_rows, int64_t row, int64_t rows, const float* x_scale,
                 int64_t scale_step, const void* bias, void* y, int type);
};

// Functions of tiles give out [n][16] for rows first .. first + n of x.
struct Kernels {
  const char* name;
  bool flips;  // products take codes as bytes from -128 to 127
  void (*tile_float)(const Matrix&, const Activations&, int64_t tile, int64_t first, int64_t n, float* out);
  void (*tile_int8)(const Matrix&, const Activations&, int64_t tile, int64_t first, int64_t n, float* out);
  // as tile_int8, with x in fixed point; null where there is none
  void (*tile_fixed)(const Matrix&, const Activations&, int64_t tile, int64_t first, int64_t n, float* out);
  // n <= FIXED finite numbers in fixed point: digits at their places, their scale, their two sums
  void (*fixed)(const float* x, int64_t n, int8_t* digits, Places to, float* scale, int32_t* sums);
  // out [n]: one row of the row form with n <= MOST rows of x [n][padded], without what lies beside
  void (*row_float)(const Matrix&, const float* x, int64_t n, int64_t row, float* out);
  // out [n] += what lies beside the codes of a row, times x
  void (*row_beside)(const Matrix&, const float* x, int64_t n, int64_t row, float* out);
  // codes [16][padded] of a tile
  void (*unpack)(const Matrix&, int64_t tile, uint8_t* codes);
  // out [cols] of `type`: one row from its codes; `lane` names its parameters in the tile. Without what lies beside
  void (*decode)(const Matrix&, const uint8_t* codes, int64_t tile, int64_t lane, void* out, int type);
  // as tile_int8 and tile_fixed, of STREAMS tiles and one row of x: out [STREAMS][16]; or null
  void (*streams_int8)(const Matrix&, const Activations&, int64_t tile, float* out) = nullptr;
  void (*streams_fixed)(const Matrix&, const Activations&, int64_t tile, float* out) = nullptr;
  // the same three with HALF_PARTS digits, for x of 16 bits; or null
  void (*tile_half)(const Matrix&, const Activations&, int64_t tile, int64_t first, int64_t n, float* out) = nullptr;
  void (*fixed_half)(const float* x, int64_t n, int8_t* digits, Places to, float* scale, int32_t* sums) = nullptr;
  void (*streams_half)(const Matrix&, const Activations&, int64_t tile, float* out) = nullptr;
  const Wide* (*wide)() = nullptr;  // tile units for many rows of x, where this processor has them; or null
};

const Kernels* generic();
const Kernels* avx2();    // null where the processor or the compiler lacks it
const Kernels* avx512();
const Kernels* avx512_four_tiles();  // with functions of STREAMS tiles
extern const bool AMD;               // the maker of this processor
const Kernels* neon();
const Wide* amx();

static inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline int32_t four_of(const int8_t* x) {  // numbers of one byte each
  int32_t four;
  memcpy(&four, x, 4);
  return four;
}

static inline float from_bf16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

static inline uint16_t to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_f16(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  float value = float(rest) * 5.9604644775390625e-8f;  // 2^-24, exact
  return sign ? -value : value;
}

static inline uint16_t to_f16(float value) {  // to nearest, ties to even
  uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | ((rest >> 13) & 0x3ff));
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {  // below the smallest normal number the addition rounds
    float shifted = from_bits(rest) + 0.5f;
    return uint16_t(sign | (to_bits(shifted) - 0x3f000000));
  }
  rest += 0xfff + ((rest >> 13) & 1);
  return uint16_t(sign | ((rest - (112u << 23)) >> 13));
}

static inline float from_e8m0(uint8_t byte) {
  if (byte == 255) return from_bits(0x7fc00000);
  return from_bits(byte ? uint32_t(byte) << 23 : 0x00400000);
}

static inline float from_e4m3(uint8_t byte) {
  uint32_t rest = byte & 0x7f;
  float value;
  if (rest == 0x7f) value = from_bits(0x7fc00000);
  else if (rest >= 8) value = from_bits((rest << 20) + (120u << 23));
  else value = float(rest) * 0.001953125f;  // 2^-9
  return byte & 0x80 ? -value : value;
}

static inline float load(const uint8_t* base, int64_t index, int type) {
  uint16_t half;
  float value;
  switch (type) {
    case F32: memcpy(&value, base + 4 * index, 4); return value;
    case BF16: memcpy(&half, base + 2 * index, 2); return from_bf16(half);
    case F16: memcpy(&half, base + 2 * index, 2); return from_f16(half);
    case E8M0: return from_e8m0(base[index]);
    default: return from_e4m3(base[index]);
  }
}

static inline void store(void* base, int64_t index, float value, int type) {
  if (type == F32) static_cast<float*>(base)[index] = value;
  else static_cast<uint16_t*>(base)[index] = type == BF16 ? to_bf16(value) : to_f16(value);
}

static inline int64_t bytes_of(int type) { return type == F32 ? 4 : type == E8M0 || type == E4M3 ? 1 : 2; }

// The exponent of fixed point for a largest magnitude (its bits): one more where the digits would not fit, and kept where
// its own power of two and the inverse are normal numbers.
static inline int exponent_of(uint32_t largest) {
  const int exponent = int((largest + 0x20000) >> 23) - 127;
  return exponent < -90 ? -90 : exponent;
}

static inline float power_of_two(int exponent) { return from_bits(uint32_t(exponent + 127) << 23); }

static inline int64_t block_of(int bits) { return bits & 1 ? 32 : 16; }

static inline int64_t row_block_of(int bits) { return bits < 4 ? 64 : 32; }

static inline int64_t row_bytes_of(int bits) { return row_block_of(bits) * bits / 8; }

// The levels of a row's columns from `col` on. Columns that pad a row have those of its last group.
static inline const uint16_t* book_of(const Matrix& w, int64_t row, int64_t col) {
  const int64_t group = col / w.group;
  return w.books + row * w.book_step + ((group < w.groups ? group : w.groups - 1) << w.bits);
}

static inline int64_t column_of(const Matrix& w, int64_t at) {
  int16_t narrow;
  int32_t wide;
  if (w.column_bytes == 2) {
    memcpy(&narrow, w.columns + 2 * at, 2);
    return narrow;
  }
  memcpy(&wide, w.columns + 4 * at, 4);
  return wide;
}

// The 64 codes (16 rows of 4 columns) of quad `quad` of a block.
static inline void unpack_quad(const uint8_t* block, int bits, int quad, uint8_t* codes) {
  const int quads = bits & 1 ? 8 : 4;
  int shift = 0;
  for (int i = 0; i < QUAD; i++) codes[i] = 0;
  for (int width = 8; width; width >>= 1) {
    if (!(bits & width)) continue;
    const int fields = 8 / width, mask = (1 << width) - 1;
    const uint8_t* chunk = block + quad / fields * QUAD;
    const int field = quad % fields * width;
    for (int i = 0; i < QUAD; i++) codes[i] |= uint8_t(((chunk[i] >> field) & mask) << shift);
    block += quads / fields * QUAD;
    shift += width;
  }
}

// A row's codes in the row form: `n` columns from the start of a row, n a multiple of the block.
static inline void unpack_row(const uint8_t* row, int bits, int64_t n, uint8_t* codes) {
  if (bits == 8) {
    memcpy(codes, row, size_t(n));
    return;
  }
  const int width = bits == 4 ? 4 : 2, fields = 8 / width, mask = (1 << width) - 1;
  const int64_t bytes = row_bytes_of(bits);
  for (int64_t at = 0; at < n; at += 16 * fields, row += bytes)
    for (int64_t field = 0; field < fields; field++)
      for (int64_t i = 0; i < 16; i++) {
        uint8_t code = (row[i] >> (width * field)) & mask;
        if (bits == 3) code |= ((row[16 + 2 * field + i / 8] >> (i % 8)) & 1) << 2;
        codes[at + 16 * field + i] = code;
      }
}

}  // namespace whit

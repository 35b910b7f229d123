// What prepares a call: the matrix as the kernels see it, memory for activations, numbers of threads.
#pragma once

#include <memory>

#include "whit.h"

#if defined(_WIN32)
#define WHIT_EXPORT extern "C" __declspec(dllexport)
#else
#define WHIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace whit {

// A matrix as the caller hands it over: where its tensors are, null for those that it lacks, and its numbers. `table` is
// float32 [2^bits] or null in the tile form; in the row form, which has no scale, float16 [rows][groups][2^bits], with
// `book_step` numbers from row to row. `columns` (of `column_bytes`) and float16 `beside` are [rows][count], or null.
// library.py has the same fields in the same order.
struct Given {
  const uint8_t *codes, *scale, *offset;
  const void *table, *columns, *beside;
  int64_t book_step, count, rows, cols, group;
  int32_t scale_type, offset_kind, column_bytes, bits, zero;
  float unit;
};

const Kernels* kernels();  // those in use

constexpr int64_t ALIGN = 64;
constexpr int64_t SMALL = 1 << 17;  // weights times rows of x below which a second thread does not pay

// Uninitialised memory of one thread, kept from call to call: a fresh allocation of this size costs page faults.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t n) {
    const int64_t bytes = (n * int64_t(sizeof(T)) + ALIGN - 1) / ALIGN * ALIGN;
    if (used_ + bytes > capacity_) return nullptr;
    T* result = reinterpret_cast<T*>(aligned_ + used_);
    used_ += bytes;
    return result;
  }
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    memory_.reset(new char[size_t(bytes + ALIGN)]);
    aligned_ = memory_.get() + (ALIGN - reinterpret_cast<uintptr_t>(memory_.get()) % ALIGN) % ALIGN;
    capacity_ = bytes;
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* aligned_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
};

inline thread_local Scratch scratch;          // of the thread that calls
inline thread_local Scratch scratch_of_part;  // of each thread within a parallel region

// What the kernels look up, from the levels.
inline void derive(Matrix& w) {
  w.bias = w.levels ? 128 : w.zero;
  w.factor = 1.0f;
  w.integer = !w.levels;
  if (w.bits > 4) return;
  const int n = 1 << w.bits;
  for (int i = 0; i < 16; i++) {  // repeated, so that higher bits of an index do not matter
    w.unsigned_levels[i] = uint8_t(i);
    w.values[i] = w.levels ? w.levels[i % n] : float(i % n - (w.offset_kind == ZERO_POINT ? 0 : w.zero));
  }
  if (!w.levels) return;
  for (int divisor = 1; divisor <= 2 && !w.integer; divisor++) {  // FP4 has halves
    w.integer = true;
    for (int i = 0; i < 16; i++) {
      const float value = w.values[i] * float(divisor);
      if (value >= -128.0f && value <= 127.0f && value == std::floor(value))
        w.unsigned_levels[i] = uint8_t(int(value) + 128);
      else
        w.integer = false;
    }
    w.factor = 1.0f / float(divisor);
  }
  if (!w.integer) w.factor = 1.0f;
}

inline Matrix matrix(const Given* given) {
  const Given& g = *given;
  Matrix w = {};
  w.codes = g.codes, w.scale = g.scale, w.offset = g.offset, w.scale_type = g.scale_type, w.offset_kind = g.offset_kind;
  w.rows = g.rows, w.cols = g.cols, w.bits = g.bits, w.group = g.group, w.zero = g.zero, w.unit = g.unit;
  const int64_t block = g.scale ? block_of(g.bits) : row_block_of(g.bits);
  w.padded = (g.cols + block - 1) / block * block;
  if (g.scale) {
    w.levels = static_cast<const float*>(g.table);
    w.groups = w.padded / g.group;
    w.row_bytes = w.padded * LANES * g.bits / 8;
    derive(w);
  } else {
    w.books = static_cast<const uint16_t*>(g.table);
    w.book_step = g.book_step;
    w.columns = static_cast<const uint8_t*>(g.columns), w.beside = static_cast<const uint16_t*>(g.beside);
    w.count = g.count, w.column_bytes = g.column_bytes;
    w.groups = (g.cols + g.group - 1) / g.group;
    w.row_bytes = w.padded * g.bits / 8;
  }
  return w;
}

inline void to_floats(const void* x, int64_t from, int64_t n, int type, float* out) {
  if (type == F32) {
    memcpy(out, static_cast<const float*>(x) + from, size_t(n) * 4);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(x) + from;
    if (type == BF16)
      for (int64_t i = 0; i < n; i++) out[i] = from_bf16(half[i]);
    else
      for (int64_t i = 0; i < n; i++) out[i] = from_f16(half[i]);
  }
}

inline int64_t segments_of(int64_t group, int64_t segment) { return (group + segment - 1) / segment; }

inline bool finite(const float* x, int64_t n) {
  uint32_t beyond = 0;
  for (int64_t i = 0; i < n; i++) beyond |= uint32_t((to_bits(x[i]) & 0x7f800000) == 0x7f800000);
  return !beyond;
}

inline int threads_for(const Matrix& w, int64_t m, int threads) { return w.rows * w.padded * m < SMALL ? 1 : threads; }

}  // namespace whit

// Attention of one token, when a model writes: torch's own takes five to twenty times as long for one query in bfloat16.
//
// A head is computed by one thread, in one order: the number of threads does not change it.
#include "host.h"

#include <cmath>

#define WHIT_INLINE static inline __attribute__((always_inline))

namespace whit {
namespace {

// As the caller hands it over; kernels/attention.py has the same fields in the same order. Strides count numbers.
struct Attention {
  const void *q, *k, *v;  // q [rows][heads][width]; k and v as their strides say, the numbers of a token side by side
  const float* mask;      // [rows][n], added to the scores; or null
  void* out;              // [rows][heads][value_width]
  int64_t rows, heads, key_heads, n, width, value_width;
  int64_t k_row, k_head, k_token, v_row, v_head, v_token;
  int32_t type;
  float scale;
};

namespace plain {
#include "attend.h"
}

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__) && !defined(__clang__)
#define WHIT_MORE
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace wide {
#include "attend.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace medium {
#include "attend.h"
}
#pragma GCC pop_options
#endif

using Heads = decltype(&plain::heads_of);

Heads chosen() {
#ifdef WHIT_MORE
  if (kernels() == avx512() || kernels() == avx512_four_tiles()) return wide::heads_of;
  if (kernels() == avx2()) return medium::heads_of;
#endif
  return plain::heads_of;
}

}  // namespace
}  // namespace whit

using namespace whit;

// out = softmax(scale * q k^T + mask) v for one query of each head; heads / key_heads neighbours share keys and values.
WHIT_EXPORT void whit_attend(const Attention* given, int threads) {
  const Attention& a = *given;
  const Heads heads = chosen();
  const int64_t sharing = a.heads / a.key_heads, pairs = a.rows * a.key_heads;
  if (a.rows * a.heads * a.n * (a.width + a.value_width) < SMALL) threads = 1;
  int64_t parts = (threads + pairs - 1) / pairs;  // of the queries that share, where there are fewer keys than threads
  if (parts > sharing) parts = sharing;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < pairs * parts; i++) {
    const int64_t pair = i / parts, part = i % parts, key = pair % a.key_heads;
    const int64_t first = key * sharing + sharing * part / parts, last = key * sharing + sharing * (part + 1) / parts;
    const int64_t widest = a.width > a.value_width ? a.width : a.value_width;
    const int64_t room = (last - first) * (a.width + a.value_width + a.n) + widest;
    scratch_of_part.reserve(room * 4 + ALIGN);
    heads(a, pair / a.key_heads, key, first, last, scratch_of_part.take<float>(room));
  }
}

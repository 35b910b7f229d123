// How fast memory can be read: THREADS, then one line "read bytes_per_second" per pass over 512 MiB in large pages.
#include <immintrin.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int, char** arguments) {
  const int threads = atoi(arguments[1]);
  const long n = 1L << 29, page = 1L << 21;
  char* memory = static_cast<char*>(aligned_alloc(page, n));
  madvise(memory, n, MADV_HUGEPAGE);
  memset(memory, 1, n);
  long total = 0;
  for (int pass = 0; pass < 8; pass++) {
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel for num_threads(threads) reduction(+ : total)
    for (long part = 0; part < n; part += page) {
      __m512i sums[4] = {};
      for (long at = part; at < part + page; at += 256)
        for (int i = 0; i < 4; i++) {
          _mm_prefetch(memory + at + 64 * i + 2048, _MM_HINT_T0);
          sums[i] = _mm512_add_epi64(sums[i], _mm512_load_si512(memory + at + 64 * i));
        }
      for (__m512i sum : sums) total += _mm512_reduce_add_epi64(sum);
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (pass) printf("read %.0f\n", n / seconds);
  }
  return total == 0;
}

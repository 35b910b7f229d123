// Exact segmentation of sorted numbers: the dynamic programme of one-dimensional k-means.
//
// D[m][j], the least cost of the first j numbers in m segments, is min over i of D[m-1][i] + cost(i, j). The cost of a
// segment follows from prefix sums, and it is Monge, so that the best i never falls when j grows: the middle j is solved
// first and halves the range of both sides. Of two equal costs the smaller i is taken, as in the same algorithm in numpy
// (grids/kmeans.py), whose operations and their order these are: both give the same cuts, bit for bit.
#include "host.h"

#include <limits>
#include <vector>

namespace whit {
namespace {

constexpr double NOTHING = 1e-300;  // a mass that is zero, so that no division is by zero

// Prefix sums [n + 1] of weights, weights times numbers and weights times squares.
struct Sums {
  const double* mass;
  const double* first;
  const double* second;
  double cost(int64_t i, int64_t j) const {
    const double moved = first[j] - first[i], all = mass[j] - mass[i];
    const double left = (second[j] - second[i]) - moved * moved / (all > NOTHING ? all : NOTHING);
    return left > 0 ? left : 0;
  }
};

// Fills best[low..high] and cut[low..high], whose cuts lie within from..to.
void solve(const Sums& sums, const double* before, double* best, int32_t* cut, int64_t low, int64_t high, int64_t from,
           int64_t to) {
  while (low <= high) {
    const int64_t middle = low + (high - low) / 2, last = to < middle - 1 ? to : middle - 1;
    double least = std::numeric_limits<double>::infinity();
    int64_t where = from;
    for (int64_t i = from; i <= last; i++) {
      const double found = before[i] + sums.cost(i, middle);
      if (found < least) least = found, where = i;
    }
    best[middle] = least, cut[middle] = static_cast<int32_t>(where);
    solve(sums, before, best, cut, low, middle - 1, from, where);
    low = middle + 1, from = where;
  }
}

}  // namespace
}  // namespace whit

// Where k segments of n sorted numbers begin: cuts [rows][k], the first 0. Prefix sums are [rows][n + 1]; 1 <= k <= n.
WHIT_EXPORT void whit_segments(const double* mass, const double* first, const double* second, int64_t rows, int64_t n,
                               int64_t k, int32_t* cuts, int threads) {
  using namespace whit;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
  {
    std::vector<double> before(n + 1), best(n + 1);
    std::vector<int32_t> from(k * (n + 1));
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row++) {
      const int64_t start = row * (n + 1);
      const Sums sums = {mass + start, first + start, second + start};
      for (int64_t j = 1; j <= n; j++) before[j] = sums.cost(0, j);
      before[0] = std::numeric_limits<double>::infinity();
      for (int64_t m = 2; m <= k; m++) {
        // j - 1 at most, m - 1 at least: every segment holds a number
        solve(sums, before.data(), best.data(), from.data() + (m - 1) * (n + 1), m, n, m - 1, n - 1);
        for (int64_t j = 0; j < m; j++) best[j] = std::numeric_limits<double>::infinity();
        before.swap(best);
      }
      int64_t end = n;
      for (int64_t m = k; m >= 2; m--) {
        end = from[(m - 1) * (n + 1) + end];
        cuts[row * k + m - 1] = static_cast<int32_t>(end);
      }
      cuts[row * k] = 0;
    }
  }
}

// Run on another kind of processor, or an emulation of one: its own kernels against the generic ones. Prints how many
// products were compared and the largest difference, relative to the sum of |x w|; status 1 beyond the contract.
#include "host.h"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

using namespace whit;

extern "C" {
const char* whit_name();
int whit_choose(const char* name);
void whit_linear(const void* x, int64_t m, const void* bias, void* y, int type, int threads, const Given* given);
void whit_linear_int8(const int8_t* x, int64_t m, const float* x_scale, int64_t scale_step, const void* bias, void* y,
                      int type, int threads, const Given* given);
}

namespace {

uint32_t state = 1;
uint32_t any() { return state = state * 1664525u + 1013904223u, state >> 8; }
float number() { return float(any() % 20001) / 10000.0f - 1.0f; }

struct Case {
  int bits, offset, form;  // form: 0 levels by their number, 1 a table for all, 2 rows with tables of their own
  int64_t rows, cols, group, m;
};

double compare(const char* own, const Case& c) {
  const bool in_rows = c.form == 2;
  const int64_t block = in_rows ? row_block_of(c.bits) : block_of(c.bits);
  const int64_t padded = (c.cols + block - 1) / block * block, groups = padded / c.group;
  const int64_t tiles = (c.rows + LANES - 1) / LANES, n_levels = int64_t(1) << c.bits;
  std::vector<uint8_t> codes(size_t((in_rows ? c.rows : tiles * LANES) * padded * c.bits / 8));
  for (auto& each : codes) each = uint8_t(any());
  std::vector<float> scale(size_t(tiles * groups * LANES), 0.0f), minimum(scale.size(), 0.0f), table(size_t(n_levels), 0.0f);
  std::vector<uint8_t> zero(scale.size());
  std::vector<uint16_t> books(size_t(c.rows * groups * n_levels));
  for (size_t i = 0; i < scale.size(); i++)
    scale[i] = 0.01f + 0.01f * number(), minimum[i] = 0.1f * number(), zero[i] = uint8_t(any() % uint32_t(n_levels));
  for (int64_t i = 0; i < n_levels; i++) table[size_t(i)] = float(int(i) - int(n_levels / 2)) * (c.bits == 4 ? 0.5f : 1.0f);
  for (auto& each : books) each = to_f16(0.1f * number());
  std::vector<float> x(size_t(c.m * c.cols), 0.0f), x_scale(size_t(c.m), 0.01f);
  std::vector<int8_t> q(x.size());
  for (size_t i = 0; i < x.size(); i++) x[i] = number(), q[i] = int8_t(int(any() % 255) - 127);
  const void* offset = c.offset == ZERO_POINT ? static_cast<void*>(zero.data()) : c.offset == MINIMUM ? minimum.data() : nullptr;
  const void* levels = c.form == 2 ? static_cast<void*>(books.data()) : c.form == 1 ? table.data() : nullptr;
  const int from = c.form || c.offset == ZERO_POINT ? 0 : int(n_levels / 2);
  double worst = 0;
  for (const bool whole : {false, true}) {
    std::vector<float> y[2];
    for (int which = 0; which < 2; which++) {
      if (!whit_choose(which ? own : "generic")) exit(2);
      y[which].resize(size_t(c.m * c.rows));
      const Given given = {codes.data(), in_rows ? nullptr : reinterpret_cast<uint8_t*>(scale.data()),
                           static_cast<const uint8_t*>(offset), levels, nullptr, nullptr, groups * n_levels, 0, c.rows, c.cols,
                           c.group, F32, c.offset, 2, c.bits, from, 1.0f};
      if (whole) whit_linear_int8(q.data(), c.m, x_scale.data(), 1, nullptr, y[which].data(), F32, 1, &given);
      else whit_linear(x.data(), c.m, nullptr, y[which].data(), F32, 1, &given);
    }
    // |x| <= 1 (1.27 for integers), |w| below half the range of the levels times the largest scale
    const double most = in_rows ? 0.1 : 0.02 * double(n_levels) + (c.offset == MINIMUM ? 0.1 : 0.0);
    for (size_t i = 0; i < y[0].size(); i++) {
      const double difference = std::fabs(double(y[0][i]) - double(y[1][i])) / (most * double(c.cols));
      worst = difference > worst || difference != difference ? difference : worst;
    }
  }
  return worst;
}

}  // namespace

int main(int, char** arguments) {
  double worst = 0;
  int n = 0;
  for (int bits = 2; bits <= 8; bits++)
    for (int64_t m : {1, 2, 3, 4, 5})
      for (int64_t group : {32, 64, 128})
        for (int form = 0; form < 3; form++)
          for (int offset = NONE; offset <= (form ? NONE : MINIMUM); offset++) {
            if (form == 2 && (bits > 4 && bits != 8)) continue;  // no row form
            if (form == 1 && bits > 4) continue;
            const Case c = {bits, offset, form, 37, 256, group, m};
            const double found = compare(arguments[1], c);
            if (!(found < 1e-6)) printf("bits %d m %d group %d form %d offset %d: %g\n", bits, int(m), int(group), form, offset, found);
            worst = found > worst || found != found ? found : worst;
            n += 2;
          }
  printf("%d products, largest difference %g\n", n, worst);
  return worst < 1e-6 ? 0 : 1;
}

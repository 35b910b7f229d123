// Time per product of ggml's CPU backend: THREADS ROWS COLS N BYTES KIND, one line "type buffer seconds" per pass.
// KIND counts the types of buffers, each with kernels of its own; beyond the last nothing is printed.
// All copies of a matrix are in one graph, as the layers of a model are; x is quantized for each product, as it is there.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

static void measure(ggml_backend_t backend, ggml_backend_buffer_type_t buffers, ggml_type type, int64_t rows,
                    int64_t cols, int64_t n, int64_t copies) {
  const size_t overhead = ggml_tensor_overhead() * (copies + 8);
  ggml_context* weights = ggml_init({overhead, nullptr, true});
  std::vector<ggml_tensor*> matrices;
  for (int64_t i = 0; i < copies; i++) matrices.push_back(ggml_new_tensor_2d(weights, type, cols, rows));
  ggml_context* rest = ggml_init({overhead * 2 + ggml_graph_overhead_custom(copies + 8, false), nullptr, true});
  ggml_tensor* x = ggml_new_tensor_2d(rest, GGML_TYPE_F32, cols, n);
  ggml_cgraph* graph = ggml_new_graph_custom(rest, copies + 8, false);
  for (ggml_tensor* matrix : matrices) ggml_build_forward_expand(graph, ggml_mul_mat(rest, matrix, x));

  ggml_backend_buffer_t memory = ggml_backend_alloc_ctx_tensors_from_buft(weights, buffers);
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  if (!memory || !ggml_backend_dev_supports_op(device, ggml_graph_node(graph, 0))) return;
  ggml_backend_alloc_ctx_tensors(rest, backend);

  std::vector<float> values(rows * cols);
  for (float& value : values) value = rand() / float(RAND_MAX) - 0.5f;
  std::vector<char> quantized(ggml_nbytes(matrices[0]));
  ggml_quantize_chunk(type, values.data(), quantized.data(), 0, rows, cols, nullptr);
  for (ggml_tensor* matrix : matrices) ggml_backend_tensor_set(matrix, quantized.data(), 0, quantized.size());
  ggml_backend_tensor_set(x, values.data(), 0, cols * n * 4);

  for (int pass = 0; pass < 4; pass++) {
    const auto start = std::chrono::steady_clock::now();
    ggml_backend_graph_compute(backend, graph);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (pass) printf("%s %s %.9f\n", ggml_type_name(type), ggml_backend_buft_name(buffers), seconds / copies);
  }
  ggml_backend_buffer_free(memory);
  ggml_free(weights);
  ggml_free(rest);
}

int main(int, char** arguments) {
  const int threads = atoi(arguments[1]);
  const int64_t rows = atoll(arguments[2]), cols = atoll(arguments[3]), n = atoll(arguments[4]);
  const double bytes = atof(arguments[5]);
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, threads);
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  std::vector<ggml_backend_buffer_type_t> kinds = {ggml_backend_cpu_buffer_type()};
  auto extra = (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(
      ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
  for (auto* each = extra ? extra(device) : nullptr; each && *each; each++) kinds.push_back(*each);
  const size_t chosen = atoi(arguments[6]);
  if (chosen >= kinds.size()) return 0;
  for (ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_Q8_0}) {
    const double size = double(ggml_row_size(type, cols)) * rows;
    measure(backend, kinds[chosen], type, rows, cols, n, std::max<int64_t>(1, int64_t(bytes / size)));
  }
}

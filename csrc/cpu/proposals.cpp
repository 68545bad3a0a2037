// Gathers, decodes, clips and checks proposals in one pass over the chosen anchors.
#include "../proposals.h"

namespace maskrcnn_benchmark {
namespace {

constexpr int64_t kGrain = 2048;

std::tuple<Tensor, Tensor> proposals(
    const Tensor& deltas,
    const Tensor& anchors,
    const Tensor& index,
    const Tensor& sizes,
    double clip,
    double min_size) {
  return make_proposals(deltas, anchors, index, sizes, clip, min_size, [](const auto& rows, int64_t count) {
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        rows.fill(row);
      }
    });
  });
}

} // namespace

KERNELS(CPU, m) {
  m.impl("proposals", TORCH_FN(proposals));
}

} // namespace maskrcnn_benchmark

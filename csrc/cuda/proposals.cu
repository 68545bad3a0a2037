// Gathers, decodes, clips and checks the proposals of a whole batch in one launch, a thread each.
#include "common.cuh"

#include "../proposals.h"

namespace maskrcnn_benchmark {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) proposals_kernel(ProposalRows<T> rows, int64_t count) {
  for (int64_t row = thread_number(); row < count; row += thread_count()) {
    rows.fill(row);
  }
}

std::tuple<Tensor, Tensor> proposals(
    const Tensor& deltas,
    const Tensor& anchors,
    const Tensor& index,
    const Tensor& sizes,
    double clip,
    double min_size) {
  const c10::cuda::CUDAGuard guard(deltas.device());
  return make_proposals(deltas, anchors, index, sizes, clip, min_size, [](const auto& rows, int64_t count) {
    using T = typename std::decay_t<decltype(rows)>::Scalar;
    launch(proposals_kernel<T>, block_count(count), kThreads, 0, rows, count);
  });
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("proposals", TORCH_FN(proposals));
}

} // namespace maskrcnn_benchmark

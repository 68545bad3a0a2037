// The sigmoid focal loss; see ops/focal_loss.py for the formula.
#include "common.cuh"

#include <ATen/ops/empty.h>

#include <cmath>

namespace maskrcnn_benchmark {
namespace {

// One class of one row. With y the logit of being wrong, sigmoid(y) is 1 - p and softplus(y) is -log p; neither
// overflows, as exp sees no positive number.
template <typename T>
struct ClassLoss {
  T weight, sign, wrong, right, softplus, modulation;

  __device__ ClassLoss(T logit, bool is_own, T gamma, T alpha)
      : weight(is_own ? alpha : 1 - alpha), sign(is_own ? -1 : 1) {
    const T y = sign * logit;
    const T small = std::exp(-std::abs(y));
    softplus = larger(y, T(0)) + std::log1p(small);
    wrong = y >= 0 ? 1 / (1 + small) : small / (1 + small);
    right = y >= 0 ? small / (1 + small) : 1 / (1 + small);
    modulation = gamma == 2 ? wrong * wrong : std::pow(wrong, gamma);
  }

  __device__ T loss() const {
    return weight * modulation * softplus;
  }

  // d loss / d logit
  __device__ T slope(T gamma) const {
    return sign * weight * modulation * (gamma * right * softplus + wrong);
  }
};

// `lanes` neighbouring threads, a power of two of at most a warp, add up one row, always in the same order.
template <typename T>
__global__ void __launch_bounds__(kThreads) loss_kernel(
    const T* logits,
    const int64_t* labels,
    int64_t rows,
    int64_t classes,
    Compute<T> gamma,
    Compute<T> alpha,
    int lanes,
    Compute<T>* losses) {
  const int64_t row = thread_number() / lanes;
  const int lane = threadIdx.x % lanes;
  const int64_t label = row < rows ? labels[row] : -1;
  Compute<T> sum = 0;
  if (label >= 0) {
    for (int64_t i = lane; i < classes; i += lanes) {
      const auto logit = static_cast<Compute<T>>(logits[row * classes + i]);
      sum += ClassLoss<Compute<T>>(logit, label == i + 1, gamma, alpha).loss();
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(kAllLanes, sum, distance, lanes);
  }
  if (lane == 0 && row < rows) {
    losses[row] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) loss_backward_kernel(
    const Compute<T>* grad,
    const T* logits,
    const int64_t* labels,
    int64_t rows,
    int64_t classes,
    Compute<T> gamma,
    Compute<T> alpha,
    T* result) {
  for (int64_t i = thread_number(); i < rows * classes; i += thread_count()) {
    const int64_t row = i / classes, label = labels[row];
    Compute<T> slope = 0;
    if (label >= 0) {
      const auto logit = static_cast<Compute<T>>(logits[i]);
      const bool is_own = label == i - row * classes + 1;
      slope = grad[row] * ClassLoss<Compute<T>>(logit, is_own, gamma, alpha).slope(gamma);
    }
    result[i] = static_cast<T>(slope);
  }
}

void check(const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0),
              "sigmoid_focal_loss: expected logits [N, C] and labels [N]");
}

at::ScalarType compute_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor sigmoid_focal_loss(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
  check(logits, labels);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor x = logits.contiguous(), targets = labels.contiguous();
  const int64_t rows = x.size(0), classes = x.size(1);
  const Tensor losses = at::empty({rows}, x.options().dtype(compute_type(x)));
  int lanes = 1;
  while (lanes < kWarp && lanes < classes) {
    lanes *= 2;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sigmoid_focal_loss", [&] {
    launch(loss_kernel<scalar_t>, block_count(rows * lanes), kThreads, 0, x.const_data_ptr<scalar_t>(),
           targets.const_data_ptr<int64_t>(), rows, classes, gamma, alpha, lanes,
           losses.mutable_data_ptr<Compute<scalar_t>>());
  });
  return losses;
}

Tensor sigmoid_focal_loss_backward(
    const Tensor& grad,
    const Tensor& logits,
    const Tensor& labels,
    double gamma,
    double alpha) {
  check(logits, labels);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor x = logits.contiguous(), targets = labels.contiguous();
  const Tensor upstream = grad.to(compute_type(x)).contiguous();
  const Tensor result = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sigmoid_focal_loss_backward", [&] {
    launch(loss_backward_kernel<scalar_t>, block_count(x.numel()), kThreads, 0,
           upstream.const_data_ptr<Compute<scalar_t>>(), x.const_data_ptr<scalar_t>(),
           targets.const_data_ptr<int64_t>(), x.size(0), x.size(1), gamma, alpha, result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_FN(sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_FN(sigmoid_focal_loss_backward));
}

} // namespace maskrcnn_benchmark

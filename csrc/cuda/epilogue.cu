// What follows a convolution, in one pass over its output; see ops/epilogue.py. A thread takes 16 bytes at a time, and
// neighbouring threads neighbouring ones.
#include "common.cuh"

#include <ATen/ops/zeros.h>

#include "../epilogue.h"

namespace maskrcnn_benchmark {
namespace {

constexpr int kEach = 4; // vectors of a thread: the division that finds its first channel is shared by them

// Vectors of N values, all of one channel where channels are planes, else of N neighbouring ones.
template <typename T, int N, bool planes>
__global__ void __launch_bounds__(kThreads) epilogue_kernel(
    T* input,
    const Compute<T>* __restrict__ bias,
    const T* __restrict__ addend,
    bool relu,
    int64_t vectors,
    int64_t channels,
    int64_t inner) {
  const int64_t step = thread_count(), period = channels * inner;
  const int64_t step_place = step * N % period;
  int64_t place = thread_number() * N % period; // within an image's planes, or a pixel's channels
  for (int64_t i = thread_number(); i < vectors; i += step) {
    auto vector = Vector<T, N>::load(input + i * N);
    Vector<T, N> added{};
    if (addend != nullptr) {
      added = Vector<T, N>::load(addend + i * N);
    }
    const Compute<T>* biases = bias + (planes ? place / inner : place);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      Compute<T> sum = static_cast<Compute<T>>(vector.values[k]);
      if (bias != nullptr) {
        sum += biases[planes ? 0 : k];
      }
      if (addend != nullptr) {
        sum += static_cast<Compute<T>>(added.values[k]);
      }
      vector.values[k] = static_cast<T>(relu ? at_least_zero(sum) : sum);
    }
    vector.store(input + i * N);
    place += step_place;
    place -= place >= period ? period : 0;
  }
}

template <typename T, int N>
void run(const EpilogueShape& shape, T* input, const Compute<T>* bias, const T* addend, bool relu) {
  const int64_t vectors = shape.count / N;
  launch(shape.inner > 1 ? epilogue_kernel<T, N, true> : epilogue_kernel<T, N, false>,
         block_count(vectors, kThreads * kEach), kThreads, 0, input, bias, addend, relu, vectors, shape.channels,
         shape.inner);
}

void epilogue_(
    const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, bool relu) {
  const c10::cuda::CUDAGuard guard(input.device());
  const EpilogueShape shape(input);
  const Tensor added = addend ? addend->contiguous(shape.format) : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "epilogue_", [&] {
    constexpr int size = kVectorSize<scalar_t>;
    const Tensor biases = bias ? bias->to(c10::CppTypeToScalarType<Compute<scalar_t>>::value).contiguous() : Tensor();
    const auto* b = bias ? biases.const_data_ptr<Compute<scalar_t>>() : nullptr;
    const auto* a = addend ? added.const_data_ptr<scalar_t>() : nullptr;
    auto* values = input.mutable_data_ptr<scalar_t>();
    const int64_t row = shape.inner == 1 ? shape.channels : shape.inner;
    const bool whole = is_aligned(values, row, size) && (a == nullptr || is_aligned(a, row, size));
    (whole ? run<scalar_t, size> : run<scalar_t, 1>)(shape, values, b, a, relu);
  });
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("epilogue_", TORCH_FN(epilogue_));
}

} // namespace maskrcnn_benchmark

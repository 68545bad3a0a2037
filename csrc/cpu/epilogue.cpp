// What follows a convolution, in one pass over its output; see ops/epilogue.py.
#include "../epilogue.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

namespace maskrcnn_benchmark {
namespace {

constexpr int64_t kGrain = 1 << 14; // values that are worth a thread

// A row of `length` values. Each has a bias of its own, or where the row is a plane of a map all have bias[0].
// least: 0 for a ReLU, else -infinity; what is not a number stays so.
template <typename T, bool adds, bool is_plane>
MULTIVERSION void finish_row(
    T* values, const Compute<T>* bias, const T* addend, Compute<T> least, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    Compute<T> sum = static_cast<Compute<T>>(values[i]) + bias[is_plane ? 0 : i];
    if constexpr (adds) {
      sum += static_cast<Compute<T>>(addend[i]);
    }
    values[i] = static_cast<T>(sum < least ? least : sum);
  }
}

template <typename T, bool adds, bool is_plane>
void finish(const EpilogueShape& shape, const Tensor& input, const Compute<T>* bias, const T* addend, bool relu) {
  T* values = input.mutable_data_ptr<T>();
  const int64_t length = is_plane ? shape.inner : shape.channels;
  const int64_t grain = kGrain / length + 1;
  at::parallel_for(0, shape.count / length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      finish_row<T, adds, is_plane>(values + row * length, is_plane ? bias + row % shape.channels : bias,
                                    adds ? addend + row * length : nullptr, relu ? 0 : -INFINITY, length);
    }
  });
}

void epilogue_(
    const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, bool relu) {
  const EpilogueShape shape(input);
  if (shape.count == 0) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "epilogue_", [&] {
    const auto type = c10::CppTypeToScalarType<Compute<scalar_t>>::value;
    const Tensor biases = bias ? bias->to(type).contiguous() : at::zeros({shape.channels}, input.options().dtype(type));
    const Tensor added = addend ? addend->contiguous(shape.format) : Tensor();
    const auto* b = biases.const_data_ptr<Compute<scalar_t>>();
    const auto* a = addend ? added.const_data_ptr<scalar_t>() : nullptr;
    const auto kernel = a ? shape.inner > 1 ? finish<scalar_t, true, true> : finish<scalar_t, true, false>
                          : shape.inner > 1 ? finish<scalar_t, false, true> : finish<scalar_t, false, false>;
    kernel(shape, input, b, a, relu);
  });
}

} // namespace

KERNELS(CPU, m) {
  m.impl("epilogue_", TORCH_FN(epilogue_));
}

} // namespace maskrcnn_benchmark

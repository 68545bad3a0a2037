// Boxes <-> regression deltas; see ops/box_coder.py for the formulas.
#include "common.cuh"

#include <ATen/ops/empty.h>

#include <cmath>

#include "../box_coder.h"

namespace maskrcnn_benchmark {
namespace {

// Four numbers in as few accesses as 16 bytes each allow.
template <typename T>
struct Row {
  static constexpr int kPart = kVectorSize<T>;

  T values[4];

  __device__ static Row load(const T* source) {
    Row row;
    for (int i = 0; i < 4; i += kPart) {
      const auto part = Vector<T, kPart>::load(source + i);
      for (int j = 0; j < kPart; ++j) {
        row.values[i + j] = part.values[j];
      }
    }
    return row;
  }

  __device__ void store(T* target) const {
    for (int i = 0; i < 4; i += kPart) {
      Vector<T, kPart> part;
      for (int j = 0; j < kPart; ++j) {
        part.values[j] = values[i + j];
      }
      part.store(target + i);
    }
  }
};

// The rows of a [..., 4] tensor by number. Rows that are broadcast over the first dimensions are not copied.
template <typename T>
class Rows {
 public:
  explicit Rows(const Tensor& tensor) : inner_(larger<int64_t>(tensor.dim() > 1 ? tensor.size(-2) : 1, 1)) {
    tensor_ = tensor.reshape({tensor.numel() / (4 * inner_), inner_, 4});
    const bool whole_rows = is_aligned(tensor_.const_data_ptr<T>(), 4, Row<T>::kPart) &&
        tensor_.stride(0) % 4 == 0 && tensor_.stride(1) % 4 == 0 && tensor_.stride(2) == 1;
    if (!whole_rows) {
      tensor_ = tensor_.clone(at::MemoryFormat::Contiguous);
    }
  }

  struct Reader {
    const T* first;
    int64_t inner, outer_stride, inner_stride;

    __device__ Row<T> operator[](int64_t row) const {
      return Row<T>::load(first + row / inner * outer_stride + row % inner * inner_stride);
    }
  };

  Reader reader() const {
    return {tensor_.const_data_ptr<T>(), inner_, tensor_.stride(0), tensor_.stride(1)};
  }

 private:
  int64_t inner_;
  Tensor tensor_;
};

template <typename T>
using Reader = typename Rows<T>::Reader;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(Reader<T> boxes, Reader<T> anchors, Weights<T> weight, int64_t count, T* deltas) {
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const Row<T> box = boxes[i], anchor = anchors[i];
    Row<T> delta;
    // One axis: first is x1 (0) or y1 (1).
    const auto encode = [&](int first, T shift_weight, T growth_weight) {
      const T side = box.values[first + 2] - box.values[first];
      const T anchor_side = anchor.values[first + 2] - anchor.values[first];
      const T shift = (box.values[first] + T(0.5) * side) - (anchor.values[first] + T(0.5) * anchor_side);
      const T length = side < T(kMinSide) ? T(kMinSide) : side;
      const T anchor_length = anchor_side < T(kMinSide) ? T(kMinSide) : anchor_side;
      delta.values[first] = shift_weight * (shift / anchor_length);
      delta.values[first + 2] = growth_weight * std::log(length / anchor_length);
    };
    encode(0, weight.x, weight.w);
    encode(1, weight.y, weight.h);
    delta.store(deltas + 4 * i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(Reader<T> deltas, Reader<T> anchors, Weights<T> weight, T limit, int64_t count, T* boxes) {
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const Row<T> delta = deltas[i], anchor = anchors[i];
    Row<T> box;
    const auto decode = [&](int first, T shift_weight, T growth_weight) {
      const T shift = delta.values[first] / shift_weight, growth = delta.values[first + 2] / growth_weight;
      const Interval<T> decoded =
          decode_interval<T>({anchor.values[first], anchor.values[first + 2]}, shift, growth, limit);
      box.values[first] = decoded.low;
      box.values[first + 2] = decoded.high;
    };
    decode(0, weight.x, weight.w);
    decode(1, weight.y, weight.h);
    box.store(boxes + 4 * i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) decode_backward_kernel(
    Reader<T> grads,
    Reader<T> deltas,
    Reader<T> anchors,
    Weights<T> weight,
    T limit,
    int64_t count,
    T* result) {
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const Row<T> grad = grads[i], delta = deltas[i], anchor = anchors[i];
    Row<T> out;
    const auto differentiate = [&](int first, T shift_weight, T growth_weight) {
      const T low = grad.values[first], high = grad.values[first + 2];
      const T side = anchor.values[first + 2] - anchor.values[first];
      const T growth = delta.values[first + 2] / growth_weight;
      const T half = T(0.5) * (high - low) * side;
      out.values[first] = (low + high) * side / shift_weight;
      out.values[first + 2] = growth > limit ? T(0) : half * exponential(growth) / growth_weight;
    };
    differentiate(0, weight.x, weight.w);
    differentiate(1, weight.y, weight.h);
    out.store(result + 4 * i);
  }
}

Tensor box_encode(const Tensor& boxes, const Tensor& anchors, at::ArrayRef<double> weights) {
  check_rows(boxes, anchors, weights);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor deltas = at::empty(boxes.sizes(), boxes.options());
  const int64_t count = deltas.numel() / 4;
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "box_encode", [&] {
    const Rows<scalar_t> box(boxes), anchor(anchors);
    launch(encode_kernel<scalar_t>, block_count(count), kThreads, 0, box.reader(), anchor.reader(),
           Weights<scalar_t>(weights), count, deltas.mutable_data_ptr<scalar_t>());
  });
  return deltas;
}

Tensor box_decode(const Tensor& deltas, const Tensor& anchors, at::ArrayRef<double> weights, double clip) {
  check_rows(deltas, anchors, weights);
  const c10::cuda::CUDAGuard guard(deltas.device());
  const Tensor boxes = at::empty(deltas.sizes(), deltas.options());
  const int64_t count = boxes.numel() / 4;
  AT_DISPATCH_FLOATING_TYPES(deltas.scalar_type(), "box_decode", [&] {
    const Rows<scalar_t> delta(deltas), anchor(anchors);
    launch(decode_kernel<scalar_t>, block_count(count), kThreads, 0, delta.reader(), anchor.reader(),
           Weights<scalar_t>(weights), clip, count, boxes.mutable_data_ptr<scalar_t>());
  });
  return boxes;
}

Tensor box_decode_backward(
    const Tensor& grad,
    const Tensor& deltas,
    const Tensor& anchors,
    at::ArrayRef<double> weights,
    double clip) {
  check_rows(deltas, anchors, weights);
  check_rows(grad, anchors, weights);
  const c10::cuda::CUDAGuard guard(deltas.device());
  const Tensor result = at::empty(deltas.sizes(), deltas.options());
  const int64_t count = result.numel() / 4;
  AT_DISPATCH_FLOATING_TYPES(deltas.scalar_type(), "box_decode_backward", [&] {
    const Rows<scalar_t> upstream(grad), delta(deltas), anchor(anchors);
    launch(decode_backward_kernel<scalar_t>, block_count(count), kThreads, 0, upstream.reader(), delta.reader(),
           anchor.reader(), Weights<scalar_t>(weights), clip, count, result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("box_encode", TORCH_FN(box_encode));
  m.impl("box_decode", TORCH_FN(box_decode));
  m.impl("box_decode_backward", TORCH_FN(box_decode_backward));
}

} // namespace maskrcnn_benchmark

// Boxes <-> regression deltas; see ops/box_coder.py for the formulas.
#include <ATen/ops/empty.h>

#include <cmath>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

constexpr int64_t kGrain = 4096;
constexpr double kMinSide = 1e-6;

template <typename T>
struct Weights {
  T x, y, w, h;

  explicit Weights(at::ArrayRef<double> values) : x(values[0]), y(values[1]), w(values[2]), h(values[3]) {}
};

// [..., 4] as [rows, rows, 4]: broadcast (stride 0) tensors of up to three dimensions are not copied.
Tensor as_rows(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  const int64_t inner = dim > 1 ? tensor.size(dim - 2) : 1;
  const int64_t outer = inner > 0 ? tensor.numel() / (4 * inner) : 0;
  return tensor.reshape({outer, inner, 4});
}

// Calls body(a row of first, a row of second, a row of the result), each four values, over all rows and threads.
template <typename T, typename Body>
void for_each_row(const Tensor& first, const Tensor& second, const Tensor& result, const Body& body) {
  const Tensor a_rows = as_rows(first), b_rows = as_rows(second);
  const auto a = a_rows.accessor<const T, 3>(), b = b_rows.accessor<const T, 3>();
  const int64_t inner = a_rows.size(1);
  T* out = result.mutable_data_ptr<T>();
  at::parallel_for(0, result.numel() / 4, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      body(a[row / inner][row % inner], b[row / inner][row % inner], out + 4 * row);
    }
  });
}

void check(const Tensor& first, const Tensor& anchors, at::ArrayRef<double> weights) {
  TORCH_CHECK(first.sizes() == anchors.sizes() && first.size(-1) == 4, "box coder: expected two equal [..., 4] shapes");
  TORCH_CHECK(weights.size() == 4, "box coder: expected 4 weights, got ", weights.size());
}

Tensor box_encode(const Tensor& boxes, const Tensor& anchors, at::ArrayRef<double> weights) {
  check(boxes, anchors, weights);
  Tensor deltas = at::empty(boxes.sizes(), boxes.options());
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "box_encode", [&] {
    using T = scalar_t;
    const Weights<T> weight(weights);
    // One axis: first is x1 (0) or y1 (1).
    const auto axis = [](const auto& box, const auto& anchor, int first, T shift_weight, T growth_weight, T* out) {
      const T side = box[first + 2] - box[first], anchor_side = anchor[first + 2] - anchor[first];
      const T shift = (box[first] + T(0.5) * side) - (anchor[first] + T(0.5) * anchor_side);
      const T length = side < T(kMinSide) ? T(kMinSide) : side;
      const T anchor_length = anchor_side < T(kMinSide) ? T(kMinSide) : anchor_side;
      out[first] = shift_weight * (shift / anchor_length);
      out[first + 2] = growth_weight * std::log(length / anchor_length);
    };
    for_each_row<T>(boxes, anchors, deltas, [&](const auto& box, const auto& anchor, T* out) {
      axis(box, anchor, 0, weight.x, weight.w, out);
      axis(box, anchor, 1, weight.y, weight.h, out);
    });
  });
  return deltas;
}

Tensor box_decode(const Tensor& deltas, const Tensor& anchors, at::ArrayRef<double> weights, double clip) {
  check(deltas, anchors, weights);
  Tensor boxes = at::empty(deltas.sizes(), deltas.options());
  AT_DISPATCH_FLOATING_TYPES(deltas.scalar_type(), "box_decode", [&] {
    using T = scalar_t;
    const Weights<T> weight(weights);
    const T limit = clip;
    const auto axis = [&](const auto& delta, const auto& anchor, int first, T shift_weight, T growth_weight, T* out) {
      const T side = anchor[first + 2] - anchor[first];
      const T growth = delta[first + 2] / growth_weight;
      const T centre = delta[first] / shift_weight * side + (anchor[first] + T(0.5) * side);
      const T half = T(0.5) * (std::exp(growth > limit ? limit : growth) * side);
      out[first] = centre - half;
      out[first + 2] = centre + half;
    };
    for_each_row<T>(deltas, anchors, boxes, [&](const auto& delta, const auto& anchor, T* out) {
      axis(delta, anchor, 0, weight.x, weight.w, out);
      axis(delta, anchor, 1, weight.y, weight.h, out);
    });
  });
  return boxes;
}

// Only dw and dh of the deltas matter to their own gradient, so `deltas` and `anchors` are folded into one row first.
Tensor box_decode_backward(
    const Tensor& grad,
    const Tensor& deltas,
    const Tensor& anchors,
    at::ArrayRef<double> weights,
    double clip) {
  check(deltas, anchors, weights);
  check(grad, anchors, weights);
  Tensor result = at::empty(deltas.sizes(), deltas.options());
  const Tensor grad_rows = as_rows(grad);
  AT_DISPATCH_FLOATING_TYPES(deltas.scalar_type(), "box_decode_backward", [&] {
    using T = scalar_t;
    const Weights<T> weight(weights);
    const T limit = clip;
    const auto grads = grad_rows.accessor<const T, 3>();
    const T* first_row = result.const_data_ptr<T>();
    const int64_t inner = grad_rows.size(1);
    const auto axis = [&](const auto& grad, const auto& delta, const auto& anchor, int first, T shift_weight,
                          T growth_weight, T* out) {
      const T side = anchor[first + 2] - anchor[first];
      const T growth = delta[first + 2] / growth_weight;
      out[first] = (grad[first] + grad[first + 2]) * side / shift_weight;
      const T half = T(0.5) * (grad[first + 2] - grad[first]) * side;
      out[first + 2] = growth > limit ? T(0) : half * std::exp(growth) / growth_weight;
    };
    for_each_row<T>(deltas, anchors, result, [&](const auto& delta, const auto& anchor, T* out) {
      const int64_t row = (out - first_row) / 4;
      const auto upstream = grads[row / inner][row % inner];
      axis(upstream, delta, anchor, 0, weight.x, weight.w, out);
      axis(upstream, delta, anchor, 1, weight.y, weight.h, out);
    });
  });
  return result;
}

} // namespace

TORCH_LIBRARY_IMPL(maskrcnn_benchmark, CPU, m) {
  m.impl("box_encode", TORCH_FN(box_encode));
  m.impl("box_decode", TORCH_FN(box_decode));
  m.impl("box_decode_backward", TORCH_FN(box_decode_backward));
}

} // namespace maskrcnn_benchmark

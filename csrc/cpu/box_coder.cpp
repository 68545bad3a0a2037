// Boxes <-> regression deltas; see ops/box_coder.py for the formulas.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "../box_coder.h"

namespace maskrcnn_benchmark {
namespace {

constexpr int64_t kGrain = 4096;
// Rows computed at a time, coordinate by coordinate in vectors.
constexpr int64_t kBlock = 16;

template <typename T>
using Block = T[4][kBlock];

// The rows of a [..., 4] tensor. Broadcast (stride 0) tensors of up to three dimensions are not copied.
template <typename T>
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : inner_(std::max<int64_t>(1, tensor.dim() > 1 ? tensor.size(-2) : 1)),
        tensor_(tensor.reshape({tensor.numel() / (4 * inner_), inner_, 4})),
        accessor_(tensor_.accessor<const T, 3>()) {}

  // Places past the last row are left as they are.
  void load(int64_t first, int64_t count, Block<T>& block) const {
    int64_t outer = first / inner_, inner = first % inner_;
    for (int64_t i = 0; i < count; ++i) {
      const auto row = accessor_[outer][inner];
      for (int64_t coordinate = 0; coordinate < 4; ++coordinate) {
        block[coordinate][i] = row[coordinate];
      }
      if (++inner == inner_) {
        inner = 0;
        ++outer;
      }
    }
  }

 private:
  int64_t inner_;
  Tensor tensor_;
  at::TensorAccessor<const T, 3> accessor_;
};

// Fills the rows of the result by body(a block of each source, block of the result), over all threads.
template <typename T, size_t N, typename Body>
void fill_rows(const Tensor& result, const Rows<T> (&sources)[N], const Body& body) {
  T* out = result.mutable_data_ptr<T>();
  at::parallel_for(0, result.numel() / 4, kGrain, [&](int64_t begin, int64_t end) {
    Block<T> blocks[N] = {}, filled;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      for (size_t i = 0; i < N; ++i) {
        sources[i].load(first, count, blocks[i]);
      }
      body(blocks, filled);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t coordinate = 0; coordinate < 4; ++coordinate) {
          out[4 * (first + i) + coordinate] = filled[coordinate][i];
        }
      }
    }
  });
}

// Of two axes: x has the coordinates 0 and 2 and the first and third weight, y the others.
template <typename T>
MULTIVERSION void encode(const Block<T>& box, const Block<T>& anchor, const Weights<T>& weight, Block<T>& out) {
  for (int first = 0; first < 2; ++first) {
    const T shift_weight = first == 0 ? weight.x : weight.y, growth_weight = first == 0 ? weight.w : weight.h;
    for (int64_t i = 0; i < kBlock; ++i) {
      const T side = box[first + 2][i] - box[first][i], anchor_side = anchor[first + 2][i] - anchor[first][i];
      const T shift = (box[first][i] + T(0.5) * side) - (anchor[first][i] + T(0.5) * anchor_side);
      const T length = side < T(kMinSide) ? T(kMinSide) : side;
      const T anchor_length = anchor_side < T(kMinSide) ? T(kMinSide) : anchor_side;
      out[first][i] = shift_weight * (shift / anchor_length);
      out[first + 2][i] = growth_weight * std::log(length / anchor_length);
    }
  }
}

template <typename T>
MULTIVERSION void decode(
    const Block<T>& delta, const Block<T>& anchor, const Weights<T>& weight, T limit, Block<T>& out) {
  for (int first = 0; first < 2; ++first) {
    const T shift_weight = first == 0 ? weight.x : weight.y, growth_weight = first == 0 ? weight.w : weight.h;
    for (int64_t i = 0; i < kBlock; ++i) {
      const Interval<T> decoded = decode_interval<T>(
          {anchor[first][i], anchor[first + 2][i]}, delta[first][i] / shift_weight,
          delta[first + 2][i] / growth_weight, limit);
      out[first][i] = decoded.low;
      out[first + 2][i] = decoded.high;
    }
  }
}

template <typename T>
MULTIVERSION void differentiate_decode(
    const Block<T>& grad, const Block<T>& delta, const Block<T>& anchor, const Weights<T>& weight, T limit,
    Block<T>& out) {
  for (int first = 0; first < 2; ++first) {
    const T shift_weight = first == 0 ? weight.x : weight.y, growth_weight = first == 0 ? weight.w : weight.h;
    for (int64_t i = 0; i < kBlock; ++i) {
      const T side = anchor[first + 2][i] - anchor[first][i];
      const T growth = delta[first + 2][i] / growth_weight;
      const T half = T(0.5) * (grad[first + 2][i] - grad[first][i]) * side;
      const T slope = half * exponential(growth) / growth_weight;
      out[first][i] = (grad[first][i] + grad[first + 2][i]) * side / shift_weight;
      out[first + 2][i] = growth > limit ? T(0) : slope;
    }
  }
}

Tensor box_encode(const Tensor& boxes, const Tensor& anchors, at::ArrayRef<double> weights) {
  check_rows(boxes, anchors, weights);
  Tensor deltas = at::empty(boxes.sizes(), boxes.options());
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "box_encode", [&] {
    const Weights<scalar_t> weight(weights);
    const Rows<scalar_t> sources[] = {Rows<scalar_t>(boxes), Rows<scalar_t>(anchors)};
    fill_rows(deltas, sources, [&](const auto& blocks, auto& out) { encode(blocks[0], blocks[1], weight, out); });
  });
  return deltas;
}

Tensor box_decode(const Tensor& deltas, const Tensor& anchors, at::ArrayRef<double> weights, double clip) {
  check_rows(deltas, anchors, weights);
  Tensor boxes = at::empty(deltas.sizes(), deltas.options());
  AT_DISPATCH_FLOATING_TYPES(deltas.scalar_type(), "box_decode", [&] {
    const Weights<scalar_t> weight(weights);
    const scalar_t limit = clip;
    const Rows<scalar_t> sources[] = {Rows<scalar_t>(deltas), Rows<scalar_t>(anchors)};
    fill_rows(boxes, sources, [&](const auto& blocks, auto& out) {
      decode(blocks[0], blocks[1], weight, limit, out);
    });
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
  Tensor result = at::empty(deltas.sizes(), deltas.options());
  AT_DISPATCH_FLOATING_TYPES(deltas.scalar_type(), "box_decode_backward", [&] {
    const Weights<scalar_t> weight(weights);
    const scalar_t limit = clip;
    const Rows<scalar_t> sources[] = {Rows<scalar_t>(grad), Rows<scalar_t>(deltas), Rows<scalar_t>(anchors)};
    fill_rows(result, sources, [&](const auto& blocks, auto& out) {
      differentiate_decode(blocks[0], blocks[1], blocks[2], weight, limit, out);
    });
  });
  return result;
}

} // namespace

KERNELS(CPU, m) {
  m.impl("box_encode", TORCH_FN(box_encode));
  m.impl("box_decode", TORCH_FN(box_decode));
  m.impl("box_decode_backward", TORCH_FN(box_decode_backward));
}

} // namespace maskrcnn_benchmark

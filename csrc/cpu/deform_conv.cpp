// Deformable convolution: what the taps of some output pixels read becomes rows of a matrix, which a GEMM multiplies by
// the weights. Channels lie innermost, so that each tap reads, mixes and writes runs of contiguous channels, and the
// GEMM's result is the channels-last output. A tile of output pixels at a time keeps the matrix in the cache.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <type_traits>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Values in the matrix of a tile, and channels that a thread of the backward owns at least: 64 bytes of float32, so
// that threads share no cache line.
constexpr int64_t kTileValues = 1 << 20;
constexpr int64_t kChannelBlock = 16;

// Channels begin..end of the input, all of one group and one offset group; in the group they begin at `inner`.
struct Run {
  int64_t begin, end, group, inner;
};

struct Shape {
  int64_t batch, channels, height, width, outputs, kernel_height, kernel_width, out_height, out_width;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups, offset_groups;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
  int64_t rows() const {
    return batch * out_height * out_width;
  }
  int64_t group_channels() const {
    return channels / groups;
  }
  int64_t tile() const {
    return std::clamp<int64_t>(kTileValues / (taps() * channels), 16, std::max<int64_t>(rows(), 16));
  }

  std::vector<Run> runs(int64_t offset_group) const {
    const int64_t size = channels / offset_groups, last = (offset_group + 1) * size;
    std::vector<Run> result;
    for (int64_t begin = offset_group * size; begin < last;) {
      const int64_t group = begin / group_channels();
      const int64_t end = std::min((group + 1) * group_channels(), last);
      result.push_back({begin, end, group, begin - group * group_channels()});
      begin = end;
    }
    return result;
  }
};

// Where one tap of one output pixel reads: upper left, upper right, lower left, lower right.
template <typename T>
struct Sample {
  std::array<int64_t, 4> pixel{-1, -1, -1, -1}; // counted through all images; -1 outside, where the input is 0
  T down = 0, right = 0; // from the upper left
  T mask = 1;

  std::array<T, 4> weights() const {
    return {(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right};
  }
};

// The samples of the output pixels, or rows of the matrix, in first..last.
template <typename T>
class Samples {
 public:
  Samples(const Shape& shape, const Tensor& offset, const std::optional<Tensor>& mask)
      : shape_(shape),
        offset_(offset.accessor<const T, 4>()),
        mask_((mask ? *mask : offset).accessor<const T, 4>()),
        has_mask_(mask.has_value()),
        samples_(shape.tile() * shape.offset_groups * shape.taps()) {}

  void locate(int64_t first, int64_t last) {
    const int64_t per_row = shape_.offset_groups * shape_.taps();
    at::parallel_for(first, last, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t x = row % shape_.out_width, y = row / shape_.out_width % shape_.out_height;
        const int64_t image = row / shape_.out_width / shape_.out_height;
        for (int64_t i = 0; i < per_row; ++i) {
          samples_[(row - first) * per_row + i] = place(image, y, x, i);
        }
      }
    });
  }

  // row: within the tile.
  const Sample<T>& operator()(int64_t row, int64_t offset_group, int64_t tap) const {
    return samples_[(row * shape_.offset_groups + offset_group) * shape_.taps() + tap];
  }

 private:
  Sample<T> place(int64_t image, int64_t out_y, int64_t out_x, int64_t plane) const {
    const int64_t tap = plane % shape_.taps();
    const int64_t tap_y = tap / shape_.kernel_width, tap_x = tap % shape_.kernel_width;
    const T y = out_y * shape_.stride[0] - shape_.padding[0] + tap_y * shape_.dilation[0] +
        offset_[image][2 * plane][out_y][out_x];
    const T x = out_x * shape_.stride[1] - shape_.padding[1] + tap_x * shape_.dilation[1] +
        offset_[image][2 * plane + 1][out_y][out_x];
    Sample<T> sample;
    if (has_mask_) {
      sample.mask = mask_[image][plane][out_y][out_x];
    }
    if (y >= -1 && y < shape_.height && x >= -1 && x < shape_.width) { // false for NaN
      const int64_t top = static_cast<int64_t>(std::floor(y)), left = static_cast<int64_t>(std::floor(x));
      sample.down = y - top;
      sample.right = x - left;
      sample.pixel = {pixel(image, top, left), pixel(image, top, left + 1), pixel(image, top + 1, left),
                      pixel(image, top + 1, left + 1)};
    }
    return sample;
  }

  int64_t pixel(int64_t image, int64_t y, int64_t x) const {
    const bool exists = y >= 0 && y < shape_.height && x >= 0 && x < shape_.width;
    return exists ? (image * shape_.height + y) * shape_.width + x : -1;
  }

  const Shape& shape_;
  at::TensorAccessor<const T, 4> offset_, mask_;
  bool has_mask_;
  std::vector<Sample<T>> samples_;
};

template <typename F>
struct Corners {
  const F *upper_left, *upper_right, *lower_left, *lower_right;
};

// The input, channels innermost.
template <typename F>
struct Map {
  const F* values;
  int64_t channels;
  std::vector<F> zeros; // what lies outside

  Map(const Tensor& input) : values(input.const_data_ptr<F>()), channels(input.size(1)), zeros(channels, F(0)) {}

  template <typename T>
  Corners<F> corners(const Sample<T>& sample, int64_t channel) const {
    const auto at = [&](int64_t pixel) { return (pixel < 0 ? zeros.data() : values + pixel * channels) + channel; };
    return {at(sample.pixel[0]), at(sample.pixel[1]), at(sample.pixel[2]), at(sample.pixel[3])};
  }
};

template <typename F, typename T>
MULTIVERSION void interpolate(
    Corners<F> from,
    const std::array<T, 4>& weights,
    T mask,
    int64_t count,
    F* __restrict__ to) {
  const T a = weights[0], b = weights[1], c = weights[2], d = weights[3];
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<F>(
        mask *
        (a * static_cast<T>(from.upper_left[i]) + b * static_cast<T>(from.upper_right[i]) +
         c * static_cast<T>(from.lower_left[i]) + d * static_cast<T>(from.lower_right[i])));
  }
}

// Adds to sums the products of grad and each corner, summed over channels.
template <typename F, typename T>
MULTIVERSION void add_products(const F* grad, Corners<F> from, int64_t count, std::array<T, 4>& sums) {
  T a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < count; ++i) {
    const T g = static_cast<T>(grad[i]);
    a += g * static_cast<T>(from.upper_left[i]);
    b += g * static_cast<T>(from.upper_right[i]);
    c += g * static_cast<T>(from.lower_left[i]);
    d += g * static_cast<T>(from.lower_right[i]);
  }
  sums = {sums[0] + a, sums[1] + b, sums[2] + c, sums[3] + d};
}

template <typename F, typename T>
MULTIVERSION void add_weighted(T* __restrict__ sum, const F* __restrict__ values, T weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    sum[i] += weight * static_cast<T>(values[i]);
  }
}

// The matrix of a tile, or its gradient: [groups, rows, taps, channels of a group].
template <typename F>
struct Columns {
  const Shape& shape;
  Tensor tensor;

  Columns(const Shape& s, const at::TensorOptions& options)
      : shape(s), tensor(at::empty({s.groups, s.tile(), s.taps() * s.group_channels()}, options)) {}

  F* at(int64_t row, int64_t tap, const Run& run) const {
    const int64_t place = ((run.group * shape.tile() + row) * shape.taps() + tap) * shape.group_channels() + run.inner;
    return tensor.mutable_data_ptr<F>() + place;
  }

  Tensor of(int64_t group, int64_t rows) const {
    return tensor.select(0, group).narrow(0, 0, rows);
  }
};

template <typename F, typename T>
void fill(const Shape& shape, const Samples<T>& samples, const Map<F>& map, int64_t rows, const Columns<F>& columns) {
  for (int64_t group = 0; group < shape.offset_groups; ++group) {
    const std::vector<Run> runs = shape.runs(group);
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t tap = 0; tap < shape.taps(); ++tap) {
          const Sample<T>& sample = samples(row, group, tap);
          for (const Run& run : runs) {
            const Corners<F> corners = map.corners(sample, run.begin);
            interpolate(corners, sample.weights(), sample.mask, run.end - run.begin, columns.at(row, tap, run));
          }
        }
      }
    });
  }
}

// Gradients of the offsets and the mask, [B, planes, OH, OW] each, from that of the matrix.
template <typename F, typename T>
struct Places {
  const Shape& shape;
  T* offset;
  T* mask; // null without a mask

  void fill(
      const Samples<T>& samples,
      const Map<F>& map,
      int64_t first,
      int64_t rows,
      const Columns<F>& grad_columns) const {
    for (int64_t group = 0; group < shape.offset_groups; ++group) {
      const std::vector<Run> runs = shape.runs(group);
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t tap = 0; tap < shape.taps(); ++tap) {
            const Sample<T>& sample = samples(row, group, tap);
            std::array<T, 4> sums{};
            for (const Run& run : runs) {
              const F* grad = grad_columns.at(row, tap, run);
              add_products(grad, map.corners(sample, run.begin), run.end - run.begin, sums);
            }
            set(first + row, group * shape.taps() + tap, sample, sums);
          }
        }
      });
    }
  }

 private:
  // sums: how the loss changes with each corner, the mask apart. The rest is geometry.
  void set(int64_t row, int64_t plane, const Sample<T>& sample, const std::array<T, 4>& sums) const {
    const int64_t size = shape.out_height * shape.out_width, image = row / size, pixel = row % size;
    const int64_t planes = shape.offset_groups * shape.taps();
    T* y = offset + (image * 2 * planes + 2 * plane) * size + pixel;
    T* x = y + size;
    const auto [upper_left, upper_right, lower_left, lower_right] = sums;
    const T down = sample.down, right = sample.right;
    *y = sample.mask * ((1 - right) * (lower_left - upper_left) + right * (lower_right - upper_right));
    *x = sample.mask * ((1 - down) * (upper_right - upper_left) + down * (lower_right - lower_left));
    if (mask != nullptr) {
      const auto [a, b, c, d] = sample.weights();
      mask[(image * planes + plane) * size + pixel] =
          a * upper_left + b * upper_right + c * lower_left + d * lower_right;
    }
  }
};

// Adds the gradient of the matrix to that of the pixels it was read from. Threads own channels, so no two ever add to
// the same place and the sums do not depend on their number.
template <typename F, typename T>
void scatter(const Shape& shape, const Samples<T>& samples, int64_t rows, const Columns<F>& grad_columns, T* grad_map) {
  at::parallel_for(0, at::divup(shape.channels, kChannelBlock), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = 0; group < shape.offset_groups; ++group) {
      for (const Run& run : shape.runs(group)) {
        const int64_t first = std::max(begin * kChannelBlock, run.begin);
        const int64_t count = std::min(end * kChannelBlock, run.end) - first;
        for (int64_t row = 0; row < (count > 0 ? rows : 0); ++row) {
          for (int64_t tap = 0; tap < shape.taps(); ++tap) {
            const Sample<T>& sample = samples(row, group, tap);
            const std::array<T, 4> weights = sample.weights();
            const F* grad = grad_columns.at(row, tap, run) + (first - run.begin);
            for (int corner = 0; corner < 4; ++corner) {
              if (sample.pixel[corner] >= 0) {
                T* to = grad_map + sample.pixel[corner] * shape.channels + first;
                add_weighted(to, grad, sample.mask * weights[corner], count);
              }
            }
          }
        }
      }
    }
  });
}

Shape shape_of(
    const Tensor& input,
    const Tensor& offset,
    const Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    int64_t offset_groups) {
  return {
      input.size(0), input.size(1), input.size(2), input.size(3), weight.size(0), weight.size(2), weight.size(3),
      offset.size(2), offset.size(3), {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]},
      groups, offset_groups};
}

// Offsets, masks, interpolation and sums: float64 for float64 inputs, float32 for all others.
at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor in_format_of(const Tensor& model, const Tensor& tensor) {
  const bool last = model.is_contiguous(at::MemoryFormat::ChannelsLast) && !model.is_contiguous();
  return tensor.contiguous(last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// [O, taps * channels of a group]: as the rows of the matrix.
Tensor weight_rows(const Tensor& weight) {
  return weight.permute({0, 2, 3, 1}).reshape({weight.size(0), -1});
}

Tensor deform_conv2d(
    const Tensor& input,
    const Tensor& offset,
    const std::optional<Tensor>& mask,
    const Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    int64_t offset_groups) {
  const Shape shape = shape_of(input, offset, weight, stride, padding, dilation, groups, offset_groups);
  const Tensor map = input.contiguous(at::MemoryFormat::ChannelsLast), weights = weight_rows(weight);
  Tensor out = at::empty({shape.rows(), shape.outputs}, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    Samples<T> samples(shape, offset, mask);
    const Map<scalar_t> pixels(map);
    const Columns<scalar_t> columns(shape, input.options());
    for (int64_t first = 0; first < shape.rows(); first += shape.tile()) {
      const int64_t rows = std::min(shape.tile(), shape.rows() - first), part = shape.outputs / groups;
      samples.locate(first, first + rows);
      fill(shape, samples, pixels, rows, columns);
      for (int64_t group = 0; group < groups; ++group) {
        Tensor out_of_group = out.narrow(0, first, rows).narrow(1, group * part, part);
        at::mm_out(out_of_group, columns.of(group, rows), weights.narrow(0, group * part, part).t());
      }
    }
  });
  return in_format_of(
      input, out.view({shape.batch, shape.out_height, shape.out_width, shape.outputs}).permute({0, 3, 1, 2}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad,
    const Tensor& input,
    const Tensor& offset,
    const std::optional<Tensor>& mask,
    const Tensor& weight,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    int64_t offset_groups) {
  const Shape shape = shape_of(input, offset, weight, stride, padding, dilation, groups, offset_groups);
  const Tensor map = input.contiguous(at::MemoryFormat::ChannelsLast), weights = weight_rows(weight);
  const Tensor grad_rows = grad.permute({0, 2, 3, 1}).reshape({shape.rows(), shape.outputs});
  const auto sums = input.options().dtype(compute_type(input.scalar_type()));
  const Tensor grad_map = at::zeros({shape.batch, shape.height, shape.width, shape.channels}, sums);
  const Tensor grad_weights = at::zeros(weights.sizes(), sums);
  const Tensor grad_offset = at::empty(offset.sizes(), sums);
  const Tensor grad_mask = at::empty(mask ? mask->sizes() : at::IntArrayRef{0}, sums);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d_backward", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    Samples<T> samples(shape, offset, mask);
    const Map<scalar_t> pixels(map);
    const Columns<scalar_t> columns(shape, input.options()), grad_columns(shape, input.options());
    const Places<scalar_t, T> places{
        shape, grad_offset.mutable_data_ptr<T>(), mask ? grad_mask.mutable_data_ptr<T>() : nullptr};
    for (int64_t first = 0; first < shape.rows(); first += shape.tile()) {
      const int64_t rows = std::min(shape.tile(), shape.rows() - first), part = shape.outputs / groups;
      samples.locate(first, first + rows);
      fill(shape, samples, pixels, rows, columns);
      for (int64_t group = 0; group < groups; ++group) {
        const Tensor upstream = grad_rows.narrow(0, first, rows).narrow(1, group * part, part);
        Tensor grad_of_group = grad_columns.of(group, rows);
        at::mm_out(grad_of_group, upstream, weights.narrow(0, group * part, part));
        grad_weights.narrow(0, group * part, part).add_(at::mm(upstream.t(), columns.of(group, rows)));
      }
      places.fill(samples, pixels, first, rows, grad_columns);
      scatter(shape, samples, rows, grad_columns, grad_map.mutable_data_ptr<T>());
    }
  });
  const Tensor grad_weight = grad_weights.view({shape.outputs, shape.kernel_height, shape.kernel_width, -1});
  return {
      in_format_of(input, grad_map.permute({0, 3, 1, 2}).to(input.scalar_type())),
      grad_offset,
      grad_mask,
      in_format_of(weight, grad_weight.permute({0, 3, 1, 2}).to(weight.scalar_type()))};
}

} // namespace

KERNELS(CPU, m) {
  m.impl("deform_conv2d", TORCH_FN(deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_FN(deform_conv2d_backward));
}

} // namespace maskrcnn_benchmark

// Deformable convolution as a gather into columns and a matrix product; see ops/deform_conv.py for the layouts.
// Everything is channels-last inside: a tap reads runs of neighbouring channels at each of its four pixels.
#include "common.cuh"

#include <ATen/Context.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace maskrcnn_benchmark {
namespace {

// Scalars of the columns that are held at a time, more than that only for a single image: 256 MB of float32.
constexpr int64_t kColumnScalars = int64_t(1) << 26;

struct Geometry {
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups, offset_groups;

  C10_HOST_DEVICE int64_t taps() const {
    return kernel_height * kernel_width;
  }

  C10_HOST_DEVICE int64_t out_pixels() const {
    return out_height * out_width;
  }

  C10_HOST_DEVICE int64_t channels_per_group() const {
    return channels / groups;
  }

  // Of an offset group; a site's channels.
  C10_HOST_DEVICE int64_t channels_per_site() const {
    return channels / offset_groups;
  }
};

// Some images of a batch. A "site" is one tap of one output pixel for one offset group.
template <typename T>
struct Images {
  Geometry geometry;
  int64_t count;
  const T* input; // [count, height, width, channels]
  const Compute<T>* offset; // [count, offset_groups, taps, 2, out_height, out_width]
  const Compute<T>* mask; // [count, offset_groups, taps, out_height, out_width], or null for 1

  C10_HOST_DEVICE int64_t pixels() const {
    return count * geometry.out_pixels();
  }

  C10_HOST_DEVICE int64_t sites() const {
    return pixels() * geometry.taps() * geometry.offset_groups;
  }
};

// Where a site reads, and where its own numbers lie.
template <typename T>
struct Site {
  using A = Compute<T>;

  int64_t pixel, tap, first_channel;
  int64_t plane; // of the mask, [count, offset_groups, taps]; the offset has two for each
  int64_t out_pixel; // within a plane
  int64_t corners[4]; // upper left, upper right, lower left, lower right: input pixels, -1 outside the input
  A down, right; // how far below and right of the upper left corner, 0..1
  A factor; // the mask

  __device__ Site(const Images<T>& images, int64_t number) {
    const Geometry& g = images.geometry;
    const int64_t group = number % g.offset_groups;
    tap = number / g.offset_groups % g.taps();
    pixel = number / g.offset_groups / g.taps();
    first_channel = group * g.channels_per_site();
    out_pixel = pixel % g.out_pixels();
    const int64_t image = pixel / g.out_pixels();
    plane = (image * g.offset_groups + group) * g.taps() + tap;
    const A* offset = images.offset + 2 * plane * g.out_pixels() + out_pixel;
    factor = images.mask == nullptr ? A(1) : images.mask[plane * g.out_pixels() + out_pixel];
    const int64_t y = out_pixel / g.out_width * g.stride[0] - g.padding[0] + tap / g.kernel_width * g.dilation[0];
    const int64_t x = out_pixel % g.out_width * g.stride[1] - g.padding[1] + tap % g.kernel_width * g.dilation[1];
    locate(g, image, static_cast<A>(y) + offset[0], static_cast<A>(x) + offset[g.out_pixels()]);
  }

  __device__ A share(int corner) const {
    return (corner / 2 == 0 ? 1 - down : down) * (corner % 2 == 0 ? 1 - right : right);
  }

 private:
  __device__ void locate(const Geometry& g, int64_t image, A y, A x) {
    const bool inside = y >= -1 && y < g.height && x >= -1 && x < g.width; // not so for what is not a number
    const A top = inside ? std::floor(y) : A(0), left = inside ? std::floor(x) : A(0);
    down = inside ? y - top : A(0);
    right = inside ? x - left : A(0);
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t row = static_cast<int64_t>(top) + corner / 2, column = static_cast<int64_t>(left) + corner % 2;
      const bool exists = inside && row >= 0 && row < g.height && column >= 0 && column < g.width;
      corners[corner] = exists ? (image * g.height + row) * g.width + column : -1;
    }
  }
};

// columns [groups, pixels, taps, channels per group]: where a channel of a site lies.
template <typename T>
__device__ inline int64_t column_place(const Images<T>& images, const Site<T>& site, int64_t channel) {
  const int64_t per_group = images.geometry.channels_per_group();
  const int64_t group = channel / per_group;
  return ((group * images.pixels() + site.pixel) * images.geometry.taps() + site.tap) * per_group +
      channel - group * per_group;
}

// `lanes` neighbouring threads a site, each N channels at a time; N divides both kinds of groups.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) gather_kernel(Images<T> images, int lanes, T* columns) {
  using A = Compute<T>;
  const Geometry& g = images.geometry;
  const int lane = threadIdx.x % lanes;
  for (int64_t number = thread_number() / lanes; number < images.sites(); number += thread_count() / lanes) {
    const Site<T> site(images, number);
    for (int64_t i = lane * N; i < g.channels_per_site(); i += lanes * N) {
      const int64_t channel = site.first_channel + i;
      A sums[N] = {};
      for (int corner = 0; corner < 4; ++corner) {
        if (site.corners[corner] >= 0) {
          const auto values = Vector<T, N>::load(images.input + site.corners[corner] * g.channels + channel);
          for (int j = 0; j < N; ++j) {
            sums[j] = std::fma(site.share(corner), static_cast<A>(values.values[j]), sums[j]);
          }
        }
      }
      Vector<T, N> result;
      for (int j = 0; j < N; ++j) {
        result.values[j] = static_cast<T>(sums[j] * site.factor);
      }
      result.store(columns + column_place(images, site, channel));
    }
  }
}

template <typename A>
__device__ inline A sum_over_lanes(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAllLanes, value, distance, lanes);
  }
  return value;
}

// Takes the columns' gradient and leaves the columns in its place. `lanes` neighbouring threads, of one warp, add up
// the gradients of a site's offset and mask; those of the input meet in memory, in any order.
template <typename T>
__global__ void __launch_bounds__(kThreads) scatter_kernel(
    Images<T> images,
    int lanes,
    T* columns,
    Compute<T>* grad_input,
    Compute<T>* grad_offset,
    Compute<T>* grad_mask) {
  using A = Compute<T>;
  const Geometry& g = images.geometry;
  const int lane = threadIdx.x % lanes;
  const int64_t number = thread_number() / lanes;
  const bool exists = number < images.sites();
  const Site<T> site(images, exists ? number : 0);
  A grad_y = 0, grad_x = 0, grad_factor = 0;
  for (int64_t i = lane; exists && i < g.channels_per_site(); i += lanes) {
    const int64_t channel = site.first_channel + i;
    T* column = columns + column_place(images, site, channel);
    const A grad = static_cast<A>(*column);
    A values[4] = {}, sampled = 0;
    for (int corner = 0; corner < 4; ++corner) {
      if (site.corners[corner] >= 0) {
        const int64_t place = site.corners[corner] * g.channels + channel;
        values[corner] = static_cast<A>(images.input[place]);
        sampled = std::fma(site.share(corner), values[corner], sampled);
        atomicAdd(grad_input + place, grad * site.factor * site.share(corner));
      }
    }
    *column = static_cast<T>(sampled * site.factor);
    grad_y += grad * ((1 - site.right) * (values[2] - values[0]) + site.right * (values[3] - values[1]));
    grad_x += grad * ((1 - site.down) * (values[1] - values[0]) + site.down * (values[3] - values[2]));
    grad_factor += grad * sampled;
  }
  grad_y = sum_over_lanes(grad_y, lanes);
  grad_x = sum_over_lanes(grad_x, lanes);
  grad_factor = sum_over_lanes(grad_factor, lanes);
  if (exists && lane == 0) {
    A* offset = grad_offset + 2 * site.plane * g.out_pixels() + site.out_pixel;
    offset[0] = grad_y * site.factor;
    offset[g.out_pixels()] = grad_x * site.factor;
    if (grad_mask != nullptr) {
      grad_mask[site.plane * g.out_pixels() + site.out_pixel] = grad_factor;
    }
  }
}

int lanes_for(int64_t items) {
  int lanes = 1;
  while (lanes < kWarp && lanes < items) {
    lanes *= 2;
  }
  return lanes;
}

// Channels-last only where the tensor is that and nothing else, as the composite has it.
at::MemoryFormat memory_format(const Tensor& tensor) {
  const bool last = tensor.is_contiguous(at::MemoryFormat::ChannelsLast) && !tensor.is_contiguous();
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The tensors in the kernels' layout, and the batch cut into parts whose columns fit.
struct Problem {
  Geometry geometry;
  int64_t batch;
  Tensor input; // [B, H, W, C]
  Tensor offset, mask; // contiguous; mask undefined for 1
  Tensor weight; // [groups, out channels per group, taps * channels per group]

  Problem(
      const Tensor& input,
      const Tensor& offset,
      const std::optional<Tensor>& mask,
      const Tensor& weight,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      at::IntArrayRef dilation,
      int64_t groups,
      int64_t offset_groups)
      : geometry{input.size(1), input.size(2), input.size(3), offset.size(2), offset.size(3), weight.size(2),
                 weight.size(3), {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}, groups,
                 offset_groups},
        batch(input.size(0)),
        input(input.permute({0, 2, 3, 1}).contiguous()),
        offset(offset.contiguous()),
        weight(weight.permute({0, 2, 3, 1}).reshape({groups, weight.size(0) / groups, column_length()})) {
    const auto compute = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "deform_conv2d: weight and input differ in dtype");
    TORCH_CHECK(offset.scalar_type() == compute && (!mask || mask->scalar_type() == compute),
                "deform_conv2d: offset and mask must be ", compute);
    if (mask) {
      this->mask = mask->contiguous();
    }
  }

  int64_t column_length() const {
    return geometry.taps() * geometry.channels_per_group();
  }

  int64_t step() const {
    const int64_t image = geometry.groups * geometry.out_pixels() * column_length();
    return smaller(batch, larger<int64_t>(1, kColumnScalars / larger<int64_t>(1, image)));
  }

  template <typename T>
  Images<T> images(int64_t first, int64_t count) const {
    const Geometry& g = geometry;
    const int64_t planes = g.offset_groups * g.taps() * g.out_pixels();
    return {
        g,
        count,
        input.const_data_ptr<T>() + first * g.height * g.width * g.channels,
        offset.const_data_ptr<Compute<T>>() + 2 * first * planes,
        mask.defined() ? mask.const_data_ptr<Compute<T>>() + first * planes : nullptr};
  }

  // Some images of an [B * OH * OW, out channels] tensor, by group: [groups, pixels, out channels per group].
  Tensor by_group(const Tensor& rows, int64_t first, int64_t count) const {
    return rows.narrow(0, first * geometry.out_pixels(), count * geometry.out_pixels())
        .view({-1, geometry.groups, weight.size(1)})
        .transpose(0, 1);
  }
};

template <typename T>
void gather(const Images<T>& images, const Tensor& columns) {
  const Geometry& g = images.geometry;
  T* target = columns.mutable_data_ptr<T>();
  constexpr int kSize = kVectorSize<T>;
  const bool in_vectors = g.channels_per_group() % kSize == 0 && is_aligned(images.input, g.channels_per_site(), kSize);
  const int lanes = lanes_for(g.channels_per_site() / (in_vectors ? kSize : 1));
  launch(in_vectors ? gather_kernel<T, kSize> : gather_kernel<T, 1>, block_count(images.sites() * lanes), kThreads, 0,
         images, lanes, target);
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
  const c10::cuda::CUDAGuard guard(input.device());
  const Problem problem(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  const Geometry& g = problem.geometry;
  const Tensor output = at::empty({problem.batch, g.out_height, g.out_width, weight.size(0)}, input.options());
  const Tensor rows = output.view({-1, weight.size(0)});
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d", [&] {
    for (int64_t first = 0; first < problem.batch && rows.numel() > 0; first += problem.step()) {
      const auto images = problem.images<scalar_t>(first, smaller(problem.step(), problem.batch - first));
      const Tensor columns = at::empty({groups, images.pixels(), problem.column_length()}, input.options());
      gather(images, columns);
      Tensor part = problem.by_group(rows, first, images.count);
      at::bmm_out(part, columns, problem.weight.transpose(1, 2));
    }
  });
  return output.permute({0, 3, 1, 2}).contiguous(memory_format(input));
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
  at::globalContext().alertNotDeterministic("deform_conv2d_backward on CUDA");
  const c10::cuda::CUDAGuard guard(input.device());
  const Problem problem(input, offset, mask, weight, stride, padding, dilation, groups, offset_groups);
  const Geometry& g = problem.geometry;
  const auto sums = problem.offset.options();
  const Tensor rows = grad.permute({0, 2, 3, 1}).reshape({-1, weight.size(0)}).contiguous();
  const Tensor grad_input = at::zeros(problem.input.sizes(), sums), grad_weight = at::zeros(problem.weight.sizes(), sums);
  const Tensor grad_offset = at::empty(offset.sizes(), sums);
  const Tensor grad_mask = at::empty(mask ? mask->sizes() : at::IntArrayRef{0}, sums);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "deform_conv2d_backward", [&] {
    using A = Compute<scalar_t>;
    const int lanes = lanes_for(g.channels_per_site());
    for (int64_t first = 0; first < problem.batch && rows.numel() > 0; first += problem.step()) {
      const auto images = problem.images<scalar_t>(first, smaller(problem.step(), problem.batch - first));
      const Tensor part = problem.by_group(rows, first, images.count);
      const Tensor columns = at::bmm(part, problem.weight);
      const int64_t sites_before = first * g.offset_groups * g.taps() * g.out_pixels();
      launch(scatter_kernel<scalar_t>, block_count(images.sites() * lanes), kThreads, 0, images, lanes,
             columns.mutable_data_ptr<scalar_t>(),
             grad_input.mutable_data_ptr<A>() + first * g.height * g.width * g.channels,
             grad_offset.mutable_data_ptr<A>() + 2 * sites_before,
             mask ? grad_mask.mutable_data_ptr<A>() + sites_before : nullptr);
      grad_weight.add_(at::bmm(part.transpose(1, 2), columns));
    }
  });
  const auto format = memory_format(input);
  const auto weights = grad_weight.to(weight.scalar_type());
  return {
      grad_input.to(input.scalar_type()).permute({0, 3, 1, 2}).contiguous(format),
      grad_offset,
      grad_mask,
      weights.view({weight.size(0), weight.size(2), weight.size(3), weight.size(1)})
          .permute({0, 3, 1, 2})
          .contiguous(memory_format(weight))};
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("deform_conv2d", TORCH_FN(deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_FN(deform_conv2d_backward));
}

} // namespace maskrcnn_benchmark

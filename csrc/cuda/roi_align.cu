// RoIAlign over channels-last maps, one launch for all levels of a pyramid. A thread computes 16 bytes of channels of a
// bin, so neighbouring threads read neighbouring addresses; coordinates round as on the CPU (-fmad=false), sums are
// fused multiply-adds.
#include "common.cuh"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace maskrcnn_benchmark {
namespace {

constexpr int kMaxLevels = 8;

template <typename T, typename F>
struct Level {
  F* map; // [B, height, width, channels]
  T scale;
  int height, width;
};

template <typename T, typename F>
struct Pyramid {
  Level<T, F> levels[kMaxLevels];
  int count;
  int64_t batch, channels;
};

// The samples of one axis of a box.
template <typename T>
struct Axis {
  T start, side; // of the box in feature pixels
  T bin_side, samples; // samples a bin
  T size; // of the map

  __device__ Axis(T low, T high, T scale, int map_size, int bins, int sampling_ratio, bool aligned) : size(map_size) {
    const T offset = aligned ? T(0.5) : T(0);
    start = low * scale - offset;
    side = (high * scale - offset) - start;
    if (!aligned && side < 1) {
      side = 1;
    }
    bin_side = side / bins;
    samples = sampling_ratio > 0 ? T(sampling_ratio) : std::ceil(bin_side);
    if (sampling_ratio == 0) {
      samples = samples > 0 ? smaller(samples, size + 2) : T(0); // 0 for NaN
    }
  }

  __device__ T position(int bin, int sample) const {
    return start + bin * bin_side + (sample + T(0.5)) * bin_side / samples;
  }

  __device__ bool is_inside(T position) const {
    return position >= -1 && position <= size; // false for NaN
  }

  __device__ T clamp(T position) const {
    return smaller(larger(position, T(0)), size - 1);
  }
};

// The two pixels of an axis that a sample lies between, with their weights in the mean over a bin's samples.
template <typename T>
struct Taps {
  int pixel[2];
  T weight[2];

  __device__ Taps(const Axis<T>& axis, T position) {
    position = axis.clamp(position);
    const T share = 1 / axis.samples;
    pixel[0] = static_cast<int>(position);
    pixel[1] = smaller(pixel[0] + 1, static_cast<int>(axis.size) - 1);
    const T above = position - pixel[0];
    weight[0] = (1 - above) * share;
    weight[1] = above * share;
  }
};

// The pixels that a bin of at most two samples reads on an axis, with their weights in the mean. Samples lie half a bin
// apart, so their pixels often meet: of the 16 that a bin would read, and add to with atomics, 10 are left with 7x7 bins
// and 7 with 14x14 (COCO's objects at short side 800, jittered).
template <typename T>
struct BinPixels {
  int pixel[4];
  T weight[4];
  bool used[4];

  __device__ BinPixels(const Axis<T>& axis, int bin) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T position = axis.position(bin, i);
      const bool exists = i < axis.samples && axis.is_inside(position);
      const Taps<T> taps(axis, exists ? position : T(0));
#pragma unroll
      for (int tap = 0; tap < 2; ++tap) {
        pixel[2 * i + tap] = taps.pixel[tap];
        weight[2 * i + tap] = taps.weight[tap];
        used[2 * i + tap] = exists;
      }
    }
    if (used[0] && used[2] && pixel[2] == pixel[0]) {
      weight[0] += weight[2];
      weight[1] += weight[3];
      used[2] = used[3] = false;
    } else if (used[0] && used[2] && pixel[2] == pixel[1]) {
      weight[1] += weight[2];
      used[2] = false;
    }
  }
};

template <typename T>
struct Rois {
  const T* boxes;
  const int64_t* image_index;
  const int64_t* level_index;
  int64_t count;
  int bins, sampling_ratio;
  bool aligned;

  template <typename F>
  __device__ bool exists(int64_t roi, const Pyramid<T, F>& pyramid) const {
    const int64_t image = image_index[roi], level = level_index[roi];
    return image >= 0 && image < pyramid.batch && level >= 0 && level < pyramid.count;
  }

  template <typename F>
  __device__ Axis<T> x(int64_t roi, const Level<T, F>& level) const {
    return {boxes[4 * roi], boxes[4 * roi + 2], level.scale, level.width, bins, sampling_ratio, aligned};
  }

  template <typename F>
  __device__ Axis<T> y(int64_t roi, const Level<T, F>& level) const {
    return {boxes[4 * roi + 1], boxes[4 * roi + 3], level.scale, level.height, bins, sampling_ratio, aligned};
  }
};

// Calls body(offset of a pixel in values of the image, weight) for the pixels that a bin reads.
template <typename T, typename F, typename Body>
__device__ void for_each_tap(
    const Rois<T>& rois, const Pyramid<T, F>& pyramid, int64_t roi, int row, int column, const Body& body) {
  const Level<T, F>& level = pyramid.levels[rois.level_index[roi]];
  const Axis<T> y = rois.y(roi, level), x = rois.x(roi, level);
  if (y.samples <= 2 && x.samples <= 2) {
    const BinPixels<T> rows(y, row), columns(x, column);
#pragma unroll // so that all of this stays in registers
    for (int pair = 0; pair < 16; ++pair) {
      const int i = pair / 4, j = pair % 4;
      if (rows.used[i] && columns.used[j]) {
        const int64_t pixel = int64_t(rows.pixel[i]) * level.width + columns.pixel[j];
        body(pixel * pyramid.channels, rows.weight[i] * columns.weight[j]);
      }
    }
    return;
  }
  for (int i = 0; i < y.samples; ++i) {
    const T y_position = y.position(row, i);
    if (!y.is_inside(y_position)) {
      continue;
    }
    const Taps<T> rows(y, y_position);
    for (int j = 0; j < x.samples; ++j) {
      const T x_position = x.position(column, j);
      if (!x.is_inside(x_position)) {
        continue;
      }
      const Taps<T> columns(x, x_position);
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        const int64_t pixel = int64_t(rows.pixel[tap / 2]) * level.width + columns.pixel[tap % 2];
        body(pixel * pyramid.channels, rows.weight[tap / 2] * columns.weight[tap % 2]);
      }
    }
  }
}

template <typename T, typename F>
__device__ F* image_of(const Rois<T>& rois, const Pyramid<T, F>& pyramid, int64_t roi) {
  const Level<T, F>& level = pyramid.levels[rois.level_index[roi]];
  return level.map + rois.image_index[roi] * level.height * level.width * pyramid.channels;
}

template <typename T, int N, typename F>
__device__ void add_weighted(T (&sum)[N], const Vector<F, N>& values, T weight) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum[i] = std::fma(weight, static_cast<T>(values.values[i]), sum[i]);
  }
}

// A block has a box (grid's x), some of its bins (grid's y and block's y) and N channels a thread (block's x).
template <typename F, typename O, typename T, int N>
__global__ void forward_kernel(Rois<T> rois, Pyramid<T, const F> pyramid, O* out) {
  const int64_t roi = blockIdx.x, channels = pyramid.channels;
  const int area = rois.bins * rois.bins;
  const bool exists = rois.exists(roi, pyramid);
  const F* map = exists ? image_of(rois, pyramid, roi) : nullptr;
  for (int bin = blockIdx.y * blockDim.y + threadIdx.y; bin < area; bin += gridDim.y * blockDim.y) {
    for (int64_t channel = threadIdx.x * N; channel < channels; channel += blockDim.x * N) {
      T sum[N] = {};
      if (exists) {
        for_each_tap(rois, pyramid, roi, bin / rois.bins, bin % rois.bins, [&](int64_t offset, T weight) {
          add_weighted(sum, Vector<F, N>::load(map + offset + channel), weight);
        });
      }
      Vector<O, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        result.values[i] = static_cast<O>(sum[i]);
      }
      result.store(out + (roi * area + bin) * channels + channel);
    }
  }
}

template <typename T, int N>
__device__ void atomic_add(T* target, const T (&values)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<T, float> && N == 4) {
    atomicAdd(reinterpret_cast<float4*>(target), make_float4(values[0], values[1], values[2], values[3]));
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      atomicAdd(target + i, values[i]);
    }
  }
}

// Adds each bin's gradient to the pixels it reads. Laid out like forward_kernel.
template <typename G, typename T, int N>
__global__ void scatter_kernel(Rois<T> rois, Pyramid<T, T> pyramid, const G* grad) {
  const int64_t roi = blockIdx.x, channels = pyramid.channels;
  const int area = rois.bins * rois.bins;
  if (!rois.exists(roi, pyramid)) {
    return;
  }
  T* map = image_of(rois, pyramid, roi);
  for (int bin = blockIdx.y * blockDim.y + threadIdx.y; bin < area; bin += gridDim.y * blockDim.y) {
    for (int64_t channel = threadIdx.x * N; channel < channels; channel += blockDim.x * N) {
      const auto upstream = Vector<G, N>::load(grad + (roi * area + bin) * channels + channel);
      for_each_tap(rois, pyramid, roi, bin / rois.bins, bin % rois.bins, [&](int64_t offset, T weight) {
        if (weight != 0) {
          T share[N] = {};
          add_weighted(share, upstream, weight);
          atomic_add(map + offset + channel, share);
        }
      });
    }
  }
}

// The deterministic backward: a block owns a tile of pixels, and a warp of it a row of the tile, all for a warp's width
// of channels. Boxes come by number, so every sum has one order, and each pixel is written once.
constexpr int kTile = 8;
constexpr int kRois = kTile * kWarp; // looked at at a time, one a thread

// Whether a box may have samples near the pixels first..first + kTile - 1 of an axis.
template <typename T>
__device__ bool may_touch(const Axis<T>& axis, int first) {
  const T margin = 2; // a tap is less than one pixel from its sample; the rest is for rounding
  const T end = axis.start + axis.side;
  return axis.clamp(smaller(axis.start, end)) - margin < first + kTile &&
      axis.clamp(larger(axis.start, end)) + margin > first;
}

// The weight of a pixel of an axis in a bin.
template <typename T>
__device__ T pixel_weight(const Axis<T>& axis, int bin, int pixel) {
  T sum = 0;
  for (int sample = 0; sample < axis.samples; ++sample) {
    const T position = axis.position(bin, sample);
    if (axis.is_inside(position)) {
      const Taps<T> taps(axis, position);
      sum += (taps.pixel[0] == pixel ? taps.weight[0] : T(0)) + (taps.pixel[1] == pixel ? taps.weight[1] : T(0));
    }
  }
  return sum;
}

struct TilePlace {
  int level, x, y; // x, y: the first pixel
};

template <typename T, typename F>
__device__ TilePlace tile_place(const Pyramid<T, F>& pyramid, int tile) {
  int level = 0, across = 0;
  for (;; ++level) {
    across = (pyramid.levels[level].width + kTile - 1) / kTile;
    const int tiles = across * ((pyramid.levels[level].height + kTile - 1) / kTile);
    if (tile < tiles) {
      return {level, tile % across * kTile, tile / across * kTile};
    }
    tile -= tiles;
  }
}

template <typename G, typename T, int N>
struct Gather {
  const Rois<T>& rois;
  const G* grad;
  int64_t channels, channel;
  T* y_weights; // [bins, kTile], shared by the block
  T* x_weights;

  // All threads of the block take part: the weights of the tile's pixels in the box's bins.
  __device__ void place(const Axis<T>& y, const Axis<T>& x, const TilePlace& tile, int thread) {
    for (int i = thread; i < rois.bins * kTile; i += kRois) {
      y_weights[i] = pixel_weight(y, i / kTile, tile.y + i % kTile);
      x_weights[i] = pixel_weight(x, i / kTile, tile.x + i % kTile);
    }
  }

  __device__ void add(T (&sums)[kTile][N], int64_t roi, int tile_row) const {
    for (int row = 0; row < rois.bins; ++row) {
      const T y_weight = y_weights[row * kTile + tile_row];
      if (y_weight == 0) {
        continue;
      }
      for (int column = 0; column < rois.bins; ++column) {
        const T* weights = x_weights + column * kTile;
        if (!any(weights)) {
          continue;
        }
        const int64_t bin = (roi * rois.bins + row) * rois.bins + column;
        const auto upstream = Vector<G, N>::load(grad + bin * channels + channel);
#pragma unroll
        for (int pixel = 0; pixel < kTile; ++pixel) {
          if (weights[pixel] != 0) { // 0 times an infinite gradient would be NaN
            add_weighted(sums[pixel], upstream, y_weight * weights[pixel]);
          }
        }
      }
    }
  }

 private:
  __device__ static bool any(const T* weights) {
    bool result = false;
#pragma unroll
    for (int pixel = 0; pixel < kTile; ++pixel) {
      result |= weights[pixel] != 0;
    }
    return result;
  }
};

template <typename G, typename T, int N>
__global__ void gather_kernel(Rois<T> rois, Pyramid<T, G> pyramid, const G* grad) {
  __shared__ unsigned int touching[kTile];
  const TilePlace tile = tile_place(pyramid, blockIdx.x);
  const Level<T, G>& level = pyramid.levels[tile.level];
  const int64_t image = blockIdx.y, channel = (int64_t(blockIdx.z) * kWarp + threadIdx.x) * N;
  const int warp = threadIdx.y, thread = warp * kWarp + threadIdx.x;
  T* weights = dynamic_shared<T>();
  Gather<G, T, N> gather{rois, grad, pyramid.channels, channel, weights, weights + rois.bins * kTile};
  T sums[kTile][N] = {};
  for (int64_t first = 0; first < rois.count; first += kRois) {
    const int64_t candidate = first + thread;
    const bool touches = candidate < rois.count && rois.image_index[candidate] == image &&
        rois.level_index[candidate] == tile.level && may_touch(rois.y(candidate, level), tile.y) &&
        may_touch(rois.x(candidate, level), tile.x);
    const unsigned int lanes = __ballot_sync(kAllLanes, touches);
    if (threadIdx.x == 0) {
      touching[warp] = lanes;
    }
    __syncthreads();
    for (int word = 0; word < kTile; ++word) {
      for (unsigned int left = touching[word]; left != 0; left &= left - 1) {
        const int64_t roi = first + word * kWarp + __ffs(left) - 1;
        gather.place(rois.y(roi, level), rois.x(roi, level), tile, thread);
        __syncthreads();
        if (channel < pyramid.channels) {
          gather.add(sums, roi, warp);
        }
        __syncthreads();
      }
    }
    __syncthreads();
  }
  const int row = tile.y + warp;
  if (row >= level.height || channel >= pyramid.channels) {
    return;
  }
  G* out = level.map + ((image * level.height + row) * level.width + tile.x) * pyramid.channels + channel;
#pragma unroll
  for (int pixel = 0; pixel < kTile; ++pixel) {
    if (tile.x + pixel < level.width) {
      Vector<G, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        result.values[i] = static_cast<G>(sums[pixel][i]);
      }
      result.store(out + pixel * pyramid.channels);
    }
  }
}

template <typename T>
Rois<T> rois_of(
    const Tensor& boxes, const Tensor& image, const Tensor& level, int64_t bins, int64_t sampling_ratio, bool aligned) {
  return {
      boxes.const_data_ptr<T>(),
      image.const_data_ptr<int64_t>(),
      level.const_data_ptr<int64_t>(),
      boxes.size(0),
      static_cast<int>(bins),
      static_cast<int>(sampling_ratio),
      aligned};
}

// maps: [B, H, W, C] in memory, whatever their strides say.
template <typename T, typename F>
Pyramid<T, F> pyramid_of(
    const std::vector<F*>& maps, at::ArrayRef<double> scales, at::IntArrayRef heights, at::IntArrayRef widths,
    int64_t batch, int64_t channels) {
  TORCH_CHECK(maps.size() <= kMaxLevels, "roi_align: at most ", kMaxLevels, " levels on CUDA, got ", maps.size());
  Pyramid<T, F> pyramid{{}, static_cast<int>(maps.size()), batch, channels};
  for (size_t i = 0; i < maps.size(); ++i) {
    pyramid.levels[i] = {
        maps[i], static_cast<T>(scales[i]), static_cast<int>(heights[i]), static_cast<int>(widths[i])};
  }
  return pyramid;
}

template <typename T, typename F>
bool are_aligned(const Pyramid<T, F>& pyramid, int64_t size) {
  return std::all_of(pyramid.levels, pyramid.levels + pyramid.count, [&](const Level<T, F>& level) {
    return is_aligned(level.map, pyramid.channels, size);
  });
}

// For kernels laid out like forward_kernel: a row of threads for the channels, as many rows as a block holds.
template <int N, typename T, typename Kernel, typename... Arguments>
void launch_by_bins(Kernel kernel, const Rois<T>& rois, int64_t channels, const Arguments&... arguments) {
  if (channels == 0) {
    return;
  }
  TORCH_CHECK(rois.bins <= 4096, "roi_align: at most 4096 bins an axis on CUDA, got ", rois.bins);
  unsigned int across = 1;
  while (across < kThreads && across * N < channels) {
    across *= 2;
  }
  const dim3 threads(across, kThreads / across);
  const unsigned int parts = block_count(int64_t(rois.bins) * rois.bins, threads.y);
  launch(kernel, {block_count(rois.count, 1), std::min(parts, 65535u)}, threads, 0, rois, arguments...);
}

bool are_channels_last(at::TensorList features) {
  bool last = true, first = true;
  for (const Tensor& feature : features) {
    last = last && feature.is_contiguous(at::MemoryFormat::ChannelsLast);
    first = first && feature.is_contiguous();
  }
  return last && !first;
}

Tensor in_format(const Tensor& tensor, bool channels_last) {
  return tensor.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

Tensor roi_align(
    at::TensorList features,
    const Tensor& boxes,
    const Tensor& image_index,
    const Tensor& level_index,
    at::ArrayRef<double> scales,
    int64_t output_size,
    int64_t sampling_ratio,
    bool aligned) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t count = boxes.size(0), batch = features[0].size(0), channels = features[0].size(1);
  const at::ScalarType type = features[0].scalar_type();
  const at::ScalarType output_type = at::isFloatingType(type) ? type : at::kFloat;
  const Tensor b = boxes.contiguous(), image = image_index.contiguous(), level = level_index.contiguous();
  std::vector<Tensor> maps;
  std::vector<int64_t> heights, widths;
  for (const Tensor& feature : features) {
    maps.push_back(feature.contiguous(at::MemoryFormat::ChannelsLast));
    heights.push_back(feature.size(2));
    widths.push_back(feature.size(3));
  }
  Tensor out = at::empty({count, output_size, output_size, channels}, features[0].options().dtype(output_type));
  AT_DISPATCH_FLOATING_TYPES_AND3(at::kHalf, at::kBFloat16, at::kByte, type, "roi_align", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    using O = std::conditional_t<std::is_same_v<scalar_t, uint8_t>, float, scalar_t>;
    constexpr int N = kVectorSize<O>;
    std::vector<const scalar_t*> pointers;
    for (const Tensor& map : maps) {
      pointers.push_back(map.const_data_ptr<scalar_t>());
    }
    const auto rois = rois_of<T>(b, image, level, output_size, sampling_ratio, aligned);
    const auto pyramid = pyramid_of<T>(pointers, scales, heights, widths, batch, channels);
    O* result = out.mutable_data_ptr<O>();
    if (are_aligned(pyramid, N)) {
      launch_by_bins<N>(forward_kernel<scalar_t, O, T, N>, rois, channels, pyramid, result);
    } else {
      launch_by_bins<1>(forward_kernel<scalar_t, O, T, 1>, rois, channels, pyramid, result);
    }
  });
  return in_format(out.permute({0, 3, 1, 2}), are_channels_last(features));
}

// Sums in the type of coordinates, by atomic additions in any order.
template <typename G, typename T>
void scatter(const Rois<T>& rois, const Pyramid<T, T>& pyramid, const G* grad) {
  constexpr int N = kVectorSize<T>;
  const int64_t channels = pyramid.channels;
  if (are_aligned(pyramid, N) && is_aligned(grad, channels, N)) {
    launch_by_bins<N>(scatter_kernel<G, T, N>, rois, channels, pyramid, grad);
  } else {
    launch_by_bins<1>(scatter_kernel<G, T, 1>, rois, channels, pyramid, grad);
  }
}

template <typename G, typename T>
void gather(const Rois<T>& rois, const Pyramid<T, G>& pyramid, const G* grad) {
  constexpr int N = kVectorSize<T>;
  const int64_t channels = pyramid.channels;
  const size_t shared_bytes = 2 * rois.bins * kTile * sizeof(T);
  TORCH_CHECK(
      shared_bytes <= 48 << 10 && pyramid.batch <= 65535,
      "roi_align_backward: the deterministic CUDA kernel takes at most 384 bins an axis and 65535 images, got ",
      rois.bins, " and ", pyramid.batch);
  int64_t tiles = 0;
  for (int i = 0; i < pyramid.count; ++i) {
    tiles += at::divup(pyramid.levels[i].width, kTile) * at::divup(pyramid.levels[i].height, kTile);
  }
  const bool vectors = are_aligned(pyramid, N) && is_aligned(grad, channels, N);
  const dim3 blocks(block_count(tiles, 1), pyramid.batch, block_count(channels, kWarp * (vectors ? N : 1)));
  const auto kernel = vectors ? gather_kernel<G, T, N> : gather_kernel<G, T, 1>;
  launch(kernel, blocks, {kWarp, kTile}, shared_bytes, rois, pyramid, grad);
}

std::vector<Tensor> roi_align_backward(
    const Tensor& grad,
    const Tensor& boxes,
    const Tensor& image_index,
    const Tensor& level_index,
    at::ArrayRef<double> scales,
    int64_t sampling_ratio,
    bool aligned,
    int64_t batch,
    at::IntArrayRef heights,
    at::IntArrayRef widths,
    bool channels_last) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const int64_t channels = grad.size(1);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const at::ScalarType type = grad.scalar_type(), sum_type = type == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor b = boxes.contiguous(), image = image_index.contiguous(), level = level_index.contiguous();
  const Tensor upstream = grad.contiguous(at::MemoryFormat::ChannelsLast);
  std::vector<Tensor> maps;
  for (size_t i = 0; i < heights.size(); ++i) {
    const std::vector<int64_t> shape{batch, heights[i], widths[i], channels};
    maps.push_back(
        deterministic ? at::empty(shape, grad.options()) : at::zeros(shape, grad.options().dtype(sum_type)));
  }
  const auto pointers = [&](auto type) {
    std::vector<decltype(type)*> result;
    for (const Tensor& map : maps) {
      result.push_back(map.mutable_data_ptr<decltype(type)>());
    }
    return result;
  };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "roi_align_backward", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto rois = rois_of<T>(b, image, level, grad.size(2), sampling_ratio, aligned);
    const scalar_t* values = upstream.const_data_ptr<scalar_t>();
    if (deterministic) {
      gather(rois, pyramid_of<T>(pointers(scalar_t()), scales, heights, widths, batch, channels), values);
    } else {
      scatter(rois, pyramid_of<T>(pointers(T()), scales, heights, widths, batch, channels), values);
    }
  });
  for (Tensor& map : maps) {
    map = in_format(map.permute({0, 3, 1, 2}).to(type), channels_last);
  }
  return maps;
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("roi_align", TORCH_FN(roi_align));
  m.impl("roi_align_backward", TORCH_FN(roi_align_backward));
}

} // namespace maskrcnn_benchmark

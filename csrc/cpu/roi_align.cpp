// RoIAlign over channels-last maps: every pixel read is a run of C contiguous values.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Channels a thread of the backward owns at least: 64 bytes of float32, so that threads share no cache line.
constexpr int64_t kChannelBlock = 16;

template <typename T>
struct Tap {
  int64_t pixel;
  T weight;
};

// The pixels that one axis of a box reads, bin by bin. A bin's value is the mean of its bilinear samples, and that is a
// weighted sum over rows x columns: samples that read the same pixel are one tap.
template <typename T>
class Axis {
 public:
  // start, side: the box on this axis in feature pixels; size: the map's side.
  void place(T start, T side, int64_t size, int64_t bins, int64_t sampling_ratio) {
    taps_.clear();
    ends_.assign(1, 0);
    const T bin_side = side / bins;
    const T samples = sampling_ratio > 0 ? T(sampling_ratio) : adaptive_samples(bin_side, size);
    for (int64_t bin = 0; bin < bins; ++bin) {
      for (int64_t sample = 0; sample < samples; ++sample) {
        const T position = start + bin * bin_side + (sample + T(0.5)) * bin_side / samples;
        if (position >= -1 && position <= size) { // false for NaN
          add_sample(position, size, 1 / samples);
        }
      }
      ends_.push_back(taps_.size());
    }
  }

  const Tap<T>* begin(int64_t bin) const {
    return taps_.data() + ends_[bin];
  }

  const Tap<T>* end(int64_t bin) const {
    return taps_.data() + ends_[bin + 1];
  }

 private:
  static T adaptive_samples(T bin_side, int64_t size) {
    const T samples = std::ceil(bin_side);
    return samples > 0 ? std::min(samples, T(size + 2)) : T(0); // 0 for NaN
  }

  void add_sample(T position, int64_t size, T share) {
    position = std::min(std::max(position, T(0)), T(size - 1));
    const int64_t low = static_cast<int64_t>(position);
    const T above = position - low;
    add_tap(low, (1 - above) * share);
    add_tap(std::min(low + 1, size - 1), above * share);
  }

  // Samples ascend, so only the last two taps of a bin can be the same pixel.
  void add_tap(int64_t pixel, T weight) {
    const size_t first = ends_.back();
    for (size_t i = taps_.size(); i > first && i + 2 > taps_.size(); --i) {
      if (taps_[i - 1].pixel == pixel) {
        taps_[i - 1].weight += weight;
        return;
      }
    }
    taps_.push_back({pixel, weight});
  }

  std::vector<Tap<T>> taps_;
  std::vector<size_t> ends_;
};

template <typename T>
struct Rois {
  const T* boxes;
  const int64_t* image_index;
  const int64_t* level_index;
  at::ArrayRef<double> scales;
  std::vector<int64_t> heights, widths;
  int64_t batch, bins, sampling_ratio;
  bool aligned;

  bool exists(int64_t roi) const {
    const int64_t image = image_index[roi], level = level_index[roi];
    return image >= 0 && image < batch && level >= 0 && level < static_cast<int64_t>(scales.size());
  }

  void place(int64_t roi, Axis<T>& y, Axis<T>& x) const {
    const int64_t level = level_index[roi];
    place_axis(boxes[4 * roi], boxes[4 * roi + 2], level, widths[level], x);
    place_axis(boxes[4 * roi + 1], boxes[4 * roi + 3], level, heights[level], y);
  }

  // The first value of the roi's image in its level.
  template <typename P>
  P* image(const std::vector<P*>& maps, int64_t roi, int64_t channels) const {
    const int64_t level = level_index[roi];
    return maps[level] + image_index[roi] * heights[level] * widths[level] * channels;
  }

 private:
  void place_axis(T low, T high, int64_t level, int64_t size, Axis<T>& axis) const {
    const T scale = scales[level], offset = aligned ? T(0.5) : T(0);
    const T start = low * scale - offset;
    T side = (high * scale - offset) - start;
    if (!aligned && side < 1) {
      side = 1;
    }
    axis.place(start, side, size, bins, sampling_ratio);
  }
};

template <typename F, typename T>
MULTIVERSION void add_weighted(T* __restrict__ sum, const F* __restrict__ values, T weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    sum[i] += weight * static_cast<T>(values[i]);
  }
}

template <typename F, typename O, typename T>
void forward(const Rois<T>& rois, const std::vector<const F*>& maps, int64_t count, int64_t channels, O* out) {
  const int64_t bins = rois.bins;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Axis<T> y, x;
    std::vector<T> sum(channels);
    for (int64_t roi = begin; roi < end; ++roi) {
      O* bin = out + roi * bins * bins * channels;
      if (!rois.exists(roi)) {
        std::fill_n(bin, bins * bins * channels, O(0));
        continue;
      }
      rois.place(roi, y, x);
      const F* map = rois.image(maps, roi, channels);
      const int64_t width = rois.widths[rois.level_index[roi]];
      for (int64_t row = 0; row < bins; ++row) {
        for (int64_t column = 0; column < bins; ++column, bin += channels) {
          std::fill(sum.begin(), sum.end(), T(0));
          for (const Tap<T>* v = y.begin(row); v != y.end(row); ++v) {
            for (const Tap<T>* u = x.begin(column); u != x.end(column); ++u) {
              const F* pixel = map + (v->pixel * width + u->pixel) * channels;
              add_weighted(sum.data(), pixel, v->weight * u->weight, channels);
            }
          }
          std::copy(sum.begin(), sum.end(), bin);
        }
      }
    }
  });
}

// Threads own channels, so no two ever add to the same place and the sums do not depend on their number.
template <typename T>
void backward(const Rois<T>& rois, const std::vector<T*>& maps, int64_t count, int64_t channels, const T* grad) {
  const int64_t bins = rois.bins;
  at::parallel_for(0, at::divup(channels, kChannelBlock), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChannelBlock, length = std::min(end * kChannelBlock, channels) - first;
    Axis<T> y, x;
    for (int64_t roi = 0; roi < count; ++roi) {
      if (!rois.exists(roi)) {
        continue;
      }
      rois.place(roi, y, x);
      T* map = rois.image(maps, roi, channels) + first;
      const int64_t width = rois.widths[rois.level_index[roi]];
      const T* bin = grad + roi * bins * bins * channels + first;
      for (int64_t row = 0; row < bins; ++row) {
        for (int64_t column = 0; column < bins; ++column, bin += channels) {
          for (const Tap<T>* v = y.begin(row); v != y.end(row); ++v) {
            for (const Tap<T>* u = x.begin(column); u != x.end(column); ++u) {
              add_weighted(map + (v->pixel * width + u->pixel) * channels, bin, v->weight * u->weight, length);
            }
          }
        }
      }
    }
  });
}

// Coordinates, weights and sums: float64 for float64 features, float32 for all others.
at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
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
    std::vector<const scalar_t*> pointers;
    for (const Tensor& map : maps) {
      pointers.push_back(map.const_data_ptr<scalar_t>());
    }
    const Rois<T> rois{
        b.const_data_ptr<T>(), image.const_data_ptr<int64_t>(), level.const_data_ptr<int64_t>(), scales,
        heights, widths, batch, output_size, sampling_ratio, aligned};
    forward<scalar_t, O, T>(rois, pointers, count, channels, out.mutable_data_ptr<O>());
  });
  return in_format(out.permute({0, 3, 1, 2}), are_channels_last(features));
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
  const int64_t count = boxes.size(0), channels = grad.size(1);
  const at::ScalarType type = compute_type(grad.scalar_type());
  const Tensor b = boxes.contiguous(), image = image_index.contiguous(), level = level_index.contiguous();
  const Tensor upstream = grad.to(type).contiguous(at::MemoryFormat::ChannelsLast);
  std::vector<Tensor> maps;
  for (size_t i = 0; i < heights.size(); ++i) {
    maps.push_back(at::zeros({batch, heights[i], widths[i], channels}, upstream.options()));
  }
  AT_DISPATCH_FLOATING_TYPES(type, "roi_align_backward", [&] {
    std::vector<scalar_t*> pointers;
    for (const Tensor& map : maps) {
      pointers.push_back(map.mutable_data_ptr<scalar_t>());
    }
    const Rois<scalar_t> rois{
        b.const_data_ptr<scalar_t>(), image.const_data_ptr<int64_t>(), level.const_data_ptr<int64_t>(), scales,
        heights.vec(), widths.vec(), batch, grad.size(2), sampling_ratio, aligned};
    backward<scalar_t>(rois, pointers, count, channels, upstream.const_data_ptr<scalar_t>());
  });
  for (Tensor& map : maps) {
    map = in_format(map.permute({0, 3, 1, 2}).to(grad.scalar_type()), channels_last);
  }
  return maps;
}

} // namespace

TORCH_LIBRARY_IMPL(maskrcnn_benchmark, CPU, m) {
  m.impl("roi_align", TORCH_FN(roi_align));
  m.impl("roi_align_backward", TORCH_FN(roi_align_backward));
}

} // namespace maskrcnn_benchmark

// RoIAlign. A bin is a weighted sum over rows x columns of pixels, its gradient the transposed sum. Channels-last maps
// are read and written in runs of channels, contiguous ones in runs of columns; neither is converted to the other.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Values of a channels-last map whose gradient is summed at a time: 512 kB of float32, within a second-level cache.
constexpr int64_t kStripSize = 128 * 1024;
// Values that are summed at a time: 64 bytes of float32.
constexpr int64_t kBlock = 16;

template <typename T>
struct Tap {
  int64_t place;
  T weight;
};

// Lists of taps, one after the other.
template <typename T>
class TapLists {
 public:
  void clear() {
    taps_.clear();
    ends_.assign(1, 0);
  }

  // To the list that is not ended yet. Samples ascend, so only its last two taps can be of the same place.
  void add(int64_t place, T weight) {
    for (size_t i = taps_.size(); i > ends_.back() && i + 2 > taps_.size(); --i) {
      if (taps_[i - 1].place == place) {
        taps_[i - 1].weight += weight;
        return;
      }
    }
    taps_.push_back({place, weight});
  }

  void end_list() {
    ends_.push_back(taps_.size());
  }

  c10::ArrayRef<Tap<T>> operator[](size_t list) const {
    return {taps_.data() + ends_[list], taps_.data() + ends_[list + 1]};
  }

  template <typename NewPlace>
  void move(const NewPlace& new_place) {
    for (Tap<T>& tap : taps_) {
      tap.place = new_place(tap.place);
    }
  }

  // A list for each of `places`: the lists that hold it, `stride` apart.
  TapLists transposed(size_t places, int64_t stride) const {
    TapLists result;
    result.ends_.assign(places + 1, 0);
    for (const Tap<T>& tap : taps_) {
      ++result.ends_[tap.place + 1];
    }
    std::partial_sum(result.ends_.begin(), result.ends_.end(), result.ends_.begin());
    result.taps_.resize(taps_.size());
    std::vector<size_t> next = result.ends_;
    for (size_t list = 0; list + 1 < ends_.size(); ++list) {
      for (const Tap<T>& tap : (*this)[list]) {
        result.taps_[next[tap.place]++] = {static_cast<int64_t>(list) * stride, tap.weight};
      }
    }
    return result;
  }

 private:
  std::vector<Tap<T>> taps_;
  std::vector<size_t> ends_;
};

// The pixels that one axis of a box reads, and which of them each bin reads with what weight: the mean over its
// samples.
template <typename T>
struct Axis {
  std::vector<int64_t> pixels; // in the order of the samples; each once, unless the box has a negative side
  TapLists<T> bins; // of places in pixels

  // start, side: the box on this axis in feature pixels; size: the map's side.
  void place(T start, T side, int64_t size, int64_t bin_count, int64_t sampling_ratio) {
    pixels.clear();
    bins.clear();
    const T bin_side = side / bin_count;
    const T samples = sampling_ratio > 0 ? T(sampling_ratio) : adaptive_samples(bin_side, size);
    for (int64_t bin = 0; bin < bin_count; ++bin) {
      for (int64_t sample = 0; sample < samples; ++sample) {
        const T position = start + bin * bin_side + (sample + T(0.5)) * bin_side / samples;
        if (position >= -1 && position <= size) { // false for NaN
          add_sample(position, size, 1 / samples);
        }
      }
      bins.end_list();
    }
  }

  // By bin: the pixels it reads, `stride` values apart.
  TapLists<T> reads(int64_t stride) const {
    TapLists<T> result = bins;
    result.move([&](int64_t place) { return pixels[place] * stride; });
    return result;
  }

  // By place in pixels: the bins that read it, `stride` values apart.
  TapLists<T> readers(int64_t stride) const {
    return bins.transposed(pixels.size(), stride);
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
    bins.add(place_of(low), (1 - above) * share);
    bins.add(place_of(std::min(low + 1, size - 1)), above * share);
  }

  int64_t place_of(int64_t pixel) {
    const int64_t count = pixels.size();
    for (int64_t place = count - 1; place >= 0 && place >= count - 2; --place) {
      if (pixels[place] == pixel) {
        return place;
      }
    }
    pixels.push_back(pixel);
    return count;
  }
};

template <typename T>
struct Rois {
  const T* boxes;
  const int64_t* image_index;
  const int64_t* level_index;
  at::ArrayRef<double> scales;
  std::vector<int64_t> heights, widths;
  int64_t count, batch, bins, sampling_ratio;
  bool aligned;

  int64_t levels() const {
    return scales.size();
  }

  bool exists(int64_t roi) const {
    const int64_t image = image_index[roi], level = level_index[roi];
    return image >= 0 && image < batch && level >= 0 && level < levels();
  }

  void place(int64_t roi, Axis<T>& y, Axis<T>& x) const {
    const int64_t level = level_index[roi];
    place_axis(boxes[4 * roi], boxes[4 * roi + 2], level, widths[level], x);
    place_axis(boxes[4 * roi + 1], boxes[4 * roi + 3], level, heights[level], y);
  }

  // Where the map of the box's image begins in its level.
  int64_t image_offset(int64_t roi, int64_t channels) const {
    const int64_t level = level_index[roi];
    return image_index[roi] * heights[level] * widths[level] * channels;
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

// out[i] (+)= the sum over taps of weight * values[place + i], for N places i; the sums stay in registers.
template <int N, bool add, typename F, typename O, typename T>
[[gnu::always_inline]] inline void sum_block(c10::ArrayRef<Tap<T>> taps, const F* values, O* out) {
  T sum[N] = {};
  for (const Tap<T>& tap : taps) {
    const F* source = values + tap.place;
    for (int i = 0; i < N; ++i) {
      sum[i] += tap.weight * static_cast<T>(source[i]);
    }
  }
  for (int i = 0; i < N; ++i) {
    out[i] = static_cast<O>(add ? out[i] + sum[i] : sum[i]);
  }
}

template <bool add, typename F, typename O, typename T>
[[gnu::always_inline]] inline void sum_run(c10::ArrayRef<Tap<T>> taps, const F* values, int64_t count, O* out) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    sum_block<64, add>(taps, values + i, out + i);
  }
  for (; i + kBlock <= count; i += kBlock) {
    sum_block<kBlock, add>(taps, values + i, out + i);
  }
  for (; i < count; ++i) {
    sum_block<1, add>(taps, values + i, out + i);
  }
}

// The run of `count` values at each of rows x columns, weighted and summed.
template <bool add, typename F, typename O, typename T>
MULTIVERSION void sum_runs(c10::ArrayRef<Tap<T>> rows, c10::ArrayRef<Tap<T>> columns, const F* values, int64_t count,
                           std::vector<Tap<T>>& taps, O* out) {
  taps.clear();
  for (const Tap<T>& row : rows) {
    for (const Tap<T>& column : columns) {
      taps.push_back({row.place + column.place, row.weight * column.weight});
    }
  }
  sum_run<add>(c10::ArrayRef<Tap<T>>(taps), values, count, out);
}

template <typename F, typename O, typename T>
void forward_channels_last(const Rois<T>& rois, const std::vector<const F*>& maps, int64_t channels, O* out) {
  const int64_t bins = rois.bins;
  at::parallel_for(0, rois.count, 1, [&](int64_t begin, int64_t end) {
    Axis<T> y, x;
    std::vector<Tap<T>> taps;
    for (int64_t roi = begin; roi < end; ++roi) {
      O* bin = out + roi * bins * bins * channels;
      if (!rois.exists(roi)) {
        std::fill_n(bin, bins * bins * channels, O(0));
        continue;
      }
      rois.place(roi, y, x);
      const int64_t level = rois.level_index[roi];
      const F* map = maps[level] + rois.image_offset(roi, channels);
      const TapLists<T> rows = y.reads(rois.widths[level] * channels), columns = x.reads(channels);
      for (int64_t row = 0; row < bins; ++row) {
        for (int64_t column = 0; column < bins; ++column, bin += channels) {
          sum_runs<false>(rows[row], columns[column], map, channels, taps, bin);
        }
      }
    }
  });
}

// The columns [first, first + length) of a contiguous map that a box reads, in whole blocks where the map is wide
// enough.
struct Span {
  int64_t first = 0, length = 0;

  Span(const std::vector<int64_t>& pixels, int64_t width) {
    if (!pixels.empty()) {
      const auto [low, high] = std::minmax_element(pixels.begin(), pixels.end());
      length = at::divup(*high - *low + 1, kBlock) * kBlock;
      first = std::min(*low, width - length);
      if (first < 0) {
        first = *low;
        length = *high - *low + 1;
      }
    }
  }
};

// A box made ready for many channels or many pieces of a map.
template <typename T>
struct Plan {
  int64_t roi;
  std::vector<int64_t> y, x; // the pixels it reads
  TapLists<T> rows, columns;
  Span span;
  std::vector<T> matrix; // the columns once more, as a dense matrix
};

// The boxes of each level and image, in their order; `finish` makes what is left of a plan of (y, x, map width).
template <typename T, typename Finish>
std::vector<std::vector<Plan<T>>> plan_maps(const Rois<T>& rois, const Finish& finish) {
  std::vector<std::vector<Plan<T>>> maps(rois.levels() * rois.batch);
  Axis<T> y, x;
  for (int64_t roi = 0; roi < rois.count; ++roi) {
    if (rois.exists(roi)) {
      const int64_t level = rois.level_index[roi], width = rois.widths[level];
      rois.place(roi, y, x);
      Plan<T> plan{roi, y.pixels, x.pixels, {}, {}, Span(x.pixels, width), {}};
      finish(plan, y, x, width);
      maps[level * rois.batch + rois.image_index[roi]].push_back(std::move(plan));
    }
  }
  return maps;
}

// Calls body(channel, level, image, map number) for every plane of the pyramid. Threads own channels.
template <typename T, typename Body>
void for_each_plane(const Rois<T>& rois, int64_t channels, const Body& body) {
  const int64_t maps = rois.levels() * rois.batch;
  at::parallel_for(0, channels * maps, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t task = begin; task < end; ++task) {
      body(task / maps, task % maps / rois.batch, task % rois.batch, task % maps, scratch);
    }
  });
}

// The values of a box in one channel, asked for while another box is at work: they are far from each other.
template <int write, typename F>
void prefetch(const F* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(F)) {
    __builtin_prefetch(values + i, write);
  }
}

// One box in one channel: its rows are summed into `sums` [span length] first, then the columns of that, all bins of a
// row at once: `matrix` is [pixels of x, bins rounded up to blocks].
template <typename F, typename O, typename T>
MULTIVERSION void pool_plane(const Plan<T>& box, const F* plane, int64_t bins, std::vector<T>& sums, O* out) {
  const int64_t padded = at::divup(bins, kBlock) * kBlock;
  sums.resize(box.span.length);
  for (int64_t row = 0; row < bins; ++row, out += bins) {
    sum_run<false>(box.rows[row], plane + box.span.first, box.span.length, sums.data());
    for (int64_t first = 0; first < bins; first += kBlock) {
      T total[kBlock] = {};
      for (size_t column = 0; column < box.x.size(); ++column) {
        const T value = sums[box.x[column] - box.span.first];
        for (int64_t i = 0; i < kBlock; ++i) {
          total[i] += value * box.matrix[column * padded + first + i];
        }
      }
      for (int64_t i = 0; i < std::min(kBlock, bins - first); ++i) {
        out[first + i] = static_cast<O>(total[i]);
      }
    }
  }
}

template <typename F, typename O, typename T>
void forward_contiguous(const Rois<T>& rois, const std::vector<const F*>& maps, int64_t channels, O* out) {
  const int64_t size = rois.bins * rois.bins, padded = at::divup(rois.bins, kBlock) * kBlock;
  const auto plans = plan_maps(rois, [&](Plan<T>& plan, const Axis<T>& y, const Axis<T>& x, int64_t width) {
    plan.rows = y.reads(width);
    plan.matrix.assign(x.pixels.size() * padded, T(0));
    for (int64_t bin = 0; bin < rois.bins; ++bin) {
      for (const Tap<T>& tap : x.bins[bin]) {
        plan.matrix[tap.place * padded + bin] = tap.weight;
      }
    }
  });
  for (int64_t roi = 0; roi < rois.count; ++roi) {
    if (!rois.exists(roi)) {
      std::fill_n(out + roi * channels * size, channels * size, O(0));
    }
  }
  for_each_plane(rois, channels, [&](int64_t channel, int64_t level, int64_t image, int64_t map, std::vector<T>& sums) {
    const F* plane = maps[level] + (image * channels + channel) * rois.heights[level] * rois.widths[level];
    const auto& boxes = plans[map];
    for (size_t i = 0; i < boxes.size(); ++i) {
      const Plan<T>& later = boxes[std::min(i + 2, boxes.size() - 1)];
      for (const int64_t row : later.y) {
        prefetch<0>(plane + row * rois.widths[level] + later.span.first, later.span.length);
      }
      pool_plane(boxes[i], plane, rois.bins, sums, out + (boxes[i].roi * channels + channel) * size);
    }
  });
}

template <typename O, typename T>
MULTIVERSION void cast_run(const T* values, int64_t count, O* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<O>(values[i]);
  }
}

// Threads own rows of pixels, a strip at a time, so no two ever add to the same place; boxes are added in their order.
// The sums of low precision are kept in T for a strip, not for a whole map.
template <typename F, typename T>
void backward_channels_last(const Rois<T>& rois, const std::vector<F*>& maps, int64_t channels, const F* grad) {
  constexpr bool direct = std::is_same_v<F, T>;
  const auto plans = plan_maps(rois, [&](Plan<T>& plan, const Axis<T>& y, const Axis<T>& x, int64_t) {
    plan.rows = y.readers(rois.bins * channels);
    plan.columns = x.readers(channels);
  });
  struct Strip {
    int64_t map, first, last; // rows
  };
  std::vector<Strip> strips;
  for (int64_t map = 0; map < static_cast<int64_t>(plans.size()); ++map) {
    const int64_t height = rois.heights[map / rois.batch], row_size = rois.widths[map / rois.batch] * channels;
    const int64_t rows = std::max<int64_t>(1, kStripSize / std::max<int64_t>(1, row_size));
    for (int64_t first = 0; first < height; first += rows) {
      strips.push_back({map, first, std::min(first + rows, height)});
    }
  }
  // Strip i belongs to thread i modulo their number: neighbours are alike in work, blocks of strips are not.
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tap<T>> taps;
    std::vector<T> scratch;
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = thread; i < static_cast<int64_t>(strips.size()); i += threads) {
        const Strip& strip = strips[i];
        const int64_t level = strip.map / rois.batch, width = rois.widths[level];
        const int64_t row_size = width * channels, size = (strip.last - strip.first) * row_size;
        F* out = maps[level] + (strip.map % rois.batch * rois.heights[level] + strip.first) * row_size;
        T* sums;
        if constexpr (direct) {
          std::fill_n(out, size, T(0));
          sums = out;
        } else {
          scratch.assign(size, T(0));
          sums = scratch.data();
        }
        for (const Plan<T>& box : plans[strip.map]) {
          const F* bins = grad + box.roi * rois.bins * rois.bins * channels;
          for (size_t row = 0; row < box.y.size(); ++row) {
            if (box.y[row] >= strip.first && box.y[row] < strip.last) {
              T* pixels = sums + (box.y[row] - strip.first) * row_size;
              for (size_t column = 0; column < box.x.size(); ++column) {
                T* pixel = pixels + box.x[column] * channels;
                sum_runs<true>(box.rows[row], box.columns[column], bins, channels, taps, pixel);
              }
            }
          }
        }
        if constexpr (!direct) {
          cast_run(sums, size, out);
        }
      }
    }
  });
}

// One box in one channel: each row of bins is spread over the columns into `sums` [bins, span length] first, by
// `matrix` [bins, span length], then that over the rows.
template <typename F, typename T>
MULTIVERSION void spread_plane(const Plan<T>& box, const F* grad, int64_t bins, int64_t width,
                               std::vector<Tap<T>>& taps, std::vector<T>& sums, T* plane) {
  const int64_t length = box.span.length;
  taps.resize(bins);
  sums.resize(bins * length);
  for (int64_t row = 0; row < bins; ++row, grad += bins) {
    for (int64_t bin = 0; bin < bins; ++bin) {
      taps[bin] = {bin * length, static_cast<T>(grad[bin])};
    }
    sum_run<false>(c10::ArrayRef<Tap<T>>(taps), box.matrix.data(), length, sums.data() + row * length);
  }
  for (size_t row = 0; row < box.y.size(); ++row) {
    sum_run<true>(box.rows[row], sums.data(), length, plane + box.y[row] * width + box.span.first);
  }
}

template <typename F, typename T>
void backward_contiguous(const Rois<T>& rois, const std::vector<F*>& maps, int64_t channels, const F* grad) {
  constexpr bool direct = std::is_same_v<F, T>;
  const int64_t size = rois.bins * rois.bins;
  const auto plans = plan_maps(rois, [&](Plan<T>& plan, const Axis<T>& y, const Axis<T>& x, int64_t) {
    plan.rows = y.readers(plan.span.length);
    plan.matrix.assign(rois.bins * plan.span.length, T(0));
    for (int64_t bin = 0; bin < rois.bins; ++bin) {
      for (const Tap<T>& tap : x.bins[bin]) {
        plan.matrix[bin * plan.span.length + x.pixels[tap.place] - plan.span.first] += tap.weight;
      }
    }
  });
  for_each_plane(rois, channels, [&](int64_t channel, int64_t level, int64_t image, int64_t map, std::vector<T>& sums) {
    const int64_t pixels = rois.heights[level] * rois.widths[level];
    F* out = maps[level] + (image * channels + channel) * pixels;
    std::vector<Tap<T>> taps;
    std::vector<T> scratch;
    T* plane;
    if constexpr (direct) {
      std::fill_n(out, pixels, T(0));
      plane = out;
    } else {
      scratch.assign(pixels, T(0));
      plane = scratch.data();
    }
    const auto& boxes = plans[map];
    for (size_t i = 0; i < boxes.size(); ++i) {
      prefetch<0>(grad + (boxes[std::min(i + 2, boxes.size() - 1)].roi * channels + channel) * size, size);
      const F* bins = grad + (boxes[i].roi * channels + channel) * size;
      spread_plane(boxes[i], bins, rois.bins, rois.widths[level], taps, sums, plane);
    }
    if constexpr (!direct) {
      cast_run(plane, pixels, out);
    }
  });
}

bool are_channels_last(at::TensorList features) {
  bool last = true, first = true;
  for (const Tensor& feature : features) {
    last = last && feature.is_contiguous(at::MemoryFormat::ChannelsLast);
    first = first && feature.is_contiguous();
  }
  return last && !first;
}

at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
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
  const bool channels_last = are_channels_last(features);
  std::vector<Tensor> maps;
  std::vector<int64_t> heights, widths;
  for (const Tensor& feature : features) {
    maps.push_back(feature.contiguous(memory_format(channels_last)));
    heights.push_back(feature.size(2));
    widths.push_back(feature.size(3));
  }
  const std::vector<int64_t> shape{count, channels, output_size, output_size};
  Tensor out = at::empty(shape, features[0].options().dtype(output_type), memory_format(channels_last));
  AT_DISPATCH_FLOATING_TYPES_AND3(at::kHalf, at::kBFloat16, at::kByte, type, "roi_align", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    using O = std::conditional_t<std::is_same_v<scalar_t, uint8_t>, float, scalar_t>;
    std::vector<const scalar_t*> pointers;
    for (const Tensor& map : maps) {
      pointers.push_back(map.const_data_ptr<scalar_t>());
    }
    const Rois<T> rois{
        b.const_data_ptr<T>(), image.const_data_ptr<int64_t>(), level.const_data_ptr<int64_t>(), scales,
        heights, widths, count, batch, output_size, sampling_ratio, aligned};
    const auto& forward = channels_last ? forward_channels_last<scalar_t, O, T> : forward_contiguous<scalar_t, O, T>;
    forward(rois, pointers, channels, out.mutable_data_ptr<O>());
  });
  return out;
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
  const Tensor b = boxes.contiguous(), image = image_index.contiguous(), level = level_index.contiguous();
  const Tensor upstream = grad.contiguous(memory_format(channels_last));
  std::vector<Tensor> maps;
  for (size_t i = 0; i < heights.size(); ++i) {
    const std::vector<int64_t> shape{batch, channels, heights[i], widths[i]};
    maps.push_back(with_huge_pages(at::empty(shape, upstream.options(), memory_format(channels_last))));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "roi_align_backward", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    std::vector<scalar_t*> pointers;
    for (const Tensor& map : maps) {
      pointers.push_back(map.mutable_data_ptr<scalar_t>());
    }
    const Rois<T> rois{
        b.const_data_ptr<T>(), image.const_data_ptr<int64_t>(), level.const_data_ptr<int64_t>(), scales,
        heights.vec(), widths.vec(), count, batch, grad.size(2), sampling_ratio, aligned};
    const auto& backward = channels_last ? backward_channels_last<scalar_t, T> : backward_contiguous<scalar_t, T>;
    backward(rois, pointers, channels, upstream.const_data_ptr<scalar_t>());
  });
  return maps;
}

} // namespace

KERNELS(CPU, m) {
  m.impl("roi_align", TORCH_FN(roi_align));
  m.impl("roi_align_backward", TORCH_FN(roi_align_backward));
}

} // namespace maskrcnn_benchmark

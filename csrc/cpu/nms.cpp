// Greedy NMS: boxes of one group of one image at a time, by falling score, each against the boxes kept so far.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Kept boxes compared at a time.
constexpr int64_t kBlock = 16;
// Boxes of a group for each cell of its grid, and cells at most.
constexpr int64_t kBoxesPerCell = 16, kMostCells = 256;
constexpr int kDigitBits = 11;

// Sorts `order`, which numbers keys, by rising key; stable. Digit by digit from the lowest: three passes over a float's
// 32 bits are several times faster than comparing. Digits in which all keys agree are skipped.
void radix_sort(const std::vector<uint64_t>& keys, std::vector<int64_t>& order) {
  uint64_t differing = 0;
  for (const uint64_t key : keys) {
    differing |= key ^ keys[0];
  }
  constexpr uint64_t digits = 1 << kDigitBits;
  std::vector<int64_t> sorted(order.size());
  for (int shift = 0; shift < 64; shift += kDigitBits) {
    if ((differing >> shift & (digits - 1)) == 0) {
      continue;
    }
    std::vector<int64_t> ends(digits + 1, 0);
    for (const int64_t place : order) {
      ++ends[(keys[place] >> shift & (digits - 1)) + 1];
    }
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    for (const int64_t place : order) {
      sorted[ends[keys[place] >> shift & (digits - 1)]++] = place;
    }
    order.swap(sorted);
  }
}

// Rises where the score falls; equal scores, the two zeros among them, have equal keys.
template <typename T>
uint64_t falling_key(T score) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  const Bits bits = std::bit_cast<Bits>(score + T(0));
  return bits & sign ? bits : static_cast<Bits>(~(bits | sign));
}

// Boxes in cells, one after the other in `array`: those of cell i at [begins[i], ends[i]), the rest of its places are
// NaN.
template <typename T>
struct Cells {
  BoxArray<T> array;
  std::vector<int64_t> begins, ends;
};

// Whether any box in the cells [first, last] overlaps the box by more than the threshold.
template <typename T>
MULTIVERSION bool any_overlaps(const Cells<T>& cells, int64_t first, int64_t last, const Box<T>& box, T threshold) {
  const T* x1 = cells.array.x1.data();
  const T* y1 = cells.array.y1.data();
  const T* x2 = cells.array.x2.data();
  const T* y2 = cells.array.y2.data();
  const T* area = cells.array.area.data();
  const T box_area = box.area();
  int hits[kBlock] = {};
  for (int64_t cell = first; cell <= last; ++cell) {
    for (int64_t block = cells.begins[cell]; block < cells.ends[cell]; block += kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t place = block + i;
        const T shared = intersection(Box<T>{x1[place], y1[place], x2[place], y2[place]}, box);
        hits[i] |= shared > threshold * (area[place] + box_area - shared);
      }
    }
  }
  return std::accumulate(hits, hits + kBlock, 0) != 0;
}

// Boxes kept of one group, in cells by their left side. Boxes that overlap by more than the threshold have left sides
// near each other, in proportion to their widths, so a box looks into a few cells instead of all.
template <typename T>
class KeptBoxes {
 public:
  KeptBoxes(const Box<T>* boxes, c10::ArrayRef<int64_t> rows, T threshold)
      : count_(std::clamp<int64_t>(rows.size() / kBoxesPerCell, 1, kMostCells)),
        threshold_(threshold),
        // The overlap's width exceeds threshold x either width. Rounding is far below the margin.
        share_(std::max(threshold * T(1 - 1e-4), T(0))) {
    T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::lowest();
    for (const int64_t row : rows) {
      low = smaller(low, boxes[row].x1);
      high = larger(high, boxes[row].x1);
    }
    left_ = low;
    cells_per_pixel_ = count_ / larger(high - low, T(1e-3));
    std::vector<int64_t> begins(count_ + 1, 0);
    for (const int64_t row : rows) {
      ++begins[cell(boxes[row].x1) + 1];
    }
    for (int64_t i = 0; i < count_; ++i) {
      begins[i + 1] = begins[i] + at::divup(begins[i + 1], kBlock) * kBlock;
    }
    cells_ = {BoxArray<T>(begins.back()), begins, begins};
  }

  bool suppress(const Box<T>& box) const {
    const T width = at_least_zero(box.x2 - box.x1), margin = T(1e-4) * (width + std::abs(box.x1));
    const bool bounded = share_ > 0;
    const int64_t first = bounded ? cell(box.x1 - width * (1 - share_) / share_ - margin) : 0;
    const int64_t last = bounded ? cell(box.x2 - width * share_ + margin) : count_ - 1;
    return any_overlaps(cells_, first, last, box, threshold_);
  }

  void add(const Box<T>& box) {
    cells_.array.set(cells_.ends[cell(box.x1)]++, box);
  }

 private:
  // Rises with x; any number has one, an infinite one too.
  int64_t cell(T x) const {
    const T place = (x - left_) * cells_per_pixel_;
    return place > 0 ? (place < count_ ? static_cast<int64_t>(place) : count_ - 1) : 0;
  }

  int64_t count_;
  T threshold_, share_, left_, cells_per_pixel_;
  Cells<T> cells_{BoxArray<T>(0), {}, {}};
};

template <typename T>
struct Image {
  const Box<T>* boxes;
  const T* scores;
  const int64_t* groups;
  const bool* valid;
  int64_t size;
  std::vector<int64_t> rows; // usable ones, by falling score
  std::vector<int64_t> ranks; // places in rows, by group, within a group rising
  std::vector<char> kept; // by rank

  void sort() {
    std::vector<uint64_t> keys(size);
    for (int64_t row = 0; row < size; ++row) {
      const Box<T>& box = boxes[row];
      if (valid[row] && !std::isnan(scores[row]) && !std::isnan(box.x1) && !std::isnan(box.y1) &&
          !std::isnan(box.x2) && !std::isnan(box.y2)) {
        rows.push_back(row);
        keys[row] = falling_key(scores[row]);
      }
    }
    radix_sort(keys, rows);
    keys.resize(rows.size());
    for (size_t rank = 0; rank < rows.size(); ++rank) {
      keys[rank] = groups[rows[rank]];
    }
    ranks.resize(rows.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    radix_sort(keys, ranks);
    kept.assign(rows.size(), 0);
  }

  // Marks what is kept of ranks[begin:end], which is one group.
  void suppress(int64_t begin, int64_t end, T threshold, int64_t max_output) {
    std::vector<int64_t> members(end - begin);
    for (int64_t i = begin; i < end; ++i) {
      members[i - begin] = rows[ranks[i]];
    }
    KeptBoxes<T> boxes_kept(boxes, members, threshold);
    int64_t count = 0;
    for (int64_t i = begin; i < end && count < max_output; ++i) {
      const Box<T>& box = boxes[rows[ranks[i]]];
      if (!boxes_kept.suppress(box)) {
        boxes_kept.add(box);
        kept[ranks[i]] = 1;
        ++count;
      }
    }
  }
};

struct Segment {
  int64_t image, begin, end;
};

template <typename T>
void nms_images(std::vector<Image<T>>& images, T threshold, int64_t max_output, int64_t* index, bool* keep) {
  at::parallel_for(0, images.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      images[i].sort();
    }
  });

  std::vector<Segment> segments;
  for (int64_t i = 0; i < static_cast<int64_t>(images.size()); ++i) {
    const Image<T>& image = images[i];
    const auto group = [&](int64_t place) { return image.groups[image.rows[image.ranks[place]]]; };
    const int64_t count = image.ranks.size();
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      while (end < count && group(end) == group(begin)) {
        ++end;
      }
      segments.push_back({i, begin, end});
    }
  }
  at::parallel_for(0, segments.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      images[segments[i].image].suppress(segments[i].begin, segments[i].end, threshold, max_output);
    }
  });

  for (int64_t i = 0; i < static_cast<int64_t>(images.size()); ++i) {
    const Image<T>& image = images[i];
    int64_t count = 0;
    for (size_t rank = 0; rank < image.rows.size() && count < max_output; ++rank) {
      if (image.kept[rank]) {
        index[i * max_output + count] = image.rows[rank];
        keep[i * max_output + count] = true;
        ++count;
      }
    }
  }
}

std::tuple<Tensor, Tensor> nms(
    const Tensor& boxes,
    const Tensor& scores,
    const Tensor& groups,
    const Tensor& valid,
    double iou_threshold,
    int64_t max_output) {
  TORCH_CHECK(boxes.scalar_type() == scores.scalar_type(), "nms: boxes and scores differ in dtype");
  const Tensor b = boxes.contiguous(), s = scores.contiguous(), g = groups.contiguous(), v = valid.contiguous();
  const int64_t batch = b.size(0), size = b.size(1);
  Tensor index = at::zeros({batch, max_output}, g.options().dtype(at::kLong));
  Tensor keep = at::zeros({batch, max_output}, g.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "nms", [&] {
    std::vector<Image<scalar_t>> images;
    for (int64_t i = 0; i < batch; ++i) {
      images.push_back(
          {reinterpret_cast<const Box<scalar_t>*>(b.const_data_ptr<scalar_t>()) + i * size,
           s.const_data_ptr<scalar_t>() + i * size,
           g.const_data_ptr<int64_t>() + i * size,
           v.const_data_ptr<bool>() + i * size,
           size,
           {},
           {},
           {}});
    }
    nms_images<scalar_t>(
        images,
        static_cast<scalar_t>(iou_threshold),
        max_output,
        index.mutable_data_ptr<int64_t>(),
        keep.mutable_data_ptr<bool>());
  });
  return {index, keep};
}

} // namespace

KERNELS(CPU, m) {
  m.impl("nms", TORCH_FN(nms));
}

} // namespace maskrcnn_benchmark

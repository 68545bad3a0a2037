// Polygon mask targets and masks pasted straight into run lengths; see ops/masks.py for what they compute.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// pycocotools draws a polygon on a grid five times finer than the pixels.
constexpr int64_t kFine = 5;
// Fine coordinates beyond this are taken as this: far outside any mask, far inside 64 bits.
constexpr double kFar = 1 << 30;

struct Point {
  int64_t x, y;
};

int64_t to_fine(double value) {
  const double fine = kFine * value + 0.5;
  return std::isnan(fine) ? 0 : static_cast<int64_t>(std::min(std::max(fine, -kFar), kFar));
}

// The fine row where the walk along an edge passes from fine column `middle` to the next one, or back: the smaller row
// of the two steps. The edge must cross there. pycocotools walks in steps of one along the longer axis, upwards, and
// rounds the other coordinate; its floating point operations are repeated here in their order.
int64_t crossing_row(Point a, Point b, int64_t middle) {
  const bool flat = std::abs(b.x - a.x) >= std::abs(b.y - a.y);
  if (flat ? a.x > b.x : a.y > b.y) {
    std::swap(a, b);
  }
  if (flat) {
    const double slope = static_cast<double>(b.y - a.y) / static_cast<double>(b.x - a.x);
    const auto row_at = [&](int64_t x) { return static_cast<int64_t>(a.y + slope * (x - a.x) + 0.5); };
    return std::min(row_at(middle), row_at(middle + 1));
  }
  const double slope = static_cast<double>(b.x - a.x) / static_cast<double>(b.y - a.y);
  const auto passed = [&](int64_t step) { return (a.x + slope * step + 0.5 >= middle + 1) == (b.x > a.x); };
  // The first step on the far side: exact but for rounding, which the walk's own arithmetic then decides.
  int64_t step = static_cast<int64_t>(std::ceil((middle + 0.5 - a.x) / slope)) - 1;
  while (!passed(step)) {
    ++step;
  }
  return a.y + step - 1;
}

class PolygonDrawer {
 public:
  explicit PolygonDrawer(int64_t size) : size_(size), toggles_(size * size + 1) {}

  // Sets the pixels of mask [size, size] that the polygon covers, seen through the box.
  void draw(const float* points, int64_t count, const float* box, float* mask) {
    place(points, count, box);
    std::fill(toggles_.begin(), toggles_.end(), 0);
    for (int64_t i = 0; i < count; ++i) {
      add_edge(fine_[i], fine_[i + 1 < count ? i + 1 : 0]);
    }
    uint8_t inside = 0;
    for (int64_t x = 0; x < size_; ++x) {
      for (int64_t y = 0; y < size_; ++y) {
        inside ^= toggles_[x * size_ + y];
        if (inside) {
          mask[y * size_ + x] = 1;
        }
      }
    }
  }

 private:
  void place(const float* points, int64_t count, const float* box) {
    const double left = box[0], top = box[1];
    const double width = box[2] - left, height = box[3] - top;
    const double scale_x = size_ / (width < 0.1 ? 0.1 : width), scale_y = size_ / (height < 0.1 ? 0.1 : height);
    fine_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      fine_[i] = {to_fine((points[2 * i] - left) * scale_x), to_fine((points[2 * i + 1] - top) * scale_y)};
    }
  }

  // A pixel column c is crossed between the fine columns 5c + 2 and 5c + 3; from the row on, the mask's value toggles.
  void add_edge(Point a, Point b) {
    const int64_t low = std::min(a.x, b.x), high = std::max(a.x, b.x);
    int64_t column = low <= 2 ? 0 : (low - 2 + kFine - 1) / kFine;
    for (; column < size_ && kFine * column + 2 < high; ++column) {
      const double row = (crossing_row(a, b, kFine * column + 2) + 0.5) / kFine - 0.5;
      const double clamped = std::ceil(std::min(std::max(row, 0.0), static_cast<double>(size_)));
      toggles_[column * size_ + static_cast<int64_t>(clamped)] ^= 1;
    }
  }

  int64_t size_;
  std::vector<Point> fine_;
  std::vector<uint8_t> toggles_; // by column; a toggle below the last row starts in the next column
};

void check_offsets(const Tensor& offsets, int64_t last, const char* name) {
  const int64_t* values = offsets.const_data_ptr<int64_t>();
  const int64_t count = offsets.numel();
  const bool fine = count > 0 && values[0] >= 0 && std::is_sorted(values, values + count) && values[count - 1] <= last;
  TORCH_CHECK(fine, "polygon_targets: ", name, " must ascend within 0..", last);
}

Tensor polygon_targets(
    const Tensor& points,
    const Tensor& polygon_offsets,
    const Tensor& instance_offsets,
    const Tensor& instance,
    const Tensor& boxes,
    int64_t size) {
  const Tensor p = points.contiguous(), polygons = polygon_offsets.contiguous(), b = boxes.contiguous();
  const Tensor instances = instance_offsets.contiguous(), chosen = instance.contiguous();
  check_offsets(polygons, p.size(0), "polygon_offsets");
  check_offsets(instances, polygons.numel() - 1, "instance_offsets");
  const int64_t count = b.size(0), instance_count = instances.numel() - 1;
  Tensor masks = at::zeros({count, size, size}, b.options());
  const float* xy = p.const_data_ptr<float>();
  const int64_t* first_point = polygons.const_data_ptr<int64_t>();
  const int64_t* first_polygon = instances.const_data_ptr<int64_t>();
  const int64_t* owner = chosen.const_data_ptr<int64_t>();
  const float* corners = b.const_data_ptr<float>();
  float* out = masks.mutable_data_ptr<float>();
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    PolygonDrawer drawer(size);
    for (int64_t roi = begin; roi < end; ++roi) {
      const int64_t i = owner[roi];
      if (i < 0 || i >= instance_count) {
        continue;
      }
      for (int64_t polygon = first_polygon[i]; polygon < first_polygon[i + 1]; ++polygon) {
        const int64_t first = first_point[polygon];
        drawer.draw(xy + 2 * first, first_point[polygon + 1] - first, corners + 4 * roi, out + roi * size * size);
      }
    }
  });
  return masks;
}

// Where pixel centres lie along one axis of a mask, for the pixels [begin, end) that lie in it.
struct MaskAxis {
  int64_t begin = 0, end = 0;
  std::vector<int64_t> cell; // of a mask padded by a zero before and one after; rises from pixel to pixel
  std::vector<float> above;

  // The order of operations is that of the composite.
  void place(float low, float high, int64_t pixels, int64_t size) {
    begin = end = 0;
    cell.clear();
    above.clear();
    const float side = high - low;
    if (!(side > 0)) {
      return;
    }
    // Pixels lie at most half a cell outside the box; a whole one and a pixel leave room for rounding.
    const float reach = side / size + 1;
    const auto within = [&](float pixel) { return static_cast<int64_t>(std::clamp(pixel, 0.0f, float(pixels))); };
    const int64_t last = within(std::ceil(high + reach));
    for (int64_t pixel = within(std::floor(low - reach)); pixel < last; ++pixel) {
      const float normalized = (pixel + 0.5f - low) / side * 2 - 1;
      const float position = ((normalized + 1) * size - 1) / 2;
      if (!(position > -1 && position < size)) {
        continue;
      }
      if (cell.empty()) {
        begin = pixel;
      }
      end = pixel + 1;
      const float floor = std::floor(position);
      cell.push_back(static_cast<int64_t>(floor) + 1);
      above.push_back(position - floor);
    }
  }
};

// Collects the run lengths of a mask that is visited in column-major order, skipping what does not change.
class RunWriter {
 public:
  explicit RunWriter(std::vector<int64_t>& counts) : counts_(counts) {}

  void set(int64_t position, bool value) {
    if (value != value_) {
      counts_.push_back(position - start_);
      start_ = position;
      value_ = value;
    }
  }

  bool value() const {
    return value_;
  }

  void finish(int64_t end) {
    counts_.push_back(end - start_);
  }

 private:
  std::vector<int64_t>& counts_;
  int64_t start_ = 0;
  bool value_ = false;
};

// Pastes masks of one size into images of one size; keeps its buffers from mask to mask.
class MaskPaster {
 public:
  MaskPaster(int64_t size, int64_t height, int64_t width, float threshold)
      : size_(size), height_(height), width_(width), threshold_(threshold), profile_(size + 2, 0.0f),
        columns_((size + 2) * size, 0.0f), sides_(size + 1) {}

  void paste(const float* mask, const float* box, std::vector<int64_t>& counts) {
    x_.place(box[0], box[2], width_, size_);
    y_.place(box[1], box[3], height_, size_);
    step_ = size_ / (box[3] - box[1]);
    find_spans();
    transpose(mask);
    RunWriter run(counts);
    for (int64_t column = x_.begin; column < x_.end && y_.begin < y_.end; ++column) {
      const int64_t first = column * height_;
      if (y_.begin > 0) {
        run.set(first, false);
      }
      blend(x_.cell[column - x_.begin], x_.above[column - x_.begin]);
      add_column(first, run);
      if (y_.end < height_) {
        run.set(first + y_.end, false);
      }
    }
    if (x_.end < width_) {
      run.set(x_.end * height_, false);
    }
    run.finish(height_ * width_);
  }

 private:
  // Where the values between profile[cell] and profile[cell + 1] lie; the first two are a run's value.
  enum Side : uint8_t { kOutside = 0, kInside = 1, kCrossed = 2 };

  // The rows [begin, end) whose centres lie between profile[cell] and profile[cell + 1].
  struct Span {
    int64_t cell, begin, end;
  };

  void find_spans() {
    spans_.clear();
    for (int64_t row = y_.begin; row < y_.end; ++row) {
      const int64_t cell = y_.cell[row - y_.begin];
      if (spans_.empty() || spans_.back().cell != cell) {
        spans_.push_back({cell, row, row});
      }
      spans_.back().end = row + 1;
    }
  }

  // The mask column by column, between two columns of zeros.
  void transpose(const float* mask) {
    for (int64_t row = 0; row < size_; ++row) {
      for (int64_t column = 0; column < size_; ++column) {
        columns_[(column + 1) * size_ + row] = mask[row * size_ + column];
      }
    }
  }

  void blend(int64_t cell, float above) {
    const float *left = columns_.data() + cell * size_, *right = left + size_;
    for (int64_t row = 0; row < size_; ++row) {
      profile_[row + 1] = (1 - above) * left[row] + above * right[row];
    }
    const float surely = threshold_ * (1 + 1e-6f), hardly = threshold_ * (1 - 1e-6f);
    for (int64_t cell = 0; cell <= size_; ++cell) {
      const float low = profile_[cell], high = profile_[cell + 1];
      const bool inside = (low >= surely) & (high >= surely), outside = (low < hardly) & (high < hardly);
      sides_[cell] = inside ? kInside : outside ? kOutside : kCrossed;
    }
  }

  // Most spans lie between two values on the same side of the threshold, and need no look at their rows: of 160 rows
  // some 12 are computed. A blend rounds by less than 4e-7 of the larger value; nearer to the threshold it decides.
  void add_column(int64_t first, RunWriter& run) const {
    for (const Span& span : spans_) {
      const uint8_t side = sides_[span.cell];
      if (side == run.value()) {
        continue;
      }
      if (side != kCrossed) {
        run.set(first + span.begin, side == kInside);
        continue;
      }
      const float low = profile_[span.cell], high = profile_[span.cell + 1];
      if (step_ > 1e-3f && std::abs(high - low) * step_ > 1e-6f * larger(low, high)) {
        // From row to row the values rise (or fall) by more than they round: a count tells where they cross, without
        // a branch a row.
        int64_t inside = 0;
        for (int64_t row = span.begin; row < span.end; ++row) {
          inside += belongs(row, low, high);
        }
        const int64_t crossing = high > low ? span.end - inside : span.begin + inside;
        if (crossing > span.begin) {
          run.set(first + span.begin, high < low);
        }
        if (crossing < span.end) {
          run.set(first + crossing, high > low);
        }
      } else {
        for (int64_t row = span.begin; row < span.end; ++row) {
          run.set(first + row, belongs(row, low, high));
        }
      }
    }
  }

  bool belongs(int64_t row, float low, float high) const {
    const float share = y_.above[row - y_.begin];
    return (1 - share) * low + share * high >= threshold_;
  }

  int64_t size_, height_, width_;
  float threshold_;
  float step_ = 0; // cells from row to row
  MaskAxis x_, y_;
  std::vector<float> profile_, columns_;
  std::vector<uint8_t> sides_;
  std::vector<Span> spans_;
};

std::tuple<Tensor, Tensor> paste_masks_rle(
    const Tensor& masks,
    const Tensor& boxes,
    int64_t height,
    int64_t width,
    double threshold) {
  const Tensor m = masks.contiguous(), b = boxes.contiguous();
  const int64_t count = m.size(0), size = m.size(1);
  const float* values = m.const_data_ptr<float>();
  const float* corners = b.const_data_ptr<float>();
  std::vector<std::vector<int64_t>> runs(count);
  // An image's 100 detections in one go: threads that meet after a third of a millisecond gain nothing.
  at::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
    MaskPaster paster(size, height, width, static_cast<float>(threshold));
    for (int64_t i = begin; i < end; ++i) {
      paster.paste(values + i * size * size, corners + 4 * i, runs[i]);
    }
  });

  Tensor offsets = at::zeros({count + 1}, b.options().dtype(at::kLong));
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    offset[i + 1] = offset[i] + static_cast<int64_t>(runs[i].size());
  }
  Tensor counts = at::empty({offset[count]}, offsets.options());
  for (int64_t i = 0; i < count; ++i) {
    std::copy(runs[i].begin(), runs[i].end(), counts.mutable_data_ptr<int64_t>() + offset[i]);
  }
  return {counts, offsets};
}

} // namespace

KERNELS(CPU, m) {
  m.impl("polygon_targets", TORCH_FN(polygon_targets));
  m.impl("paste_masks_rle", TORCH_FN(paste_masks_rle));
}

} // namespace maskrcnn_benchmark

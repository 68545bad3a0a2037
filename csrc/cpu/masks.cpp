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
  std::vector<int64_t> cell; // of a mask padded by a zero before and one after
  std::vector<float> above;

  // The order of operations is that of the composite.
  MaskAxis(float low, float high, int64_t pixels, int64_t size) {
    const float side = high - low;
    if (!(side > 0)) {
      return;
    }
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
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

  void finish(int64_t end) {
    counts_.push_back(end - start_);
  }

 private:
  std::vector<int64_t>& counts_;
  int64_t start_ = 0;
  bool value_ = false;
};

void paste(const float* mask, int64_t size, const float* box, int64_t height, int64_t width, float threshold,
           std::vector<int64_t>& counts) {
  const MaskAxis x(box[0], box[2], width, size), y(box[1], box[3], height, size);
  RunWriter run(counts);
  std::vector<float> profile(size + 2, 0.0f);
  for (int64_t column = x.begin; column < x.end && y.begin < y.end; ++column) {
    const int64_t cell = x.cell[column - x.begin];
    const float above = x.above[column - x.begin];
    for (int64_t row = 0; row < size; ++row) {
      const float left = cell > 0 ? mask[row * size + cell - 1] : 0, right = cell < size ? mask[row * size + cell] : 0;
      profile[row + 1] = (1 - above) * left + above * right;
    }
    const int64_t first = column * height;
    if (y.begin > 0) {
      run.set(first, false);
    }
    for (int64_t row = y.begin; row < y.end; ++row) {
      const float* p = profile.data() + y.cell[row - y.begin];
      const float share = y.above[row - y.begin];
      run.set(first + row, (1 - share) * p[0] + share * p[1] >= threshold);
    }
    if (y.end < height) {
      run.set(first + y.end, false);
    }
  }
  if (x.end < width) {
    run.set(x.end * height, false);
  }
  run.finish(height * width);
}

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
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      paste(values + i * size * size, size, corners + 4 * i, height, width, static_cast<float>(threshold), runs[i]);
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

TORCH_LIBRARY_IMPL(maskrcnn_benchmark, CPU, m) {
  m.impl("polygon_targets", TORCH_FN(polygon_targets));
  m.impl("paste_masks_rle", TORCH_FN(paste_masks_rle));
}

} // namespace maskrcnn_benchmark

// Greedy NMS: boxes of one group of one image at a time, by falling score, each against the boxes kept so far.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Kept boxes compared before looking whether one of them suppresses.
constexpr int64_t kBlock = 64;

// Whether any of the first `count` kept boxes overlaps the box by more than the threshold. Places beyond count are NaN.
template <typename T>
MULTIVERSION bool is_suppressed(const BoxArray<T>& kept, int64_t count, const Box<T>& box, T threshold) {
  const T* x1 = kept.x1.data();
  const T* y1 = kept.y1.data();
  const T* x2 = kept.x2.data();
  const T* y2 = kept.y2.data();
  const T* area = kept.area.data();
  const T box_area = box.area();
  for (int64_t first = 0; first < count; first += kBlock) {
    int hits = 0;
    for (int64_t i = first; i < first + kBlock; ++i) {
      const T shared = intersection(Box<T>{x1[i], y1[i], x2[i], y2[i]}, box);
      hits |= shared > threshold * (area[i] + box_area - shared);
    }
    if (hits != 0) {
      return true;
    }
  }
  return false;
}

template <typename T>
struct Image {
  const Box<T>* boxes;
  const T* scores;
  const int64_t* groups;
  const bool* valid;
  int64_t size;
  std::vector<int64_t> order; // usable rows, by group, within a group by falling score

  bool before(int64_t a, int64_t b) const {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  }

  void sort() {
    for (int64_t row = 0; row < size; ++row) {
      const Box<T>& box = boxes[row];
      if (valid[row] && !std::isnan(scores[row]) && !std::isnan(box.x1) && !std::isnan(box.y1) &&
          !std::isnan(box.x2) && !std::isnan(box.y2)) {
        order.push_back(row);
      }
    }
    std::sort(order.begin(), order.end(), [this](int64_t a, int64_t b) {
      return groups[a] != groups[b] ? groups[a] < groups[b] : before(a, b);
    });
  }

  // Kept rows among order[begin:end], which is one group.
  std::vector<int64_t> suppress(int64_t begin, int64_t end, T threshold, int64_t max_output) const {
    std::vector<int64_t> rows;
    BoxArray<T> kept(at::divup(std::min(end - begin, max_output), kBlock) * kBlock);
    for (int64_t place = begin; place < end; ++place) {
      const int64_t count = rows.size();
      if (count == max_output) {
        break;
      }
      const Box<T>& box = boxes[order[place]];
      if (!is_suppressed(kept, count, box, threshold)) {
        kept.set(count, box);
        rows.push_back(order[place]);
      }
    }
    return rows;
  }
};

struct Segment {
  int64_t image, begin, end;
  std::vector<int64_t> kept;
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
    const auto& order = images[i].order;
    for (int64_t begin = 0, end = 0; begin < static_cast<int64_t>(order.size()); begin = end) {
      const int64_t group = images[i].groups[order[begin]];
      while (end < static_cast<int64_t>(order.size()) && images[i].groups[order[end]] == group) {
        ++end;
      }
      segments.push_back({i, begin, end, {}});
    }
  }
  at::parallel_for(0, segments.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Segment& segment = segments[i];
      segment.kept = images[segment.image].suppress(segment.begin, segment.end, threshold, max_output);
    }
  });

  std::vector<std::vector<int64_t>> kept(images.size());
  for (const Segment& segment : segments) {
    kept[segment.image].insert(kept[segment.image].end(), segment.kept.begin(), segment.kept.end());
  }
  for (size_t i = 0; i < images.size(); ++i) {
    std::sort(kept[i].begin(), kept[i].end(), [&](int64_t a, int64_t b) { return images[i].before(a, b); });
    const int64_t count = std::min<int64_t>(kept[i].size(), max_output);
    std::copy_n(kept[i].begin(), count, index + i * max_output);
    std::fill_n(keep + i * max_output, count, true);
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

TORCH_LIBRARY_IMPL(maskrcnn_benchmark, CPU, m) {
  m.impl("nms", TORCH_FN(nms));
}

} // namespace maskrcnn_benchmark

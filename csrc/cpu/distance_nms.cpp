// Greedy NMS by DIoU or CIoU: the boxes of an image by falling score, each against those kept of its group.
#include <ATen/TensorOperators.h>
#include <ATen/ops/atan2.h>
#include <ATen/ops/zeros.h>
#include <c10/util/MathConstants.h>

#include <limits>

#include "../candidates.h"

namespace maskrcnn_benchmark {
namespace {

// Kept boxes compared before looking whether one of them suppresses.
constexpr int64_t kBlock = 64;

template <typename T>
T quotient(T a, T b) {
  return b > 0 ? a / b : T(0);
}

// Rounding must be that of boxes.diou and boxes.ciou, operation by operation.
template <typename T>
T relative_distance(const Box<T>& a, const Box<T>& b) {
  const T width = larger(a.x2, b.x2) - smaller(a.x1, b.x1);
  const T height = larger(a.y2, b.y2) - smaller(a.y1, b.y1);
  const T x = (a.x1 + a.x2) / 2 - (b.x1 + b.x2) / 2;
  const T y = (a.y1 + a.y2) / 2 - (b.y1 + b.y2) / 2;
  return quotient(x * x + y * y, width * width + height * height);
}

template <typename T>
T aspect_penalty(T angle_a, T angle_b, T iou) {
  const T difference = (angle_a - angle_b) * T(2 / c10::pi<double>);
  const T v = difference * difference;
  return quotient(v, 1 - iou + v) * v;
}

template <typename T>
struct Kept {
  BoxArray<T> boxes;
  std::vector<T> angle;

  explicit Kept(int64_t size) : boxes(size), angle(size) {}
};

// Whether any of the kept boxes in places begin..end overlaps the box by more than the threshold.
template <typename T, bool aspect>
MULTIVERSION bool is_suppressed(
    const Kept<T>& kept,
    int64_t begin,
    int64_t end,
    const Box<T>& box,
    T angle,
    T threshold) {
  const T* x1 = kept.boxes.x1.data();
  const T* y1 = kept.boxes.y1.data();
  const T* x2 = kept.boxes.x2.data();
  const T* y2 = kept.boxes.y2.data();
  const T* area = kept.boxes.area.data();
  const T* angles = kept.angle.data();
  const T box_area = box.area();
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = first + kBlock < end ? first + kBlock : end;
    int hits = 0;
    for (int64_t i = first; i < last; ++i) {
      const Box<T> other{x1[i], y1[i], x2[i], y2[i]};
      const T shared = intersection(other, box);
      const T iou = quotient(shared, area[i] + box_area - shared);
      T overlap = iou - relative_distance(other, box);
      if (aspect) {
        overlap -= aspect_penalty(angles[i], angle, iou);
      }
      hits |= overlap > threshold;
    }
    if (hits != 0) {
      return true;
    }
  }
  return false;
}

template <typename T, bool aspect>
void suppress(
    Candidates<T>& candidates,
    const Box<T>* boxes,
    const T* angles,
    T threshold,
    int64_t max_output,
    int64_t* index,
    bool* keep) {
  Kept<T> kept(candidates.size());
  for (int64_t count = 0; count < max_output && !candidates.empty();) {
    const Candidate<T> best = candidates.pop();
    const Box<T>& box = boxes[best.row];
    const T angle = angles[best.row];
    const int64_t begin = candidates.first(best.group), end = begin + candidates.taken(best.group);
    if (!is_suppressed<T, aspect>(kept, begin, end, box, angle, threshold)) {
      const int64_t place = candidates.take(best.group);
      kept.boxes.set(place, box);
      kept.angle[place] = angle;
      index[count] = best.row;
      keep[count++] = true;
    }
  }
}

Tensor aspect_angles(const Tensor& boxes) {
  const Tensor sides = (boxes.slice(-1, 2) - boxes.slice(-1, 0, 2)).clamp_min(0);
  return at::atan2(sides.select(-1, 0), sides.select(-1, 1)).contiguous();
}

std::tuple<Tensor, Tensor> distance_nms(
    const Tensor& boxes,
    const Tensor& scores,
    const Tensor& groups,
    const Tensor& valid,
    double threshold,
    bool aspect,
    int64_t max_output) {
  TORCH_CHECK(boxes.scalar_type() == scores.scalar_type(), "distance_nms: boxes and scores differ in dtype");
  const Tensor b = boxes.contiguous(), s = scores.contiguous(), g = groups.contiguous(), v = valid.contiguous();
  const Tensor angles = aspect_angles(b);
  const int64_t size = b.size(1);
  Tensor index = at::zeros({b.size(0), max_output}, g.options().dtype(at::kLong));
  Tensor keep = at::zeros({b.size(0), max_output}, g.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "distance_nms", [&] {
    using T = scalar_t;
    const auto* all_boxes = reinterpret_cast<const Box<T>*>(b.const_data_ptr<T>());
    const T* all_scores = s.const_data_ptr<T>();
    const T* all_angles = angles.const_data_ptr<T>();
    const int64_t* all_groups = g.const_data_ptr<int64_t>();
    const bool* all_valid = v.const_data_ptr<bool>();
    int64_t* indices = index.mutable_data_ptr<int64_t>();
    bool* keeps = keep.mutable_data_ptr<bool>();
    const T lowest = -std::numeric_limits<T>::infinity();
    const auto suppress_image = aspect ? suppress<T, true> : suppress<T, false>;
    at::parallel_for(0, b.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * size, place = i * max_output;
        Candidates<T> candidates(all_boxes + row, all_scores + row, all_groups + row, all_valid + row, size, lowest);
        suppress_image(
            candidates, all_boxes + row, all_angles + row, T(threshold), max_output, indices + place, keeps + place);
      }
    });
  });
  return {index, keep};
}

} // namespace

KERNELS(CPU, m) {
  m.impl("distance_nms", TORCH_FN(distance_nms));
}

} // namespace maskrcnn_benchmark

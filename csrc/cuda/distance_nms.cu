// NMS by DIoU or CIoU; see ops/distance_nms.py for what it computes and ops/boxes.py for the formulas.
#include "common.cuh"

#include <ATen/ops/zeros.h>

#include <cmath>

#include "take_best.cuh"

namespace maskrcnn_benchmark {
namespace {

template <typename T>
__device__ inline T quotient(T a, T b) {
  return b > 0 ? a / b : T(0);
}

template <typename T>
__device__ inline T relative_distance(const Box<T>& a, const Box<T>& b) {
  const T width = larger(a.x2, b.x2) - smaller(a.x1, b.x1), height = larger(a.y2, b.y2) - smaller(a.y1, b.y1);
  const T x = (a.x1 + a.x2) / 2 - (b.x1 + b.x2) / 2, y = (a.y1 + a.y2) / 2 - (b.y1 + b.y2) / 2;
  return quotient(x * x + y * y, width * width + height * height);
}

template <typename T>
__device__ inline T aspect_angle(const Box<T>& box) {
  const T width = at_least_zero(box.x2 - box.x1), height = at_least_zero(box.y2 - box.y1);
  return std::atan2(width, width + height > 0 ? height : T(1));
}

template <typename T>
struct DropByDistance {
  T threshold;
  bool aspect;

  __device__ bool admits(T score) const {
    return !std::isnan(score);
  }

  __device__ T overlap(const Box<T>& a, const Box<T>& b) const {
    const T shared = intersection(a, b);
    const T iou = quotient(shared, a.area() + b.area() - shared);
    const T diou = iou - relative_distance(a, b);
    if (!aspect) {
      return diou;
    }
    const T difference = (aspect_angle(a) - aspect_angle(b)) * T(2 / M_PI);
    const T v = difference * difference;
    return diou - quotient(v, 1 - iou + v) * v;
  }

  __device__ T lower(const Box<T>& taken, const Box<T>& box, T score) const {
    return overlap(taken, box) > threshold ? T(NAN) : score;
  }
};

std::tuple<Tensor, Tensor> distance_nms(
    const Tensor& boxes,
    const Tensor& scores,
    const Tensor& groups,
    const Tensor& valid,
    double threshold,
    bool aspect,
    int64_t max_output) {
  TORCH_CHECK(boxes.scalar_type() == scores.scalar_type(), "distance_nms: boxes and scores differ in dtype");
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor b = boxes.contiguous(), s = scores.clone(at::MemoryFormat::Contiguous);
  const Tensor index = at::zeros({b.size(0), max_output}, b.options().dtype(at::kLong));
  const Tensor keep = at::zeros({b.size(0), max_output}, b.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "distance_nms", [&] {
    const DropByDistance<scalar_t> rule{static_cast<scalar_t>(threshold), aspect};
    take_best<scalar_t>(b, s, groups.contiguous(), valid.contiguous(), rule, index, keep, nullptr);
  });
  return {index, keep};
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("distance_nms", TORCH_FN(distance_nms));
}

} // namespace maskrcnn_benchmark

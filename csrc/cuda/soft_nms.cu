// Soft-NMS; see ops/soft_nms.py for what it computes.
#include "common.cuh"

#include <ATen/ops/zeros.h>

#include <cmath>

#include "take_best.cuh"

namespace maskrcnn_benchmark {
namespace {

template <typename T>
struct LowerByIou {
  bool gaussian;
  T iou_threshold, sigma, min_score;

  __device__ bool admits(T score) const {
    return score >= min_score;
  }

  __device__ T lower(const Box<T>& taken, const Box<T>& box, T score) const {
    const T shared = intersection(taken, box);
    const T joint = taken.area() + box.area() - shared;
    const T iou = joint > 0 ? shared / joint : T(0);
    const T factor = gaussian ? std::exp(-(iou * iou) / sigma) : iou > iou_threshold ? 1 - iou : T(1);
    const T lowered = score * factor;
    return lowered >= min_score ? lowered : T(NAN);
  }
};

std::tuple<Tensor, Tensor, Tensor> soft_nms(
    const Tensor& boxes,
    const Tensor& scores,
    const Tensor& groups,
    const Tensor& valid,
    bool gaussian,
    double iou_threshold,
    double sigma,
    double min_score,
    int64_t max_output) {
  TORCH_CHECK(boxes.scalar_type() == scores.scalar_type(), "soft_nms: boxes and scores differ in dtype");
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor b = boxes.contiguous(), s = scores.clone(at::MemoryFormat::Contiguous);
  const Tensor index = at::zeros({b.size(0), max_output}, b.options().dtype(at::kLong));
  const Tensor keep = at::zeros({b.size(0), max_output}, b.options().dtype(at::kBool));
  const Tensor kept_scores = at::zeros({b.size(0), max_output}, b.options());
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "soft_nms", [&] {
    const LowerByIou<scalar_t> rule{
        gaussian,
        static_cast<scalar_t>(iou_threshold),
        static_cast<scalar_t>(sigma),
        static_cast<scalar_t>(min_score)};
    take_best(b, s, groups.contiguous(), valid.contiguous(), rule, index, keep,
              kept_scores.mutable_data_ptr<scalar_t>());
  });
  return {index, keep, kept_scores};
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("soft_nms", TORCH_FN(soft_nms));
}

} // namespace maskrcnn_benchmark

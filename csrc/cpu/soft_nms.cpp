// Soft-NMS, lazily: scores only ever fall, so the best of the scores known so far is the best of all once it has been
// brought up to date. Most boxes are compared with few of those taken, the rest with none.
#include <ATen/ops/zeros.h>

#include "../candidates.h"

namespace maskrcnn_benchmark {
namespace {

template <typename T>
struct Rule {
  bool gaussian;
  T iou_threshold, sigma, min_score;

  T factor(T iou) const {
    if (gaussian) {
      return std::exp(-(iou * iou) / sigma);
    }
    return iou > iou_threshold ? 1 - iou : T(1);
  }
};

// IoUs of the box with those in places begin..end.
template <typename T>
MULTIVERSION void compare(
    const BoxArray<T>& taken,
    int64_t begin,
    int64_t end,
    const Box<T>& box,
    T* __restrict__ iou) {
  const T* x1 = taken.x1.data();
  const T* y1 = taken.y1.data();
  const T* x2 = taken.x2.data();
  const T* y2 = taken.y2.data();
  const T* area = taken.area.data();
  const T box_area = box.area();
  for (int64_t i = begin; i < end; ++i) {
    const T shared = intersection(Box<T>{x1[i], y1[i], x2[i], y2[i]}, box);
    const T both = area[i] + box_area - shared;
    iou[i - begin] = both > 0 ? shared / both : T(0);
  }
}

// Lower the score by what was taken of its group since it was last looked at, in the order of taking.
template <typename T>
void bring_up_to_date(
    Candidate<T>& candidate,
    const Candidates<T>& candidates,
    const BoxArray<T>& taken,
    const Box<T>& box,
    const Rule<T>& rule,
    std::vector<T>& iou) {
  const int64_t first = candidates.first(candidate.group), count = candidates.taken(candidate.group);
  compare(taken, first + candidate.seen, first + count, box, iou.data());
  for (int64_t i = 0; i < count - candidate.seen && candidate.score >= rule.min_score; ++i) {
    candidate.score *= iou[i] > 0 ? rule.factor(iou[i]) : T(1);
  }
  candidate.seen = count;
}

template <typename T>
void take(
    Candidates<T>& candidates,
    const Box<T>* boxes,
    const Rule<T>& rule,
    int64_t max_output,
    int64_t* index,
    bool* keep,
    T* scores) {
  BoxArray<T> taken(candidates.size());
  std::vector<T> iou(candidates.size());
  for (int64_t count = 0; count < max_output && !candidates.empty();) {
    Candidate<T> best = candidates.pop();
    const T known = best.score;
    bring_up_to_date(best, candidates, taken, boxes[best.row], rule, iou);
    if (best.score == known) {
      taken.set(candidates.take(best.group), boxes[best.row]);
      index[count] = best.row;
      keep[count] = true;
      scores[count++] = known;
    } else if (best.score >= rule.min_score) {
      candidates.push(best);
    }
  }
}

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
  const Tensor b = boxes.contiguous(), s = scores.contiguous(), g = groups.contiguous(), v = valid.contiguous();
  const int64_t size = b.size(1);
  Tensor index = at::zeros({b.size(0), max_output}, g.options().dtype(at::kLong));
  Tensor keep = at::zeros({b.size(0), max_output}, g.options().dtype(at::kBool));
  Tensor kept_scores = at::zeros({b.size(0), max_output}, s.options());
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "soft_nms", [&] {
    using T = scalar_t;
    const auto* all_boxes = reinterpret_cast<const Box<T>*>(b.const_data_ptr<T>());
    const T* all_scores = s.const_data_ptr<T>();
    const int64_t* all_groups = g.const_data_ptr<int64_t>();
    const bool* all_valid = v.const_data_ptr<bool>();
    int64_t* indices = index.mutable_data_ptr<int64_t>();
    bool* keeps = keep.mutable_data_ptr<bool>();
    T* lowered = kept_scores.mutable_data_ptr<T>();
    const Rule<T> rule{gaussian, T(iou_threshold), T(sigma), T(min_score)};
    at::parallel_for(0, b.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * size, place = i * max_output;
        Candidates<T> candidates(
            all_boxes + row, all_scores + row, all_groups + row, all_valid + row, size, rule.min_score);
        take(candidates, all_boxes + row, rule, max_output, indices + place, keeps + place, lowered + place);
      }
    });
  });
  return {index, keep, kept_scores};
}

} // namespace

KERNELS(CPU, m) {
  m.impl("soft_nms", TORCH_FN(soft_nms));
}

} // namespace maskrcnn_benchmark

// IoU and matching in one pass: no ground truth x anchor matrix is ever stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Anchors a thread holds as arrays at a time: 28 kB of float32 with their results, within a first-level cache.
constexpr int64_t kBlock = 1024;

template <typename T>
MULTIVERSION void overlaps(const BoxArray<T>& anchors, const Box<T>& gt, T* __restrict__ iou) {
  const T* x1 = anchors.x1.data();
  const T* y1 = anchors.y1.data();
  const T* x2 = anchors.x2.data();
  const T* y2 = anchors.y2.data();
  const T* area = anchors.area.data();
  const Box<T> box = gt;
  const T box_area = box.area();
  for (int64_t i = 0; i < kBlock; ++i) {
    const T shared = intersection(box, Box<T>{x1[i], y1[i], x2[i], y2[i]});
    const T joint = box_area + area[i] - shared;
    const T ratio = shared / joint;
    iou[i] = joint > 0 ? ratio : T(0);
  }
}

// Lets a ground truth compete for each anchor by its IoU; returns its best one in the block.
template <typename T>
MULTIVERSION T compete(const T* __restrict__ iou, int32_t gt, T* __restrict__ best, int32_t* __restrict__ index) {
  T most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < kBlock; ++i) {
    const bool better = iou[i] > best[i];
    best[i] = better ? iou[i] : best[i];
    index[i] = better ? gt : index[i];
    most = iou[i] > most ? iou[i] : most;
  }
  return most;
}

template <typename T>
class Matcher {
 public:
  Matcher(const Tensor& gt_boxes, const Tensor& gt_valid, const Tensor& anchors, T high, T low)
      : gt_boxes_(reinterpret_cast<const Box<T>*>(gt_boxes.const_data_ptr<T>())),
        gt_valid_(gt_valid.const_data_ptr<bool>()),
        anchors_(reinterpret_cast<const Box<T>*>(anchors.const_data_ptr<T>())),
        batch_(gt_boxes.size(0)),
        gt_count_(gt_boxes.size(1)),
        anchor_count_(anchors.size(-2)),
        anchor_stride_(anchors.dim() == 3 ? anchor_count_ : 0),
        blocks_(at::divup(anchor_count_, kBlock)),
        high_(high),
        low_(low),
        block_best_(batch_ * blocks_ * gt_count_, T(0)) {}

  void match(int64_t* index, int8_t* label) {
    at::parallel_for(0, batch_ * blocks_, 1, [&](int64_t begin, int64_t end) {
      BoxArray<T> block(kBlock);
      for (int64_t i = begin; i < end; ++i) {
        load(i, block);
        match_block(i, block, index, label);
      }
    });
  }

  // An anchor that reaches a ground truth's best IoU over all blocks. Blocks that do not hold it are skipped.
  void add_low_quality(int8_t* label) {
    at::parallel_for(0, batch_ * blocks_, 1, [&](int64_t begin, int64_t end) {
      BoxArray<T> block(kBlock);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / blocks_;
        bool loaded = false;
        for (int64_t gt = 0; gt < gt_count_; ++gt) {
          const T most = best_of(image, gt);
          if (!(most > 0) || block_best_[i * gt_count_ + gt] != most) {
            continue;
          }
          if (!loaded) {
            load(i, block);
            loaded = true;
          }
          mark_equal(i, block, gt_boxes_[image * gt_count_ + gt], most, label);
        }
      }
    });
  }

 private:
  int64_t first_anchor(int64_t i) const {
    return (i % blocks_) * kBlock;
  }

  int64_t anchors_in(int64_t i) const {
    return std::min(kBlock, anchor_count_ - first_anchor(i));
  }

  void load(int64_t i, BoxArray<T>& block) const {
    const Box<T>* source = anchors_ + (i / blocks_) * anchor_stride_ + first_anchor(i);
    for (int64_t place = 0; place < kBlock; ++place) {
      block.set(place, place < anchors_in(i) ? source[place] : Box<T>{T(NAN), T(NAN), T(NAN), T(NAN)});
    }
  }

  void match_block(int64_t i, const BoxArray<T>& block, int64_t* index, int8_t* label) {
    T iou[kBlock], best[kBlock];
    int32_t best_index[kBlock] = {};
    std::fill_n(best, kBlock, T(-1));
    const int64_t image = i / blocks_;
    for (int64_t gt = 0; gt < gt_count_; ++gt) {
      const int64_t row = image * gt_count_ + gt;
      if (gt_valid_[row]) {
        overlaps(block, gt_boxes_[row], iou);
        block_best_[i * gt_count_ + gt] = compete(iou, static_cast<int32_t>(gt), best, best_index);
      }
    }
    const int64_t first = image * anchor_count_ + first_anchor(i);
    for (int64_t place = 0; place < anchors_in(i); ++place) {
      index[first + place] = best_index[place];
      label[first + place] = best[place] >= high_ ? 1 : best[place] < low_ ? 0 : -1;
    }
  }

  T best_of(int64_t image, int64_t gt) const {
    T most = 0;
    for (int64_t i = image * blocks_; i < (image + 1) * blocks_; ++i) {
      most = larger(most, block_best_[i * gt_count_ + gt]);
    }
    return most;
  }

  void mark_equal(int64_t i, const BoxArray<T>& block, const Box<T>& gt, T most, int8_t* label) const {
    const int64_t first = (i / blocks_) * anchor_count_ + first_anchor(i);
    T iou[kBlock];
    overlaps(block, gt, iou);
    for (int64_t place = 0; place < anchors_in(i); ++place) {
      if (iou[place] == most) {
        label[first + place] = 1;
      }
    }
  }

  const Box<T>* gt_boxes_;
  const bool* gt_valid_;
  const Box<T>* anchors_;
  int64_t batch_, gt_count_, anchor_count_, anchor_stride_, blocks_;
  T high_, low_;
  std::vector<T> block_best_; // [batch, blocks, ground truths]
};

std::tuple<Tensor, Tensor> match(
    const Tensor& gt_boxes,
    const Tensor& gt_valid,
    const Tensor& anchors,
    double high,
    double low,
    bool allow_low_quality) {
  TORCH_CHECK(gt_boxes.scalar_type() == anchors.scalar_type(), "match: gt_boxes and anchors differ in dtype");
  const Tensor boxes = gt_boxes.contiguous(), valid = gt_valid.contiguous(), candidates = anchors.contiguous();
  const std::vector<int64_t> shape{boxes.size(0), candidates.size(-2)};
  Tensor index = at::zeros(shape, boxes.options().dtype(at::kLong));
  Tensor label = at::zeros(shape, boxes.options().dtype(at::kChar));
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "match", [&] {
    Matcher<scalar_t> matcher(boxes, valid, candidates, static_cast<scalar_t>(high), static_cast<scalar_t>(low));
    matcher.match(index.mutable_data_ptr<int64_t>(), label.mutable_data_ptr<int8_t>());
    if (allow_low_quality) {
      matcher.add_low_quality(label.mutable_data_ptr<int8_t>());
    }
  });
  return {index, label};
}

} // namespace

KERNELS(CPU, m) {
  m.impl("match", TORCH_FN(match));
}

} // namespace maskrcnn_benchmark

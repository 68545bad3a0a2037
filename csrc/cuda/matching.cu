// IoU and matching fused: no ground truth x anchor matrix is ever stored. See ops/matching.py for what it computes.
#include "common.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace maskrcnn_benchmark {
namespace {

// Ground truths that a block keeps in shared memory at a time.
constexpr int kTile = kThreads;

// IoUs are not negative, so their bits, taken as whole numbers, are in the same order. A maximum does not depend on
// the order in which threads arrive.
__device__ inline void raise_to(float* target, float iou) {
  atomicMax(reinterpret_cast<int*>(target), __float_as_int(iou));
}

__device__ inline void raise_to(double* target, double iou) {
  atomicMax(reinterpret_cast<long long*>(target), __double_as_longlong(iou));
}

template <typename T>
struct Problem {
  const Box<T>* gt_boxes; // [batch, gt_count]
  const bool* gt_valid; // [batch, gt_count]
  const Box<T>* anchors; // [anchor_count], or that for every image
  int64_t gt_count, anchor_count;
  int64_t anchor_stride; // between the anchors of two images
  int64_t blocks_per_image;
  T high, low;

  __device__ int64_t image() const {
    return blockIdx.x / blocks_per_image;
  }

  // This thread's anchor; a thread beyond the last one has none and must still take part in the block's work.
  __device__ int64_t anchor() const {
    return blockIdx.x % blocks_per_image * kThreads + threadIdx.x;
  }

  __device__ Box<T> load_anchor() const {
    return anchor() < anchor_count ? anchors[image() * anchor_stride + anchor()] : Box<T>{NAN, NAN, NAN, NAN};
  }
};

template <typename T>
__device__ inline T iou(const Box<T>& gt, T gt_area, const Box<T>& anchor, T anchor_area) {
  const T shared = intersection(gt, anchor);
  const T joint = gt_area + anchor_area - shared;
  // Most pairs do not meet: whole warps skip the division.
  return shared > 0 && joint > 0 ? shared / joint : T(0);
}

// One thread an anchor. Where they are asked for (else null), writes the best IoU of each ground truth in this block,
// block_best [batch x blocks, gt_count], and over all blocks, gt_best [batch, gt_count], zero at first.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    match_kernel(Problem<T> problem, int64_t* index, int8_t* label, T* block_best, T* gt_best) {
  __shared__ Box<T> tile[kTile];
  __shared__ T tile_area[kTile];
  __shared__ T tile_best[kTile];
  const int64_t image = problem.image(), anchor_number = problem.anchor();
  const Box<T> anchor = problem.load_anchor();
  const T area = anchor.area();
  T best = -1;
  int64_t best_gt = 0;
  for (int64_t first = 0; first < problem.gt_count; first += kTile) {
    const int64_t gt = image * problem.gt_count + first + threadIdx.x;
    const bool filled = first + threadIdx.x < problem.gt_count;
    // A ground truth that is not valid has area -1, which no box has.
    tile[threadIdx.x] = filled ? problem.gt_boxes[gt] : Box<T>{0, 0, 0, 0};
    tile_area[threadIdx.x] = filled && problem.gt_valid[gt] ? tile[threadIdx.x].area() : T(-1);
    tile_best[threadIdx.x] = 0;
    __syncthreads();
    const int count = static_cast<int>(smaller<int64_t>(kTile, problem.gt_count - first));
    for (int i = 0; i < count; ++i) {
      if (tile_area[i] == -1) {
        continue;
      }
      const T overlap = iou(tile[i], tile_area[i], anchor, area);
      if (overlap > best) {
        best = overlap;
        best_gt = first + i;
      }
      if (gt_best != nullptr && overlap > 0) {
        raise_to(&tile_best[i], overlap);
      }
    }
    __syncthreads();
    if (gt_best != nullptr && filled) {
      block_best[blockIdx.x * problem.gt_count + first + threadIdx.x] = tile_best[threadIdx.x];
      if (tile_best[threadIdx.x] > 0) {
        raise_to(&gt_best[gt], tile_best[threadIdx.x]);
      }
    }
  }
  if (anchor_number < problem.anchor_count) {
    const int64_t place = image * problem.anchor_count + anchor_number;
    index[place] = best_gt;
    label[place] = best >= problem.high ? 1 : best < problem.low ? 0 : -1;
  }
}

// Marks the anchors that reach a ground truth's best IoU. A block compares again only with ground truths whose best it
// holds: few blocks hold any.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    low_quality_kernel(Problem<T> problem, const T* block_best, const T* gt_best, int8_t* label) {
  __shared__ bool holds[kThreads];
  const int64_t image = problem.image(), anchor_number = problem.anchor();
  const Box<T> anchor = problem.load_anchor();
  const T area = anchor.area();
  bool reaches = false;
  for (int64_t first = 0; first < problem.gt_count; first += kThreads) {
    const int64_t mine = first + threadIdx.x;
    const bool held = mine < problem.gt_count && gt_best[image * problem.gt_count + mine] > 0 &&
        block_best[blockIdx.x * problem.gt_count + mine] == gt_best[image * problem.gt_count + mine];
    if (!__syncthreads_or(held)) {
      continue;
    }
    holds[threadIdx.x] = held;
    __syncthreads();
    const int count = static_cast<int>(smaller<int64_t>(kThreads, problem.gt_count - first));
    for (int i = 0; i < count; ++i) {
      if (holds[i]) {
        const int64_t gt = image * problem.gt_count + first + i;
        const Box<T> box = problem.gt_boxes[gt];
        reaches |= iou(box, box.area(), anchor, area) == gt_best[gt];
      }
    }
    __syncthreads();
  }
  if (reaches && anchor_number < problem.anchor_count) {
    label[image * problem.anchor_count + anchor_number] = 1;
  }
}

std::tuple<Tensor, Tensor> match(
    const Tensor& gt_boxes,
    const Tensor& gt_valid,
    const Tensor& anchors,
    double high,
    double low,
    bool allow_low_quality) {
  TORCH_CHECK(gt_boxes.scalar_type() == anchors.scalar_type(), "match: gt_boxes and anchors differ in dtype");
  const c10::cuda::CUDAGuard guard(gt_boxes.device());
  const Tensor boxes = gt_boxes.contiguous(), valid = gt_valid.contiguous(), candidates = anchors.contiguous();
  const int64_t batch = boxes.size(0), gt_count = boxes.size(1), anchor_count = candidates.size(-2);
  const int64_t blocks = batch * at::divup(anchor_count, kThreads);
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "match: more than 2^31 x ", kThreads, " anchors");
  Tensor index = at::empty({batch, anchor_count}, boxes.options().dtype(at::kLong));
  Tensor label = at::empty({batch, anchor_count}, boxes.options().dtype(at::kChar));
  const Tensor gt_best = at::zeros({batch, gt_count}, boxes.options());
  const Tensor block_best = at::empty({allow_low_quality ? blocks : 0, gt_count}, boxes.options());
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "match", [&] {
    const Problem<scalar_t> problem{
        reinterpret_cast<const Box<scalar_t>*>(boxes.const_data_ptr<scalar_t>()),
        valid.const_data_ptr<bool>(),
        reinterpret_cast<const Box<scalar_t>*>(candidates.const_data_ptr<scalar_t>()),
        gt_count,
        anchor_count,
        candidates.dim() == 3 ? anchor_count : 0,
        at::divup(anchor_count, kThreads),
        static_cast<scalar_t>(high),
        static_cast<scalar_t>(low)};
    scalar_t* most = allow_low_quality ? gt_best.mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* most_in_block = block_best.mutable_data_ptr<scalar_t>();
    int8_t* labels = label.mutable_data_ptr<int8_t>();
    launch(match_kernel<scalar_t>, blocks, kThreads, 0, problem, index.mutable_data_ptr<int64_t>(), labels,
           most_in_block, most);
    if (allow_low_quality) {
      launch(low_quality_kernel<scalar_t>, blocks, kThreads, 0, problem, most_in_block, most, labels);
    }
  });
  return {index, label};
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("match", TORCH_FN(match));
}

} // namespace maskrcnn_benchmark

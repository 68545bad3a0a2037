// Greedy NMS without a wait for the device: boxes sorted by group and score, slab after slab of them. Boxes of a slab
// are compared with each other (a bit for each pair), a scan walks through the bits and settles who stays, and those
// who stay drop boxes of the slabs to come. Memory grows with N, not with N * N.
#include "common.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace maskrcnn_benchmark {
namespace {

using Word = unsigned long long; // a bit for each of the 64 boxes of a tile

constexpr int kTile = 64;
constexpr int kSlabTiles = 64;
constexpr int kSlab = kTile * kSlabTiles; // its bits are 2 MiB an image
constexpr int kApplyRows = 512; // of a slab, compared with later boxes by one block
constexpr int kMaxBatch = 65535; // of a grid's third axis

template <typename T>
struct Rows { // of all images, [B, N]
  const Box<T>* boxes;
  const T* scores;
  const int64_t* groups;
  const bool* valid;
};

// The same in the order of groups and scores.
template <typename T>
struct Sorted {
  const Box<T>* boxes;
  const int64_t* groups;
  const int64_t* order; // place -> row
  bool* gone; // unusable or suppressed
  Word* bits; // [B, rows of a slab, kSlabTiles]
  int64_t size;

  C10_HOST_DEVICE int64_t slab_rows() const {
    return smaller<int64_t>(size, kSlab);
  }

  __device__ Sorted image(int64_t number) const {
    const int64_t first = number * size;
    return {
        boxes + first, groups + first, order + first, gone + first, bits + number * slab_rows() * kSlabTiles, size};
  }
};

template <typename T>
__device__ bool is_usable(const Rows<T>& rows, int64_t row) {
  const Box<T> box = rows.boxes[row];
  return rows.valid[row] && !std::isnan(rows.scores[row]) && !std::isnan(box.x1) && !std::isnan(box.y1) &&
      !std::isnan(box.x2) && !std::isnan(box.y2);
}

// By these keys unusable rows come last.
template <typename T>
__global__ void key_kernel(Rows<T> rows, int64_t total, T* score_keys, int64_t* group_keys) {
  for (int64_t row = thread_number(); row < total; row += thread_count()) {
    const bool usable = is_usable(rows, row);
    score_keys[row] = usable ? rows.scores[row] + T(0) : -std::numeric_limits<T>::infinity(); // -0 becomes 0
    group_keys[row] = usable ? rows.groups[row] : std::numeric_limits<int64_t>::max();
  }
}

template <typename T>
__global__ void arrange_kernel(
    Rows<T> rows, const int64_t* order, int64_t size, int64_t total, Box<T>* boxes, bool* gone) {
  for (int64_t place = thread_number(); place < total; place += thread_count()) {
    const int64_t row = place / size * size + order[place];
    boxes[place] = rows.boxes[row];
    gone[place] = !is_usable(rows, row);
  }
}

// The rounding is that of the CPU's kernel.
template <typename T>
__device__ bool suppresses(const Box<T>& kept, const Box<T>& box, T threshold) {
  const T shared = intersection(kept, box);
  return shared > threshold * (kept.area() + box.area() - shared);
}

// bits[row, tile] of an image: which boxes of a tile (x) the row of the slab (y) drops, if it stays. Tiles before the
// row's and tiles of other groups are left as they are.
template <typename T>
__global__ void compare_kernel(Sorted<T> sorted, int64_t slab, int rows, T threshold) {
  const Sorted<T> image = sorted.image(blockIdx.z);
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  const int last_row = smaller(first_row + kTile, rows) - 1;
  if (first_column < first_row || image.groups[slab + last_row] < image.groups[slab + first_column]) {
    return;
  }
  __shared__ Box<T> columns[kTile];
  __shared__ int64_t column_groups[kTile];
  const int count = smaller(kTile, rows - first_column), column = threadIdx.x;
  if (column < count) {
    columns[column] = image.boxes[slab + first_column + column];
    column_groups[column] = image.groups[slab + first_column + column];
  }
  __syncthreads();

  const int row = first_row + threadIdx.x;
  if (row >= rows) {
    return;
  }
  Word word = 0;
  if (!image.gone[slab + row]) {
    const Box<T> box = image.boxes[slab + row];
    const int64_t group = image.groups[slab + row];
    for (int i = larger(0, row + 1 - first_column); i < count; ++i) {
      if (column_groups[i] == group && suppresses(box, columns[i], threshold)) {
        word |= Word(1) << i;
      }
    }
  }
  image.bits[int64_t(row) * kSlabTiles + blockIdx.x] = word;
}

__device__ int group_end(const int64_t* groups, int begin, int rows) {
  int low = begin, high = rows; // groups ascend; the end lies in (low, high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (groups[middle] == groups[begin] ? low : high) = middle;
  }
  return high;
}

// Which of a tile's boxes stay, of those that are alive.
__device__ Word settle(Word alive, const Word* bits) {
  Word kept = 0;
  while (alive != 0) {
    const int first = __ffsll(alive) - 1;
    kept |= Word(1) << first;
    alive &= ~(bits[first] | Word(1) << first);
  }
  return kept;
}

// Settles rows [begin, end) of a slab, which are one group, tile after tile; all threads of the block take part. Two
// barriers a tile do: between them thread 0 alone reads what is shared and writes `kept`, which all read after them.
__device__ void scan_group(int begin, int end, const Word* bits, const int64_t* order, bool* gone, bool* kept_rows) {
  __shared__ Word dropped[kSlabTiles], diagonal[kTile], kept;
  __shared__ unsigned int alive[kTile / kWarp];
  for (int tile = threadIdx.x; tile < kSlabTiles; tile += blockDim.x) {
    dropped[tile] = 0;
  }
  const int thread = threadIdx.x, last_tile = (end - 1) / kTile;
  for (int tile = begin / kTile; tile <= last_tile; ++tile) {
    const int row = tile * kTile + thread;
    const bool is_mine = thread < kTile && row >= begin && row < end;
    if (thread < kTile) {
      const bool usable = is_mine && !gone[row];
      diagonal[thread] = usable ? bits[int64_t(row) * kSlabTiles + tile] : 0;
      const unsigned int usable_lanes = __ballot_sync(kAllLanes, usable);
      if (thread % kWarp == 0) {
        alive[thread / kWarp] = usable_lanes;
      }
    }
    __syncthreads();
    if (thread == 0) {
      kept = settle((Word(alive[1]) << kWarp | alive[0]) & ~dropped[tile], diagonal);
    }
    __syncthreads();
    if (is_mine) {
      const bool stays = kept >> thread & 1;
      gone[row] = !stays;
      if (stays) {
        kept_rows[order[row]] = true;
      }
    }
    // What the kept rows drop in the tiles to come: a thread for each of these tiles and each byte of kept.
    const int tiles = last_tile - tile;
    for (int item = thread; item < tiles * 8; item += blockDim.x) {
      const int column = tile + 1 + item % tiles, part = item / tiles * 8;
      Word word = 0;
      for (Word left = kept >> part & 0xff; left != 0; left &= left - 1) {
        word |= bits[int64_t(tile * kTile + part + __ffsll(left) - 1) * kSlabTiles + column];
      }
      if (word != 0) {
        atomicOr(&dropped[column], word);
      }
    }
  }
}

// Each block settles the groups that begin in its tile.
template <typename T>
__global__ void scan_kernel(Sorted<T> sorted, int64_t slab, int rows, bool* kept_rows) {
  const Sorted<T> image = sorted.image(blockIdx.z);
  const int64_t* groups = image.groups + slab;
  const int first = blockIdx.x * kTile, last = smaller(first + kTile, rows);
  for (int row = first; row < last; ++row) {
    if (row == 0 || groups[row] != groups[row - 1]) {
      scan_group(
          row, group_end(groups, row, rows), image.bits, image.order + slab, image.gone + slab,
          kept_rows + blockIdx.z * image.size);
    }
  }
}

// Drops the boxes after the slab (x) that a kept row of a part of the slab (y) overlaps.
template <typename T>
__global__ void apply_kernel(Sorted<T> sorted, int64_t slab, int rows, T threshold) {
  const Sorted<T> image = sorted.image(blockIdx.z);
  const int64_t first_column = slab + rows + int64_t(blockIdx.x) * blockDim.x, column = first_column + threadIdx.x;
  const int first_row = blockIdx.y * kApplyRows, end_row = smaller(first_row + kApplyRows, rows);
  if (image.groups[slab + end_row - 1] < image.groups[first_column]) {
    return;
  }
  __shared__ Box<T> kept[kApplyRows];
  __shared__ int64_t kept_groups[kApplyRows];
  __shared__ int count;
  if (threadIdx.x == 0) {
    count = 0;
  }
  __syncthreads();
  for (int row = first_row + threadIdx.x; row < end_row; row += blockDim.x) {
    if (!image.gone[slab + row]) {
      const int place = atomicAdd(&count, 1); // in any order: all of them count alike
      kept[place] = image.boxes[slab + row];
      kept_groups[place] = image.groups[slab + row];
    }
  }
  __syncthreads();
  if (column >= image.size || image.gone[column]) {
    return;
  }
  const Box<T> box = image.boxes[column];
  const int64_t group = image.groups[column];
  for (int i = 0; i < count; ++i) {
    if (kept_groups[i] == group && suppresses(kept[i], box, threshold)) {
      image.gone[column] = true;
      return;
    }
  }
}

// The kept rows of an image (a block) in the order of scores, as many as there is room for.
__global__ void collect_kernel(
    const int64_t* score_order, const bool* kept_rows, int64_t size, int64_t max_output, int64_t* index, bool* keep) {
  __shared__ int warp_counts[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t image = blockIdx.x;
  int64_t done = 0;
  for (int64_t first = 0; first < size && done < max_output; first += kThreads) {
    const int64_t place = first + threadIdx.x;
    const int64_t row = place < size ? score_order[image * size + place] : 0;
    const bool kept = place < size && kept_rows[image * size + row];
    const unsigned int lanes = __ballot_sync(kAllLanes, kept);
    __syncthreads();
    if (lane == 0) {
      warp_counts[warp] = __popc(lanes);
    }
    __syncthreads();
    int64_t slot = done + __popc(lanes & ((1u << lane) - 1));
    for (int i = 0; i < kThreads / kWarp; ++i) {
      slot += i < warp ? warp_counts[i] : 0;
      done += warp_counts[i];
    }
    if (kept && slot < max_output) {
      index[image * max_output + slot] = row;
      keep[image * max_output + slot] = true;
    }
  }
}

template <typename T>
void suppress(const Sorted<T>& sorted, int64_t batch, T threshold, bool* kept_rows) {
  const unsigned int images = batch;
  for (int64_t slab = 0; slab < sorted.size; slab += kSlab) {
    const int rows = std::min<int64_t>(kSlab, sorted.size - slab);
    const unsigned int tiles = block_count(rows, kTile), parts = block_count(rows, kApplyRows);
    launch(compare_kernel<T>, {tiles, tiles, images}, kTile, 0, sorted, slab, rows, threshold);
    launch(scan_kernel<T>, {tiles, 1, images}, kThreads, 0, sorted, slab, rows, kept_rows);
    const unsigned int later = block_count(sorted.size - slab - rows);
    launch(apply_kernel<T>, {later, parts, images}, kThreads, 0, sorted, slab, rows, threshold);
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
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor b = boxes.contiguous(), s = scores.contiguous(), g = groups.contiguous(), v = valid.contiguous();
  const int64_t batch = b.size(0), size = b.size(1), total = batch * size;
  TORCH_CHECK(batch <= kMaxBatch, "nms: at most ", kMaxBatch, " images, got ", batch);
  Tensor index = at::zeros({batch, max_output}, g.options());
  Tensor keep = at::zeros({batch, max_output}, v.options());
  if (total == 0 || max_output == 0) {
    return {index, keep};
  }
  Tensor score_keys = at::empty_like(s), group_keys = at::empty_like(g), sorted_boxes = at::empty_like(b);
  Tensor gone = at::empty_like(v), kept_rows = at::zeros_like(v);
  const Tensor bits = at::empty({batch, std::min<int64_t>(size, kSlab), kSlabTiles}, g.options());
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "nms", [&] {
    using T = scalar_t;
    const Rows<T> rows{
        reinterpret_cast<const Box<T>*>(b.const_data_ptr<T>()), s.const_data_ptr<T>(), g.const_data_ptr<int64_t>(),
        v.const_data_ptr<bool>()};
    launch(
        key_kernel<T>, block_count(total), kThreads, 0, rows, total, score_keys.mutable_data_ptr<T>(),
        group_keys.mutable_data_ptr<int64_t>());
    // Two stable sorts: by group, in a group by falling score, of equal scores the lower row first.
    const Tensor score_order = std::get<1>(at::sort(score_keys, /*stable=*/true, /*dim=*/1, /*descending=*/true));
    const auto [sorted_groups, within] = at::sort(group_keys.gather(1, score_order), /*stable=*/true, 1, false);
    const Tensor order = score_order.gather(1, within);
    Box<T>* places = reinterpret_cast<Box<T>*>(sorted_boxes.mutable_data_ptr<T>());
    launch(
        arrange_kernel<T>, block_count(total), kThreads, 0, rows, order.const_data_ptr<int64_t>(), size, total, places,
        gone.mutable_data_ptr<bool>());
    const Sorted<T> sorted{
        places, sorted_groups.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(),
        gone.mutable_data_ptr<bool>(), reinterpret_cast<Word*>(bits.mutable_data_ptr<int64_t>()), size};
    suppress<T>(sorted, batch, static_cast<T>(iou_threshold), kept_rows.mutable_data_ptr<bool>());
    launch(
        collect_kernel, static_cast<unsigned int>(batch), kThreads, 0, score_order.const_data_ptr<int64_t>(),
        kept_rows.const_data_ptr<bool>(), size, max_output, index.mutable_data_ptr<int64_t>(),
        keep.mutable_data_ptr<bool>());
  });
  return {index, keep};
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("nms", TORCH_FN(nms));
}

} // namespace maskrcnn_benchmark

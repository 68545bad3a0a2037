// Polygon mask targets and masks pasted straight into run lengths; see ops/masks.py for what they compute.
#include "common.cuh"

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace maskrcnn_benchmark {
namespace {

// pycocotools draws a polygon on a grid five times finer than the pixels.
constexpr int64_t kFine = 5;
// Fine coordinates beyond this are taken as this: far outside any mask, far inside 64 bits.
constexpr double kFar = 1 << 30;
// Words of 32 pixels of one column that a block holds: all of a mask of 128 x 128 pixels, or as many columns as fit.
constexpr int kWords = 512;
constexpr int kWordBits = 32;

struct Point {
  int64_t x, y;
};

__device__ inline int64_t to_fine(double value) {
  const double fine = kFine * value + 0.5;
  return std::isnan(fine) ? 0 : static_cast<int64_t>(std::fmin(std::fmax(fine, -kFar), kFar));
}

// A box as pycocotools' callers see it: in double precision, its sides at least a tenth of a pixel.
struct View {
  double left, top, scale_x, scale_y;

  __device__ View(const float* box, int64_t size) : left(box[0]), top(box[1]) {
    const double width = box[2] - left, height = box[3] - top;
    scale_x = size / (width < 0.1 ? 0.1 : width);
    scale_y = size / (height < 0.1 ? 0.1 : height);
  }

  __device__ Point place(const float* point) const {
    return {to_fine((point[0] - left) * scale_x), to_fine((point[1] - top) * scale_y)};
  }
};

// As in csrc/cpu/masks.cpp, operation by operation: the fine row where the walk along an edge passes from fine column
// `middle` to the next one, or back.
__device__ inline int64_t crossing_row(Point a, Point b, int64_t middle) {
  const int64_t run = b.x > a.x ? b.x - a.x : a.x - b.x, rise = b.y > a.y ? b.y - a.y : a.y - b.y;
  const bool flat = run >= rise;
  if (flat ? a.x > b.x : a.y > b.y) {
    const Point start = b;
    b = a;
    a = start;
  }
  if (flat) {
    const double slope = static_cast<double>(b.y - a.y) / static_cast<double>(b.x - a.x);
    const auto row_at = [&](int64_t x) { return static_cast<int64_t>(a.y + slope * (x - a.x) + 0.5); };
    return smaller(row_at(middle), row_at(middle + 1));
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

// The columns of a mask that a block draws: `words` words each, the lowest row in the lowest bit.
struct Columns {
  int64_t first, count, size;
  int words;

  // Toggles the columns that an edge crosses from the row of the crossing on. An edge crosses pixel column c between
  // the fine columns 5c + 2 and 5c + 3.
  __device__ void add_edge(Point a, Point b, unsigned int* toggles) const {
    const int64_t low = smaller(a.x, b.x), high = larger(a.x, b.x);
    int64_t column = larger(first, low <= 2 ? 0 : (low - 2 + kFine - 1) / kFine);
    for (; column < first + count && kFine * column + 2 < high; ++column) {
      const double row = (crossing_row(a, b, kFine * column + 2) + 0.5) / kFine - 0.5;
      const int64_t start = static_cast<int64_t>(std::ceil(std::fmin(std::fmax(row, 0.0), static_cast<double>(size))));
      if (start < size) {
        atomicXor(&toggles[(column - first) * words + start / kWordBits], 1u << (start % kWordBits));
      }
    }
  }

  // Adds to a column what its toggles enclose: a pixel is inside after an odd number of them. A closed polygon crosses
  // a column an even number of times, so columns do not depend on each other.
  __device__ void fill(const unsigned int* toggles, unsigned int* covered) const {
    unsigned int carry = 0;
    for (int word = 0; word < words; ++word) {
      unsigned int inside = toggles[word];
      for (int shift = 1; shift < kWordBits; shift *= 2) {
        inside ^= inside << shift;
      }
      inside ^= carry;
      covered[word] |= inside;
      carry = inside >> (kWordBits - 1) ? ~0u : 0u;
    }
  }
};

struct Polygons {
  const float* points; // [point_count, 2]
  const int64_t* polygon_offsets; // [polygon_count + 1]
  const int64_t* instance_offsets; // [instance_count + 1]
  int64_t point_count, polygon_count, instance_count;

  // The host cannot look at offsets without waiting for the device; here none leads out of its array.
  __device__ static int64_t bound(const int64_t* offsets, int64_t i, int64_t last) {
    return smaller(larger(offsets[i], int64_t(0)), last);
  }
};

// One block draws `columns_per_block` columns of one box's mask.
__global__ void __launch_bounds__(kThreads) polygon_kernel(
    Polygons polygons,
    const int64_t* instance,
    const float* boxes,
    int64_t size,
    int64_t columns_per_block,
    float* masks) {
  __shared__ unsigned int toggles[kWords];
  __shared__ unsigned int covered[kWords];
  const int64_t tiles = (size + columns_per_block - 1) / columns_per_block;
  const int64_t roi = blockIdx.x / tiles, first = blockIdx.x % tiles * columns_per_block;
  const int words = static_cast<int>((size + kWordBits - 1) / kWordBits);
  const Columns columns{first, smaller(columns_per_block, size - first), size, words};
  const int used = static_cast<int>(columns.count) * words;
  for (int i = threadIdx.x; i < used; i += blockDim.x) {
    covered[i] = 0;
  }
  const View view(boxes + 4 * roi, size);
  const int64_t owner = instance[roi];
  const bool known = owner >= 0 && owner < polygons.instance_count;
  const int64_t last = polygons.polygon_count;
  int64_t polygon = known ? Polygons::bound(polygons.instance_offsets, owner, last) : 0;
  const int64_t end = known ? Polygons::bound(polygons.instance_offsets, owner + 1, last) : 0;
  for (; polygon < end; ++polygon) {
    for (int i = threadIdx.x; i < used; i += blockDim.x) {
      toggles[i] = 0;
    }
    __syncthreads();
    const int64_t begin = Polygons::bound(polygons.polygon_offsets, polygon, polygons.point_count);
    const int64_t stop = Polygons::bound(polygons.polygon_offsets, polygon + 1, polygons.point_count);
    for (int64_t i = begin + threadIdx.x; i < stop; i += blockDim.x) {
      const int64_t next = i + 1 < stop ? i + 1 : begin;
      columns.add_edge(view.place(polygons.points + 2 * i), view.place(polygons.points + 2 * next), toggles);
    }
    __syncthreads();
    for (int column = threadIdx.x; column < columns.count; column += blockDim.x) {
      columns.fill(toggles + column * words, covered + column * words);
    }
    __syncthreads();
  }
  __syncthreads();
  const int width = static_cast<int>(columns.count), pixels = width * static_cast<int>(size);
  for (int i = threadIdx.x; i < pixels; i += blockDim.x) {
    const int row = i / width, column = i % width;
    const unsigned int word = covered[column * words + row / kWordBits];
    masks[(roi * size + row) * size + first + column] = static_cast<float>((word >> (row % kWordBits)) & 1);
  }
}

Tensor polygon_targets(
    const Tensor& points,
    const Tensor& polygon_offsets,
    const Tensor& instance_offsets,
    const Tensor& instance,
    const Tensor& boxes,
    int64_t size) {
  TORCH_CHECK(size <= kWords * kWordBits, "polygon_targets: size must be at most ", kWords * kWordBits, ", got ", size);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor p = points.contiguous(), offsets = polygon_offsets.contiguous(), b = boxes.contiguous();
  const Tensor instances = instance_offsets.contiguous(), chosen = instance.contiguous();
  const int64_t count = b.size(0), words = at::divup(size, kWordBits);
  const int64_t columns_per_block = smaller(size, kWords / words);
  const int64_t blocks = count * at::divup(size, columns_per_block);
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "polygon_targets: too many boxes: ", count);
  Tensor masks = at::empty({count, size, size}, b.options());
  const Polygons polygons{
      p.const_data_ptr<float>(),
      offsets.const_data_ptr<int64_t>(),
      instances.const_data_ptr<int64_t>(),
      p.size(0),
      offsets.numel() - 1,
      instances.numel() - 1};
  launch(polygon_kernel, blocks, kThreads / 2, 0, polygons, chosen.const_data_ptr<int64_t>(), b.const_data_ptr<float>(),
         size, columns_per_block, masks.mutable_data_ptr<float>());
  return masks;
}

// Where the pixel centres of an image lie along one axis of a mask in a box.
struct MaskAxis {
  float low, side;
  int64_t size;

  __device__ MaskAxis(float low, float high, int64_t size) : low(low), side(high - low), size(size) {}

  // Whether a pixel reads the mask; then the cell above it, counted from the zero that pads the mask in front, and how
  // far below that cell it lies. The order of operations is that of the composite.
  __device__ bool locate(int64_t pixel, int64_t& cell, float& above) const {
    const float normalized = (pixel + 0.5f - low) / side * 2 - 1;
    const float position = ((normalized + 1) * size - 1) / 2;
    if (!(side > 0 && position > -1 && position < size)) {
      return false;
    }
    const float floor = std::floor(position);
    cell = static_cast<int64_t>(floor) + 1;
    above = position - floor;
    return true;
  }

  // No pixel before this one reads the mask, which ends half a cell beyond the box; the rest allows for rounding.
  __device__ int64_t first(int64_t pixels) const {
    return clamp(std::floor(low - side / size - 2), pixels);
  }

  __device__ int64_t last(int64_t pixels) const {
    return clamp(std::ceil(low + side + side / size + 2), pixels);
  }

 private:
  __device__ static int64_t clamp(float pixel, int64_t pixels) {
    return static_cast<int64_t>(std::fmin(std::fmax(pixel, 0.0f), static_cast<float>(pixels)));
  }
};

struct Paste {
  const float* masks; // [count, size, size]
  const float* boxes; // [count, 4]
  int64_t count, size, height, width;
  float threshold;
};

// One column of the image, seen through one mask.
class Column {
 public:
  __device__ Column(const Paste& paste, int64_t mask, int64_t column)
      : mask_(paste.masks + mask * paste.size * paste.size),
        y_(paste.boxes[4 * mask + 1], paste.boxes[4 * mask + 3], paste.size),
        size_(paste.size),
        height_(paste.height),
        threshold_(paste.threshold) {
    const MaskAxis x(paste.boxes[4 * mask], paste.boxes[4 * mask + 2], paste.size);
    inside_ = column >= 0 && column < paste.width && x.locate(column, cell_, above_);
  }

  __device__ bool value(int64_t row) {
    int64_t cell = 0;
    float above = 0;
    if (!inside_ || !y_.locate(row, cell, above)) {
      return false;
    }
    if (cell != row_cell_) {
      row_cell_ = cell;
      upper_ = profile(cell - 1);
      lower_ = profile(cell);
    }
    return (1 - above) * upper_ + above * lower_ >= threshold_;
  }

  // Calls visit(row) where the value differs from the pixel before; `value` is that of the pixel before the column.
  template <typename Visit>
  __device__ void changes(bool value_before, const Visit& visit) {
    bool current = value_before;
    if (height_ > 0 && value(0) != current) {
      current = !current;
      visit(int64_t(0));
    }
    if (!inside_) {
      return;
    }
    const int64_t end = smaller(y_.last(height_) + 1, height_);
    for (int64_t row = larger(y_.first(height_), int64_t(1)); row < end; ++row) {
      if (value(row) != current) {
        current = !current;
        visit(row);
      }
    }
  }

 private:
  // The mask's row, interpolated at this column; rows before the first and behind the last are zero.
  __device__ float profile(int64_t row) const {
    if (row < 0 || row >= size_) {
      return 0;
    }
    const float* cells = mask_ + row * size_;
    const float left = cell_ > 0 ? cells[cell_ - 1] : 0, right = cell_ < size_ ? cells[cell_] : 0;
    return (1 - above_) * left + above_ * right;
  }

  const float* mask_;
  MaskAxis y_;
  int64_t size_, height_;
  float threshold_;
  bool inside_;
  int64_t cell_ = 0, row_cell_ = -1;
  float above_ = 0, upper_ = 0, lower_ = 0;
};

// Thread t looks at column t % (width + 1) of mask t / (width + 1); the column behind the last one stands for the end
// of the mask's last run. Calls visit(position) for every place where a run ends, in the order of an RLE.
template <typename Visit>
__device__ void run_ends(const Paste& paste, int64_t thread, const Visit& visit) {
  const int64_t mask = thread / (paste.width + 1), column = thread % (paste.width + 1);
  if (column == paste.width) {
    visit(paste.height * paste.width);
    return;
  }
  const bool value_before = Column(paste, mask, column - 1).value(paste.height - 1);
  Column(paste, mask, column).changes(value_before, [&](int64_t row) { visit(column * paste.height + row); });
}

__global__ void __launch_bounds__(kThreads) count_runs_kernel(Paste paste, int* counts) {
  for (int64_t i = thread_number(); i < paste.count * (paste.width + 1); i += thread_count()) {
    int count = 0;
    run_ends(paste, i, [&](int64_t) { ++count; });
    counts[i] = count;
  }
}

// ends [1 + runs]: a leading 0, then where each run ends, all masks' pixels numbered on and on.
__global__ void __launch_bounds__(kThreads) write_ends_kernel(Paste paste, const int64_t* ranks, int64_t* ends) {
  for (int64_t i = thread_number(); i < paste.count * (paste.width + 1); i += thread_count()) {
    const int64_t first_pixel = i / (paste.width + 1) * paste.height * paste.width;
    int64_t* end = ends + 1 + (i > 0 ? ranks[i - 1] : 0);
    run_ends(paste, i, [&](int64_t position) { *end++ = first_pixel + position; });
  }
}

std::tuple<Tensor, Tensor> paste_masks_rle(
    const Tensor& masks,
    const Tensor& boxes,
    int64_t height,
    int64_t width,
    double threshold) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor m = masks.contiguous(), b = boxes.contiguous();
  const int64_t count = m.size(0), columns = count * (width + 1);
  const Paste paste{
      m.const_data_ptr<float>(),
      b.const_data_ptr<float>(),
      count,
      m.size(1),
      height,
      width,
      static_cast<float>(threshold)};
  const Tensor run_counts = at::empty({columns}, b.options().dtype(at::kInt));
  launch(count_runs_kernel, block_count(columns), kThreads, 0, paste, run_counts.mutable_data_ptr<int>());
  const Tensor ranks = run_counts.cumsum(0, at::kLong);

  Tensor offsets = at::zeros({count + 1}, ranks.options());
  offsets.slice(0, 1).copy_(ranks.view({count, width + 1}).select(1, width));
  const int64_t total = offsets.select(0, count).item<int64_t>(); // waits: the host must know how much to allocate
  const Tensor ends = at::zeros({total + 1}, ranks.options());
  launch(write_ends_kernel, block_count(columns), kThreads, 0, paste, ranks.const_data_ptr<int64_t>(),
         ends.mutable_data_ptr<int64_t>());
  return {ends.slice(0, 1).sub(ends.slice(0, 0, total)), offsets};
}

} // namespace

KERNELS(CUDA, m) {
  m.impl("polygon_targets", TORCH_FN(polygon_targets));
  m.impl("paste_masks_rle", TORCH_FN(paste_masks_rle));
}

} // namespace maskrcnn_benchmark

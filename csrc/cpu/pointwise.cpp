// A linear map of channels, y = W x + b, in bfloat16 with float32 sums: fully connected layers and 1x1 convolutions.
// Rows of the input are a product's left factor as they lie; its right factor is packed first, and weights that are
// float32 are rounded there, without a copy of their own.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "product.h"

#ifdef HAS_PRODUCT
namespace maskrcnn_benchmark {
namespace {

constexpr int64_t kDepth = 256; // words of a sum at a time: a panel of the right factor takes 32 kB
constexpr int64_t kBlock = 64; // rows whose sums a thread makes at a time,
constexpr int64_t kWidth = 512; // and columns: the sums stay in its second-level cache
constexpr int64_t kChunk = 512; // pairs of rows that the weights' gradient takes at a time
constexpr int64_t kGroup = 4; // panels of its left factor that stay in the second-level cache

AVX512_BEGIN

// Panels are words [columns / kColumns, depth, kColumns]; a word holds the values of two steps of the sum.

// Of rows [2 depth, columns]; pairs begin..end of them; zeros after the last row.
template <typename T>
void pair_rows(const T* rows, int64_t row_count, int64_t columns, int64_t depth, int64_t begin, int64_t end,
               BFloat16* panels) {
  for (int64_t pair = begin; pair < end; ++pair) {
    const T* row = rows + 2 * pair * columns;
    const bool both = 2 * pair + 1 < row_count;
    for (int64_t column = 0; column < columns; column += kLanes) {
      BFloat16* to = panels + 2 * ((column / kColumns * depth + pair) * kColumns + column % kColumns);
      store_words(to, load(row + column), both ? load(row + columns + column) : _mm512_setzero_ps());
    }
  }
}

inline __m512i load_words(const float* from) {
  return join_words(BFloat16(), _mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes));
}

inline __m512i load_words(const BFloat16* from) {
  return _mm512_loadu_si512(from);
}

// Of the transpose of rows [columns, 2 depth]; panels begin..end of them.
template <typename T>
void transpose_rows(const T* rows, int64_t depth, int64_t begin, int64_t end, BFloat16* panels) {
  for (int64_t column = begin * kColumns; column < end * kColumns; column += kLanes) {
    BFloat16* words = panels + 2 * (column / kColumns * depth * kColumns + column % kColumns);
    for (int64_t step = 0; step < depth; step += kLanes) {
      __m512i square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = load_words(rows + (column + i) * 2 * depth + 2 * step);
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) {
        _mm512_storeu_si512(words + 2 * (step + i) * kColumns, square[i]);
      }
    }
  }
}

// sums [rows, width] = a panels, of `rows`, a multiple of kRows, and `width` columns. a: rows [rows, 2 depth].
void multiply(const BFloat16* a, const BFloat16* panels, int64_t depth, int64_t rows, int64_t width, float* sums) {
  for (int64_t step = 0; step < depth; step += kDepth) {
    const int64_t steps = std::min(kDepth, depth - step);
    for (int64_t column = 0; column < width; column += kColumns) {
      const BFloat16* panel = panels + 2 * (column * depth + step * kColumns);
      for (int64_t row = 0; row < rows; row += kRows) {
        const BFloat16* from = a + 2 * (row * depth + step);
        float* to = sums + row * width + column;
        if (step == 0) {
          product<BFloat16, false>(from, depth, 1, panel, kColumns, steps, to, width);
        } else {
          product<BFloat16, true>(from, depth, 1, panel, kColumns, steps, to, width);
        }
      }
    }
  }
}

// What becomes of the sums of a product: a bias for each column, or null; rows like the output's that are added, or
// null; the least value: 0 for a ReLU, or -infinity.
struct Finish {
  const float* bias = nullptr;
  const BFloat16* addend = nullptr;
  float least = -INFINITY;
};

// finish: of these rows and columns.
void write_rows(
    const float* sums, int64_t rows, int64_t width, const Finish& finish, BFloat16* to, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < width; column += kLanes) {
      const int64_t place = row * columns + column;
      Vector sum = load(sums + row * width + column);
      sum = finish.bias != nullptr ? sum + load(finish.bias + column) : sum;
      sum = finish.addend != nullptr ? sum + load(finish.addend + place) : sum;
      store(to + place, at_least(finish.least, sum));
    }
  }
}

// Gradients of the outputs of left panels 0..count, [count kColumns, columns] = or += left^T right.
void add_products(const BFloat16* left, int64_t count, const BFloat16* right, int64_t depth, int64_t columns, bool add,
                  float* sums) {
  for (int64_t column = 0; column < columns; column += kColumns) {
    for (int64_t row = 0; row < count * kColumns; row += kRows) {
      const BFloat16* a = left + 2 * (row / kColumns * depth * kColumns + row % kColumns);
      const BFloat16* b = right + 2 * column * depth;
      float* to = sums + row * columns + column;
      if (add) {
        product<BFloat16, true>(a, 1, kColumns, b, kColumns, depth, to, columns);
      } else {
        product<BFloat16, false>(a, 1, kColumns, b, kColumns, depth, to, columns);
      }
    }
  }
}

AVX512_END

// rows [count, 2 depth] times panels, finished, into [count, columns].
void multiply_rows(const BFloat16* rows, int64_t count, const BFloat16* panels, int64_t depth, int64_t columns,
                   const Finish& finish, BFloat16* output) {
  const int64_t block = rows_at_a_time(count, kBlock);
  at::parallel_for(0, divide_up(count, block), 1, [&](int64_t begin, int64_t end) {
    const auto sums = scratch<float>(block * kWidth);
    const auto last = scratch<BFloat16>(kRows * 2 * depth); // rows beyond a multiple of kRows
    std::memset(last.get(), 0, kRows * 2 * depth * sizeof(BFloat16));
    for (int64_t first = begin * block; first < std::min(count, end * block); first += block) {
      const int64_t real = std::min(block, count - first), whole = real / kRows * kRows;
      std::memcpy(last.get(), rows + (first + whole) * 2 * depth, (real - whole) * 2 * depth * sizeof(BFloat16));
      for (int64_t column = 0; column < columns; column += kWidth) {
        const int64_t width = std::min(kWidth, columns - column);
        const BFloat16* right = panels + 2 * column * depth;
        multiply(rows + first * 2 * depth, right, depth, whole, width, sums.get());
        if (whole < real) {
          multiply(last.get(), right, depth, kRows, width, sums.get() + whole * width);
        }
        const int64_t place = first * columns + column;
        const Finish here{finish.bias ? finish.bias + column : nullptr,
                          finish.addend ? finish.addend + place : nullptr, finish.least};
        write_rows(sums.get(), real, width, here, output + place, columns);
      }
    }
  });
}

// Tensors are rows [count, channels] from here on, contiguous.

template <typename T>
Tensor forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& addend, bool relu) {
  const int64_t outputs = weight.size(0), depth = weight.size(1) / 2;
  const auto panels = scratch<BFloat16>(outputs * 2 * depth);
  at::parallel_for(0, outputs / kColumns, 1, [&](int64_t begin, int64_t end) {
    transpose_rows(weight.const_data_ptr<T>(), depth, begin, end, panels.get());
  });
  const Tensor output = at::empty({input.size(0), outputs}, input.options());
  const Tensor biases = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const Finish finish{bias ? biases.const_data_ptr<float>() : nullptr,
                      addend.defined() ? addend.const_data_ptr<BFloat16>() : nullptr, relu ? 0 : -INFINITY};
  multiply_rows(input.const_data_ptr<BFloat16>(), input.size(0), panels.get(), depth, outputs, finish,
                output.mutable_data_ptr<BFloat16>());
  return output;
}

template <typename T>
Tensor input_gradient(const Tensor& grad, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), depth = outputs / 2;
  const auto panels = scratch<BFloat16>(outputs * inputs);
  at::parallel_for(0, depth, 8, [&](int64_t begin, int64_t end) {
    pair_rows(weight.const_data_ptr<T>(), outputs, inputs, depth, begin, end, panels.get());
  });
  const Tensor result = at::empty({grad.size(0), inputs}, grad.options());
  multiply_rows(grad.const_data_ptr<BFloat16>(), grad.size(0), panels.get(), depth, inputs, Finish{},
                result.mutable_data_ptr<BFloat16>());
  return result;
}

// Of the weights, float32 [outputs, inputs], and of the bias. A sum has one owner, whatever the number of threads.
std::tuple<Tensor, Tensor> weight_gradient(const Tensor& grad, const Tensor& input) {
  const int64_t count = input.size(0), outputs = grad.size(1), inputs = input.size(1);
  const int64_t most = std::min(kChunk, divide_up(count, 2));
  const auto left = scratch<BFloat16>(2 * most * outputs), right = scratch<BFloat16>(2 * most * inputs);
  const Tensor result = with_huge_pages(at::empty({outputs, inputs}, input.options().dtype(at::kFloat)));
  const Tensor bias = at::zeros({outputs}, result.options());
  const int64_t panels = outputs / kColumns;
  const int64_t group = std::min(kGroup, divide_up(panels, at::get_num_threads()));
  for (int64_t first = 0; first < count; first += 2 * kChunk) {
    const int64_t rows = std::min(2 * kChunk, count - first), depth = divide_up(rows, 2);
    at::parallel_for(0, depth, 8, [&](int64_t begin, int64_t end) {
      pair_rows(grad.const_data_ptr<BFloat16>() + first * outputs, rows, outputs, depth, begin, end, left.get());
      pair_rows(input.const_data_ptr<BFloat16>() + first * inputs, rows, inputs, depth, begin, end, right.get());
    });
    at::parallel_for(0, divide_up(panels, group), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin * group; panel < std::min(panels, end * group); panel += group) {
        const int64_t several = std::min(group, panels - panel);
        const BFloat16* gradients = left.get() + 2 * panel * depth * kColumns;
        add_products(
            gradients, several, right.get(), depth, inputs, first > 0,
            result.mutable_data_ptr<float>() + panel * kColumns * inputs);
        for (int64_t i = 0; i < several; ++i) {
          add_columns(
              gradients + 2 * i * depth * kColumns, depth, bias.mutable_data_ptr<float>() + (panel + i) * kColumns);
        }
      }
    });
  }
  return {result, bias};
}

// ---- the operators: of [B, C, ...] along the second dimension

// Results are views of rows to torch, and no in-place ReLU could follow them, unless it is told not to look.
using Unwatched = at::AutoDispatchBelowADInplaceOrView;

bool serves(const Tensor& rows, int64_t other) {
  return rows.scalar_type() == at::kBFloat16 && rows.size(0) > 0 && rows.size(1) % kColumns == 0 &&
      other % kColumns == 0;
}

Tensor rows_of(const Tensor& map) {
  return (map.dim() == 4 ? map.permute({0, 2, 3, 1}) : map).reshape({-1, map.size(1)}).contiguous();
}

// Rows [count, channels] in the shape of `like`, which has other channels; of a map channels-last.
Tensor map_of(const Tensor& rows, const Tensor& like) {
  return like.dim() == 4 ? rows.view({like.size(0), like.size(2), like.size(3), rows.size(1)}).permute({0, 3, 1, 2})
                         : rows;
}

Tensor matrix(const Tensor& weight) {
  return weight.flatten(1).contiguous();
}

Tensor pointwise(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& addend, bool relu) {
  const Unwatched guard;
  const Tensor rows = rows_of(input), w = matrix(weight), added = addend ? rows_of(*addend) : Tensor();
  if (!serves(rows, w.size(0))) {
    const auto b = bias ? std::optional(bias->to(rows.scalar_type())) : std::nullopt;
    Tensor result = at::linear(rows, w.to(rows.scalar_type()), b);
    result = addend ? result.add_(added) : result;
    return map_of(relu ? result.relu_() : result, input);
  }
  return map_of(w.scalar_type() == at::kBFloat16 ? forward<BFloat16>(rows, w, bias, added, relu)
                                                 : forward<float>(rows, w.to(at::kFloat), bias, added, relu),
                input);
}

Tensor pointwise_input_gradient(const Tensor& grad, const Tensor& weight) {
  const Unwatched guard;
  const Tensor rows = rows_of(grad), w = matrix(weight);
  if (!serves(rows, w.size(1))) {
    return map_of(at::mm(rows, w.to(rows.scalar_type())), grad);
  }
  const bool wide = w.scalar_type() != at::kBFloat16;
  return map_of(wide ? input_gradient<float>(rows, w.to(at::kFloat)) : input_gradient<BFloat16>(rows, w), grad);
}

std::tuple<Tensor, Tensor> pointwise_weight_gradient(const Tensor& grad, const Tensor& input) {
  const Unwatched guard;
  const Tensor upstream = rows_of(grad), rows = rows_of(input);
  if (serves(rows, upstream.size(1))) {
    return weight_gradient(upstream, rows);
  }
  const auto dtype = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {at::mm(upstream.t(), rows).to(dtype), upstream.sum({0}, false, dtype)};
}

} // namespace

KERNELS(CPU, m) {
  if (__builtin_cpu_supports("avx512bf16") && lacks_amx()) {
    m.impl("pointwise", TORCH_FN(pointwise));
    m.impl("pointwise_input_gradient", TORCH_FN(pointwise_input_gradient));
    m.impl("pointwise_weight_gradient", TORCH_FN(pointwise_weight_gradient));
  }
}

} // namespace maskrcnn_benchmark
#endif

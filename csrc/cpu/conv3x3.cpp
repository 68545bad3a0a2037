// 3x3 convolution of stride 1 and padding 1 by minimal filtering, F(2x2, 3x3) of Winograd as in Lavin and Gray 2016: a
// tile of 2x2 outputs takes 16 multiplications a pair of channels instead of 36. Input tiles of 4x4, weights and, for
// the weights' gradient, output tiles are transformed, 16 matrix products multiply them, and a last transform gives
// outputs or weights. All coefficients are 0, 1, -1 and 1/2, so float32 loses no digit to speak of; of bfloat16 only
// what is multiplied is rounded, sums are float32.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "product.h"

#ifdef HAS_PRODUCT
namespace maskrcnn_benchmark {
namespace {

constexpr int64_t kPoints = 16; // of a transformed tile, 4x4
constexpr int64_t kSumPoint = 5; // where transform_gradient puts the sum of a tile's outputs
constexpr int64_t kBlock = 64; // most tiles whose outputs a thread makes at a time: they stay in its second-level cache
constexpr int64_t kChunk = 256; // tiles that the weights' gradient takes at a time

// From the values of one point to those of the next: a cache line more than they are. Powers of two apart, the 16
// values that a transform writes fall into one set of the cache: the weights' gradient took up to 40% longer.
template <typename T>
constexpr int64_t apart(int64_t values) {
  return values + 64 / sizeof(T);
}

struct Grid {
  int64_t batch, channels, height, width;

  explicit Grid(const Tensor& map)
      : batch(map.size(0)), channels(map.size(1)), height(map.size(2)), width(map.size(3)) {}

  int64_t rows() const {
    return (height + 1) / 2;
  }
  int64_t columns() const {
    return (width + 1) / 2;
  }
  int64_t tiles() const {
    return batch * rows() * columns();
  }
};

AVX512_BEGIN

using Tile = std::array<std::array<Vector, 4>, 4>;

// B^T d B: of a 4x4 tile of the input.
inline void transform_input(Tile& d) {
  for (int pass = 0; pass < 2; ++pass) {
    Tile t;
    for (int j = 0; j < 4; ++j) {
      t[j][0] = d[0][j] - d[2][j];
      t[j][1] = d[1][j] + d[2][j];
      t[j][2] = d[2][j] - d[1][j];
      t[j][3] = d[1][j] - d[3][j];
    }
    d = t; // transposed: the second pass works on the other axis and turns it back
  }
}

// A dY A^T: of a 2x2 tile of the output's gradient, in the upper left corner.
inline void transform_gradient(Tile& d) {
  Tile t;
  for (int j = 0; j < 2; ++j) {
    t[j] = {d[0][j], d[0][j] + d[1][j], d[0][j] - d[1][j], -d[1][j]};
  }
  for (int j = 0; j < 4; ++j) {
    d[j] = {t[0][j], t[0][j] + t[1][j], t[0][j] - t[1][j], -t[1][j]};
  }
}

// A^T m A: the 2x2 outputs of a tile, to the upper left corner.
inline void transform_output(Tile& m) {
  Tile t;
  for (int j = 0; j < 4; ++j) {
    t[0][j] = m[0][j] + m[1][j] + m[2][j];
    t[1][j] = m[1][j] - m[2][j] - m[3][j];
  }
  for (int i = 0; i < 2; ++i) {
    m[i][0] = t[i][0] + t[i][1] + t[i][2];
    m[i][1] = t[i][1] - t[i][2] - t[i][3];
  }
}

// Where the pixels of a tile lie: size x size of them, those outside the map among zeros.
template <typename T, int size>
struct Pixels {
  std::array<T*, size * size> at;

  // first: of the tile's first pixel from that of its outputs, 0 or -1.
  Pixels(T* map, const Grid& grid, int64_t tile, int64_t first, T* outside) {
    const int64_t x = tile % grid.columns() * 2 + first, y = tile / grid.columns() % grid.rows() * 2 + first;
    T* image = map + tile / grid.columns() / grid.rows() * grid.height * grid.width * grid.channels;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        const bool exists = y + i >= 0 && y + i < grid.height && x + j >= 0 && x + j < grid.width;
        at[i * size + j] = exists ? image + ((y + i) * grid.width + x + j) * grid.channels : outside;
      }
    }
  }
};

// ---- outputs

// The transformed tiles first..first + count as rows: [kPoints, kBlock, channels]; zeros after the last.
template <typename T>
void input_rows(const T* map, const Grid& grid, int64_t first, int64_t count, const T* zeros, T* rows) {
  const int64_t stride = apart<T>(kBlock * grid.channels);
  for (int64_t row = 0; row < count; ++row) {
    if (first + row >= grid.tiles()) {
      for (int64_t point = 0; point < kPoints; ++point) {
        std::memset(rows + point * stride + row * grid.channels, 0, grid.channels * sizeof(T));
      }
      continue;
    }
    const Pixels<const T, 4> pixels(map, grid, first + row, -1, zeros);
    for (int64_t channel = 0; channel < grid.channels; channel += kLanes) {
      Tile tile;
      for (int64_t i = 0; i < kPoints; ++i) {
        tile[i / 4][i % 4] = load(pixels.at[i] + channel);
      }
      transform_input(tile);
      for (int64_t i = 0; i < kPoints; ++i) {
        store(rows + i * stride + row * grid.channels + channel, tile[i / 4][i % 4]);
      }
    }
  }
}

// Outputs of the tiles first..first + count, kColumns channels of them, from [kPoints, kBlock, kColumns] products;
// at least `least`: 0 for a ReLU, or -infinity.
template <typename T>
void write_outputs(
    const float* products,
    const Grid& grid,
    int64_t first,
    int64_t count,
    const float* bias,
    float least,
    T* map,
    T* outside) {
  for (int64_t row = 0; row < std::min(count, grid.tiles() - first); ++row) {
    const Pixels<T, 2> pixels(map, grid, first + row, 0, outside);
    for (int64_t channel = 0; channel < kColumns; channel += kLanes) {
      Tile tile;
      for (int64_t i = 0; i < kPoints; ++i) {
        tile[i / 4][i % 4] = load(products + i * apart<float>(kBlock * kColumns) + row * kColumns + channel);
      }
      transform_output(tile);
      const Vector added = load(bias + channel);
      for (int64_t i = 0; i < 4; ++i) {
        T* to = pixels.at[i] + (pixels.at[i] == outside ? 0 : channel);
        store(to, at_least(least, tile[i / 2][i % 2] + added));
      }
    }
  }
}

// Tiles first..first + count of all outputs, a multiple of kRows. weights: words [outputs / kColumns, kPoints, inputs / packed, kColumns].
template <typename T>
void convolve_block(
    const T* input,
    const Grid& in,
    const T* weights,
    const float* bias,
    float least,
    T* output,
    const Grid& out,
    int64_t first,
    int64_t count,
    const T* zeros,
    T* rows,
    float* products) {
  T outside[kLanes];
  const int64_t depth = in.channels / kPacked<T>;
  input_rows(input, in, first, count, zeros, rows);
  for (int64_t column = 0; column < out.channels; column += kColumns) {
    const T* panel = weights + column / kColumns * kPoints * apart<T>(in.channels * kColumns);
    for (int64_t point = 0; point < kPoints; ++point, panel += apart<T>(in.channels * kColumns)) {
      for (int64_t row = 0; row < count; row += kRows) {
        product<T, false>(
            rows + point * apart<T>(kBlock * in.channels) + row * in.channels, depth, 1, panel, kColumns, depth,
            products + point * apart<float>(kBlock * kColumns) + row * kColumns, kColumns);
      }
    }
    write_outputs(products, out, first, count, bias + column, least, output + column, outside);
  }
}

// G g G^T of kLanes kernels, whose taps lie `apart` values from one another. flip: the taps in reverse.
inline Tile transform_taps(const float* taps, int64_t apart, bool flip) {
  const Vector half = _mm512_set1_ps(0.5f);
  Vector t[4][3];
  for (int64_t j = 0; j < 3; ++j) {
    Vector g[3];
    for (int64_t i = 0; i < 3; ++i) {
      g[i] = load(taps + (flip ? 8 - (3 * i + j) : 3 * i + j) * apart);
    }
    const Vector outer = half * (g[0] + g[2]), inner = half * g[1];
    t[0][j] = g[0], t[1][j] = outer + inner, t[2][j] = outer - inner, t[3][j] = g[2];
  }
  Tile tile;
  for (int64_t i = 0; i < 4; ++i) {
    const Vector outer = half * (t[i][0] + t[i][2]), inner = half * t[i][1];
    tile[i] = {t[i][0], outer + inner, outer - inner, t[i][2]};
  }
  return tile;
}

// Of weights [outputs, 3, 3, inputs], outputs begin..end, a multiple of kLanes, as convolve_block wants them.
// rows: [kPoints, kLanes, inputs / packed] words, the transformed weights before they are transposed: read as they lie,
// in place of a copy in another order, 256 x 256 kernels in bfloat16 take two threads .5 ms instead of 1.5.
template <typename T>
void transform_weights(
    const float* weights, int64_t inputs, int64_t outputs, T* words, int64_t begin, int64_t end, T* rows) {
  const int64_t row = apart<T>(inputs), point = kLanes * row;
  for (int64_t output = begin; output < end; output += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float* taps = weights + (output + lane) * 9 * inputs;
      for (int64_t input = 0; input < inputs; input += kPacked<T> * kLanes) {
        const Tile low = transform_taps(taps + input, inputs, false);
        const Tile high = transform_taps(taps + input + (kPacked<T> - 1) * kLanes, inputs, false);
        for (int64_t i = 0; i < kPoints; ++i) {
          _mm512_storeu_si512(
              rows + i * point + lane * row + input, join_words(T(), low[i / 4][i % 4], high[i / 4][i % 4]));
        }
      }
    }
    T* panel = words + output / kColumns * kPoints * apart<T>(inputs * kColumns) + output % kColumns * kPacked<T>;
    for (int64_t i = 0; i < kPoints; ++i, panel += apart<T>(inputs * kColumns)) {
      for (int64_t input = 0; input < inputs; input += kPacked<T> * kLanes) {
        __m512i square[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          square[lane] = _mm512_loadu_si512(rows + i * point + lane * row + input);
        }
        transpose(square);
        for (int64_t k = 0; k < kLanes; ++k) {
          _mm512_storeu_si512(panel + (input + k * kPacked<T>) * kColumns, square[k]);
        }
      }
    }
  }
}

// Of the kernels that lead back from outputs to inputs: flipped, of weights [inputs, 3, 3, outputs], inputs begin..end.
template <typename T>
void transform_flipped(const float* weights, int64_t inputs, int64_t outputs, T* words, int64_t begin, int64_t end) {
  for (int64_t input = begin; input < end; input += kPacked<T>) {
    for (int64_t output = 0; output < outputs; output += kLanes) {
      const float* taps = weights + input * 9 * outputs + output;
      const Tile low = transform_taps(taps, outputs, true);
      const Tile high = transform_taps(taps + (kPacked<T> - 1) * 9 * outputs, outputs, true);
      T* to = words + output / kColumns * kPoints * apart<T>(inputs * kColumns) + input * kColumns +
          output % kColumns * kPacked<T>;
      for (int64_t i = 0; i < kPoints; ++i) {
        store_words(to + i * apart<T>(inputs * kColumns), low[i / 4][i % 4], high[i / 4][i % 4]);
      }
    }
  }
}

// ---- the weights' gradient

// Transformed tiles as words, the factors of products that sum over tiles: [kPoints, channels / kColumns,
// kChunk / packed, kColumns]. chunk: the first tile; begin, end: which of the chunk are made, zeros after the last.
// size: 4 for the input, 2 for the output's gradient.
template <typename T, int size>
void tile_words(const T* map, const Grid& grid, int64_t chunk, int64_t begin, int64_t end, const T* zeros, T* words) {
  for (int64_t place = begin; place < end; place += kPacked<T>) {
    std::array<std::array<const T*, size * size>, kPacked<T>> pixels;
    for (int64_t part = 0; part < kPacked<T>; ++part) {
      const int64_t tile = chunk + place + part;
      if (tile < grid.tiles()) {
        pixels[part] = Pixels<const T, size>(map, grid, tile, size == 4 ? -1 : 0, zeros).at;
      } else {
        pixels[part].fill(zeros);
      }
    }
    for (int64_t channel = 0; channel < grid.channels; channel += kLanes) {
      Tile tiles[kPacked<T>];
      for (int64_t part = 0; part < kPacked<T>; ++part) {
        for (int64_t i = 0; i < size * size; ++i) {
          tiles[part][i / size][i % size] = load(pixels[part][i] + channel);
        }
        if constexpr (size == 4) {
          transform_input(tiles[part]);
        } else {
          transform_gradient(tiles[part]);
        }
      }
      T* to = words + channel / kColumns * kColumns * kChunk + place * kColumns + channel % kColumns * kPacked<T>;
      for (int64_t i = 0; i < kPoints; ++i) {
        store_words(
            to + i * apart<T>(grid.channels * kChunk), tiles[0][i / 4][i % 4], tiles[kPacked<T> - 1][i / 4][i % 4]);
      }
    }
  }
}

// sums [outputs, inputs] of one point += gradients^T inputs, kColumns outputs of them. depth: words of each panel.
template <typename T>
void add_products(const T* gradients, const T* inputs, int64_t input_count, int64_t depth, float* sums) {
  for (int64_t input = 0; input < input_count; input += kColumns) {
    for (int64_t row = 0; row < kColumns; row += kRows) {
      product<T, true>(
          gradients + row * kPacked<T>, 1, kColumns, inputs + input * kChunk, kColumns, depth,
          sums + row * input_count + input, input_count);
    }
  }
}

// G^T m G of sums [kPoints, outputs, inputs]: the gradient [outputs, 3, 3, inputs], outputs begin..end of it.
void transform_sums(const float* sums, int64_t outputs, int64_t inputs, int64_t begin, int64_t end, float* weights) {
  const Vector half = _mm512_set1_ps(0.5f);
  for (int64_t output = begin; output < end; ++output) {
    for (int64_t input = 0; input < inputs; input += kLanes) {
      Vector t[3][4];
      for (int64_t j = 0; j < 4; ++j) {
        Vector m[4];
        for (int64_t i = 0; i < 4; ++i) {
          m[i] = load(sums + ((4 * i + j) * outputs + output) * inputs + input);
        }
        const Vector middle = half * (m[1] + m[2]);
        t[0][j] = m[0] + middle, t[1][j] = half * (m[1] - m[2]), t[2][j] = middle + m[3];
      }
      float* to = weights + output * 9 * inputs + input;
      for (int64_t i = 0; i < 3; ++i) {
        const Vector middle = half * (t[i][1] + t[i][2]);
        store(to + 3 * i * inputs, t[i][0] + middle);
        store(to + (3 * i + 1) * inputs, half * (t[i][1] - t[i][2]));
        store(to + (3 * i + 2) * inputs, middle + t[i][3]);
      }
    }
  }
}

AVX512_END

// ---- the operators

// weight: [K, 3, 3, C] float32 and contiguous; input channels-last, of C channels, or with `back` of K.
template <typename T>
Tensor convolve(const Tensor& input, const Tensor& weight, bool back, const std::optional<Tensor>& bias, bool relu) {
  const Grid in(input);
  const float least = relu ? 0 : -INFINITY;
  const int64_t outputs = weight.size(back ? 3 : 0);
  const Tensor output =
      at::empty({in.batch, outputs, in.height, in.width}, input.options(), at::MemoryFormat::ChannelsLast);
  const Grid out(output);
  const auto words = scratch<T>(outputs / kColumns * kPoints * apart<T>(in.channels * kColumns));
  const float* values = weight.const_data_ptr<float>();
  if (back) {
    at::parallel_for(0, in.channels / kPacked<T>, 8, [&](int64_t begin, int64_t end) {
      transform_flipped<T>(values, in.channels, outputs, words.get(), begin * kPacked<T>, end * kPacked<T>);
    });
  } else {
    at::parallel_for(0, outputs / kLanes, 1, [&](int64_t begin, int64_t end) {
      const auto rows = scratch<T>(kPoints * kLanes * apart<T>(in.channels));
      transform_weights<T>(values, in.channels, outputs, words.get(), begin * kLanes, end * kLanes, rows.get());
    });
  }
  const Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::zeros({outputs}, weight.options());
  const int64_t block = rows_at_a_time(in.tiles(), kBlock);
  at::parallel_for(0, divide_up(in.tiles(), block), 1, [&](int64_t begin, int64_t end) {
    const auto rows = scratch<T>(kPoints * apart<T>(kBlock * in.channels));
    const auto products = scratch<float>(kPoints * apart<float>(kBlock * kColumns));
    const std::vector<T> zeros(in.channels, T(0));
    for (int64_t number = begin; number < end; ++number) {
      convolve_block<T>(
          input.const_data_ptr<T>(), in, words.get(), added.const_data_ptr<float>(), least, output.mutable_data_ptr<T>(),
          out, number * block, block, zeros.data(), rows.get(), products.get());
    }
  });
  return output;
}

// The gradients of the weights, float32 [outputs, 3, 3, inputs], and of the bias. A sum has one owner, whatever the
// number of threads.
template <typename T>
std::tuple<Tensor, Tensor> weights_gradient(const Tensor& grad, const Tensor& input) {
  const Grid in(input), out(grad);
  const int64_t input_stride = apart<T>(in.channels * kChunk), gradient_stride = apart<T>(out.channels * kChunk);
  const auto inputs = scratch<T>(kPoints * input_stride), gradients = scratch<T>(kPoints * gradient_stride);
  const Tensor sums = at::zeros({kPoints, out.channels, in.channels}, input.options().dtype(at::kFloat));
  const Tensor bias = at::zeros({out.channels}, sums.options());
  const std::vector<T> zeros(std::max(in.channels, out.channels), T(0));
  const int64_t panels = out.channels / kColumns;
  for (int64_t chunk = 0; chunk < in.tiles(); chunk += kChunk) {
    const int64_t depth = (std::min(kChunk, in.tiles() - chunk) + kPacked<T> - 1) / kPacked<T>;
    at::parallel_for(0, depth, 4, [&](int64_t begin, int64_t end) {
      begin *= kPacked<T>, end *= kPacked<T>;
      tile_words<T, 4>(input.const_data_ptr<T>(), in, chunk, begin, end, zeros.data(), inputs.get());
      tile_words<T, 2>(grad.const_data_ptr<T>(), out, chunk, begin, end, zeros.data(), gradients.get());
    });
    at::parallel_for(0, kPoints * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t point = task / panels, output = task % panels * kColumns;
        const T* gradient = gradients.get() + point * gradient_stride + output * kChunk;
        add_products<T>(
            gradient, inputs.get() + point * input_stride, in.channels, depth,
            sums.mutable_data_ptr<float>() + (point * out.channels + output) * in.channels);
        if (point == kSumPoint) {
          add_columns(gradient, depth, bias.mutable_data_ptr<float>() + output);
        }
      }
    });
  }
  const Tensor result = at::empty({out.channels, 3, 3, in.channels}, sums.options());
  at::parallel_for(0, out.channels, 1, [&](int64_t begin, int64_t end) {
    transform_sums(
        sums.const_data_ptr<float>(), out.channels, in.channels, begin, end, result.mutable_data_ptr<float>());
  });
  return {result, bias};
}

// Whether this is faster than torch's convolution. Of few tiles it is not, for the weights'
// transform: at 40 tiles of 256 channels in bfloat16 .81 ms to .56, at 70 .96 to .92 (of 512 channels 3.0 to 3.9),
// at 280 2.1 to 3.5. Where AMX multiplies bfloat16,
// the transforms alone would take longer than a direct convolution.
bool serves(const Tensor& input, int64_t outputs) {
  constexpr int64_t kLeastTiles = 64;
  const bool narrow = input.scalar_type() == at::kBFloat16 && lacks_amx();
  return (narrow || input.scalar_type() == at::kFloat) && input.size(1) % kColumns == 0 && outputs % kColumns == 0 &&
      Grid(input).tiles() >= kLeastTiles;
}

Tensor channels_last(const Tensor& map) {
  return map.contiguous(at::MemoryFormat::ChannelsLast);
}

// weight: [K, C, 3, 3], in any order of memory. back: from a map of K channels to one of C, its gradient.
Tensor convolve(
    const Tensor& input, const Tensor& weight, bool back, const std::optional<Tensor>& bias, bool relu) {
  const Tensor x = channels_last(input), w = weight.to(at::kFloat).permute({0, 2, 3, 1}).contiguous();
  return x.scalar_type() == at::kFloat ? convolve<float>(x, w, back, bias, relu)
                                       : convolve<BFloat16>(x, w, back, bias, relu);
}

std::tuple<Tensor, Tensor, Tensor> direct_gradients(
    const Tensor& grad, const Tensor& input, const Tensor& weight, std::array<bool, 3> mask) {
  return at::convolution_backward(
      grad, input, weight.to(grad.scalar_type()), std::nullopt, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, 1, mask);
}

// What torch asks for its shape and memory format alone.
Tensor unread(at::IntArrayRef shape, const Tensor& like) {
  return at::empty(shape, like.options(), at::MemoryFormat::ChannelsLast);
}

Tensor conv3x3(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  if (serves(input, weight.size(0))) {
    return convolve(input, weight, false, bias, relu);
  }
  if (input.numel() == 0) { // torch's result would be a view, which no in-place ReLU may follow
    return unread({input.size(0), weight.size(0), input.size(2), input.size(3)}, input);
  }
  const auto b = bias ? std::optional(bias->to(input.scalar_type())) : std::nullopt;
  const Tensor result = channels_last(
      at::convolution(input, weight.to(input.scalar_type()), b, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, 1));
  return relu ? at::relu(result) : result;
}

Tensor conv3x3_input_gradient(const Tensor& grad, const Tensor& weight) {
  if (serves(grad, weight.size(1))) {
    return convolve(grad, weight, true, std::nullopt, false);
  }
  const Tensor input = unread({grad.size(0), weight.size(1), grad.size(2), grad.size(3)}, grad);
  return channels_last(std::get<0>(direct_gradients(grad, input, weight, {true, false, false})));
}

std::tuple<Tensor, Tensor> conv3x3_weight_gradient(const Tensor& grad, const Tensor& input) {
  if (serves(input, grad.size(1))) {
    const Tensor upstream = channels_last(grad), x = channels_last(input);
    const bool narrow = x.scalar_type() == at::kBFloat16;
    const auto [weight, bias] = narrow ? weights_gradient<BFloat16>(upstream, x) : weights_gradient<float>(upstream, x);
    return {weight.permute({0, 3, 1, 2}), bias};
  }
  const Tensor weight = unread({grad.size(1), input.size(1), 3, 3}, grad);
  const Tensor result = std::get<1>(direct_gradients(grad, input, weight, {false, true, false}));
  const auto dtype = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {channels_last(result.to(dtype)), grad.sum({0, 2, 3}, false, dtype)};
}

} // namespace

KERNELS(CPU, m) {
  if (__builtin_cpu_supports("avx512bf16")) {
    m.impl("conv3x3", TORCH_FN(conv3x3));
    m.impl("conv3x3_input_gradient", TORCH_FN(conv3x3_input_gradient));
    m.impl("conv3x3_weight_gradient", TORCH_FN(conv3x3_weight_gradient));
  }
}

} // namespace maskrcnn_benchmark
#endif

// The sigmoid focal loss in one pass over the logits: everything as if background, then the one own class of each row.
#include <ATen/ops/empty.h>
#include <c10/util/bit_cast.h>

#include <algorithm>
#include <type_traits>

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

// Logits worked on at a time: their losses stay in the first-level cache until the rows are summed.
constexpr int64_t kBlock = 2048;

// exp(-a) and log(1 + a) out of plain arithmetic, so that loops over them become vector instructions; libm's functions
// would be called for one number at a time. Both are good to about 1e-7 of the result.
//
// a >= 0. exp(-a) = 2^-n exp(r) with n whole and |r| <= ln 2 / 2, exp(r) by its Taylor series. The sum with 1.5 * 2^23
// rounds to a whole number and leaves it in the low bits; there is no conversion that a NaN could upset.
C10_ALWAYS_INLINE float exp_minus(float a) {
  constexpr float kRound = 12582912.0f, kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  a = smaller(87.0f, a); // beyond that the result is denormal; a NaN stays
  const float rounded = a * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (n * kLn2High - a) + n * kLn2Low;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const uint32_t power = (c10::bit_cast<uint32_t>(kRound) + 127u - c10::bit_cast<uint32_t>(rounded)) << 23;
  return series * c10::bit_cast<float>(power);
}

// 0 <= a <= 1. log(1 + a) = 2 artanh(z), z = a / (2 + a) <= 1 / 3, by its Taylor series.
C10_ALWAYS_INLINE float log_one_plus(float a) {
  const float z = a / (2.0f + a), square = z * z;
  float series = 1.0f / 15;
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  return 2.0f * (z + z * square * series);
}

inline double exp_minus(double a) {
  return std::exp(-a);
}

inline double log_one_plus(double a) {
  return std::log1p(a);
}

// Loss and slope of one class, from y, the logit of being wrong: wrong^gamma * -log(1 - wrong).
template <typename T>
struct Term {
  T wrong; // sigmoid(y)
  T power; // wrong^gamma
  T surprise; // softplus(y)

  C10_ALWAYS_INLINE Term(T y, T gamma) {
    const T e = exp_minus(y < 0 ? -y : y);
    const T log = log_one_plus(e);
    wrong = (y < 0 ? e : T(1)) / (1 + e);
    surprise = at_least_zero(y) + log;
    // log(wrong) = -(log - min(y, 0)), bounded so that 0 * infinity does not arise for gamma = 0.
    power = gamma == 2 ? wrong * wrong : exp_minus(gamma * smaller(log - (y < 0 ? y : T(0)), T(1e6)));
  }

  T loss() const {
    return power * surprise;
  }

  T slope(T gamma) const {
    return power * (gamma * (1 - wrong) * surprise + wrong);
  }
};

template <typename F, typename T>
MULTIVERSION void background_losses(
    const F* __restrict__ logits,
    int64_t count,
    T gamma,
    T weight,
    T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = weight * Term<T>(static_cast<T>(logits[i]), gamma).loss();
  }
}

template <typename F, typename T>
MULTIVERSION void background_slopes(
    const F* __restrict__ logits,
    int64_t count,
    T gamma,
    T weight,
    T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = weight * Term<T>(static_cast<T>(logits[i]), gamma).slope(gamma);
  }
}

template <typename T>
MULTIVERSION T sum(const T* values, int64_t count) {
  T total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    total += values[i];
  }
  return total;
}

template <typename F, typename T>
MULTIVERSION void scale(const T* __restrict__ values, int64_t count, T factor, F* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<F>(factor * values[i]);
  }
}

// Calls rows(first, last, buffer) for blocks of rows, with room in the buffer for a block's logits.
template <typename T, typename Rows>
void for_blocks(int64_t count, int64_t classes, const Rows& rows) {
  const int64_t block = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, classes));
  at::parallel_for(0, at::divup(count, block), 4, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(block * classes);
    for (int64_t i = begin; i < end; ++i) {
      rows(i * block, std::min((i + 1) * block, count), buffer.data());
    }
  });
}

at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor sigmoid_focal_loss(const Tensor& logits, const Tensor& labels, double gamma, double alpha) {
  const int64_t classes = logits.size(1);
  const Tensor x = logits.contiguous(), l = labels.contiguous();
  Tensor losses = at::empty({x.size(0)}, x.options().dtype(compute_type(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sigmoid_focal_loss", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const scalar_t* values = x.const_data_ptr<scalar_t>();
    const int64_t* own = l.const_data_ptr<int64_t>();
    T* out = losses.mutable_data_ptr<T>();
    const T g = gamma, a = alpha;
    for_blocks<T>(x.size(0), classes, [&](int64_t first, int64_t last, T* buffer) {
      background_losses(values + first * classes, (last - first) * classes, g, 1 - a, buffer);
      for (int64_t row = first; row < last; ++row) {
        T* losses_of_row = buffer + (row - first) * classes;
        const int64_t label = own[row];
        if (label > 0 && label <= classes) {
          const T logit = values[row * classes + label - 1];
          losses_of_row[label - 1] = a * Term<T>(-logit, g).loss();
        }
        out[row] = label < 0 ? T(0) : sum(losses_of_row, classes);
      }
    });
  });
  return losses;
}

Tensor sigmoid_focal_loss_backward(
    const Tensor& grad,
    const Tensor& logits,
    const Tensor& labels,
    double gamma,
    double alpha) {
  const int64_t classes = logits.size(1);
  const Tensor x = logits.contiguous(), l = labels.contiguous();
  const Tensor upstream = grad.to(compute_type(x.scalar_type())).contiguous();
  Tensor grads = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sigmoid_focal_loss_backward", [&] {
    using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const scalar_t* values = x.const_data_ptr<scalar_t>();
    const int64_t* own = l.const_data_ptr<int64_t>();
    const T* factors = upstream.const_data_ptr<T>();
    scalar_t* out = grads.mutable_data_ptr<scalar_t>();
    const T g = gamma, a = alpha;
    for_blocks<T>(x.size(0), classes, [&](int64_t first, int64_t last, T* buffer) {
      background_slopes(values + first * classes, (last - first) * classes, g, 1 - a, buffer);
      for (int64_t row = first; row < last; ++row) {
        T* slopes = buffer + (row - first) * classes;
        scalar_t* out_row = out + row * classes;
        const int64_t label = own[row];
        if (label < 0) {
          std::fill_n(out_row, classes, scalar_t(0));
          continue;
        }
        if (label > 0 && label <= classes) {
          const T logit = values[row * classes + label - 1];
          slopes[label - 1] = -a * Term<T>(-logit, g).slope(g);
        }
        scale(slopes, classes, factors[row], out_row);
      }
    });
  });
  return grads;
}

} // namespace

KERNELS(CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_FN(sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_FN(sigmoid_focal_loss_backward));
}

} // namespace maskrcnn_benchmark

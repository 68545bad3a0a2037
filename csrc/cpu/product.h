// Blocks of matrix products with AVX-512, float32 or bfloat16 with float32 sums: what conv3x3.cpp and pointwise.cpp are
// made of. Only for files whose kernels are registered where the processor has these instructions.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAS_PRODUCT
#include <immintrin.h>

#include <cstdlib>
#include <memory>

#include "../common.h"

// Between the two no template of the standard library is made for the first time: the linker might give its AVX-512
// code to the other files, and to processors that cannot run it.
#define AVX512_BEGIN      \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma\")")
#define AVX512_END _Pragma("GCC pop_options")

namespace maskrcnn_benchmark {
namespace {

using at::BFloat16;

constexpr int64_t kLanes = 16; // float32 values of a vector
constexpr int64_t kColumns = 2 * kLanes; // of a product that are made at a time, by kRows rows: 16 vectors of sums
constexpr int64_t kRows = 8;

// Values that one 32-bit word of a product's factors holds: two bfloat16 are multiplied by one instruction.
template <typename T>
constexpr int64_t kPacked = 4 / sizeof(T);

// Aligned to a cache line, not initialised.
template <typename T>
std::unique_ptr<T[], decltype(&std::free)> scratch(int64_t size) {
  const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
  T* values = static_cast<T*>(std::aligned_alloc(64, bytes));
  TORCH_CHECK(values != nullptr, "no memory for ", bytes, " bytes of a convolution's or product's factors");
  return {values, &std::free};
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Of a product's rows that a thread makes: at most `most`, a multiple of kRows, so that all threads make as many.
inline int64_t rows_at_a_time(int64_t count, int64_t most) {
  const int64_t threads = at::get_num_threads();
  return divide_up(divide_up(count, threads * divide_up(count, threads * most)), kRows) * kRows;
}

// Where AMX multiplies bfloat16, torch's products are faster than these instructions can be.
inline bool lacks_amx() {
  return !__builtin_cpu_supports("amx-bf16");
}

AVX512_BEGIN

using Vector = __m512;

inline Vector load(const float* from) {
  return _mm512_loadu_ps(from);
}

inline Vector load(const BFloat16* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void store(float* to, Vector values) {
  _mm512_storeu_ps(to, values);
}

inline void store(BFloat16* to, Vector values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

// Words for a product's factor: a value of `low` each, with bfloat16 a value of `high` in the upper half.
inline void store_words(float* to, Vector low, Vector) {
  _mm512_storeu_ps(to, low);
}

inline void store_words(BFloat16* to, Vector low, Vector high) {
  const __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
  const __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
  _mm512_storeu_si512(to, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
}

// Of a factor's consecutive values as its words: kPacked x kLanes values in two vectors, or one.
inline __m512i join_words(float, Vector low, Vector) {
  return _mm512_castps_si512(low);
}

inline __m512i join_words(BFloat16, Vector low, Vector high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 rows of 16 words: the first word of each to the first row, and so on.
inline void transpose(__m512i (&rows)[kLanes]) {
  __m512i quads[kLanes]; // of each four rows: a quarter of quads[4 i + j] is column j of that quarter of the rows
  for (int64_t i = 0; i < kLanes; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    quads[i] = _mm512_unpacklo_epi64(a, c), quads[i + 1] = _mm512_unpackhi_epi64(a, c);
    quads[i + 2] = _mm512_unpacklo_epi64(b, d), quads[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  constexpr int even = 0x88, odd = 0xdd; // quarters of two vectors
  for (int64_t j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(quads[j], quads[4 + j], even);
    const __m512i b = _mm512_shuffle_i32x4(quads[j], quads[4 + j], odd);
    const __m512i c = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], even);
    const __m512i d = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], odd);
    rows[j] = _mm512_shuffle_i32x4(a, c, even), rows[8 + j] = _mm512_shuffle_i32x4(a, c, odd);
    rows[4 + j] = _mm512_shuffle_i32x4(b, d, even), rows[12 + j] = _mm512_shuffle_i32x4(b, d, odd);
  }
}

inline Vector multiply_add(float, const float* word, Vector b, Vector sum) {
  return _mm512_fmadd_ps(_mm512_set1_ps(*word), b, sum);
}

inline Vector multiply_add(BFloat16, const float* word, Vector b, Vector sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(*word), (__m512bh)b);
}

// kRows x kColumns of a product: c[i][j] = sum over k of a[i][k] b[k][j], to c or added to it. Factors are words.
template <typename T, bool add>
inline void product(
    const T* a_values,
    int64_t a_row,
    int64_t a_step,
    const T* b_values,
    int64_t b_step,
    int64_t depth,
    float* c,
    int64_t c_row) {
  const float* a = reinterpret_cast<const float*>(a_values);
  const float* b = reinterpret_cast<const float*>(b_values);
  Vector sums[kRows][2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
    sums[i][0] = add ? _mm512_loadu_ps(c + i * c_row) : _mm512_setzero_ps();
    sums[i][1] = add ? _mm512_loadu_ps(c + i * c_row + kLanes) : _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    const Vector b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      sums[i][0] = multiply_add(T(), a + i * a_row, b0, sums[i][0]);
      sums[i][1] = multiply_add(T(), a + i * a_row, b1, sums[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
    _mm512_storeu_ps(c + i * c_row, sums[i][0]);
    _mm512_storeu_ps(c + i * c_row + kLanes, sums[i][1]);
  }
}

// sums [kColumns] += the columns of a factor, words [depth, kColumns].
inline void add_columns(const float* words, int64_t depth, float* sums) {
  for (int64_t part = 0; part < kColumns; part += kLanes) {
    Vector sum = load(sums + part);
    for (int64_t k = 0; k < depth; ++k) {
      sum += load(words + k * kColumns + part);
    }
    store(sums + part, sum);
  }
}

inline void add_columns(const BFloat16* words, int64_t depth, float* sums) {
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t part = 0; part < kColumns; part += kLanes) {
    Vector low = load(sums + part), high = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; ++k) {
      const __m512i pair = _mm512_loadu_si512(words + 2 * (k * kColumns + part));
      low += _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      high += _mm512_castsi512_ps(_mm512_and_si512(pair, upper_half));
    }
    store(sums + part, low + high);
  }
}

// A ReLU (least = 0) lets NaN through, as torch's does.
inline Vector at_least(float least, Vector values) {
  return _mm512_max_ps(_mm512_set1_ps(least), values);
}

AVX512_END

} // namespace
} // namespace maskrcnn_benchmark
#endif

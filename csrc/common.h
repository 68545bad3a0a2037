// Shared by the kernels of all devices' host code: includes, checks, and the geometry that more than one file needs.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

// One function compiled for several x86 instruction sets, chosen when it is loaded: wheels stay portable without
// giving up wide vectors. Templates may carry it; GCC on Linux only.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MULTIVERSION
#endif

namespace maskrcnn_benchmark {

using at::Tensor;

// What values of type T are computed in: half precision in float32.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A device's kernels of one source file, for extension.cpp to register.
struct Kernels {
  c10::DispatchKey key;
  void (*add)(torch::Library&);
};

inline std::vector<Kernels>& all_kernels() {
  static std::vector<Kernels> kernels;
  return kernels;
}

// What a source file ends in: `KERNELS(CPU, m) { m.impl("nms", TORCH_FN(nms)); }`. Not TORCH_LIBRARY_IMPL, which
// registers while the library is loaded: where a schema has changed since it was built, that ends the process.
#define KERNELS(device, library)                                                                               \
  static void add_kernels(torch::Library&);                                                                    \
  [[maybe_unused]] static const bool kListed =                                                                 \
      (::maskrcnn_benchmark::all_kernels().push_back({c10::DispatchKey::device, add_kernels}), true);          \
  static void add_kernels(torch::Library& library)

// Asks for pages of 2 MB under a large new result that all threads fill from the start. A fresh 180 MB gradient costs
// 45,000 faults of 4 kB pages, half of RoIAlign's backward (33 and 62 ms); where the kernel does not grant them nothing
// changes. Not for blocks below 32 MB, which device/cpu.py lets glibc keep, nor for pooled boxes, where it took twice
// as long as the small pages (50 to 70 ms, 27 to 31 ms).
inline Tensor with_huge_pages(Tensor result) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + result.nbytes()) / page * page;
  if (result.nbytes() >= 32 << 20 && begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return result;
}

// min, max and clamps are spelled as comparisons so that a NaN among the coordinates ends in a NaN area, as it does in
// the composites, and so that compilers turn them into single vector instructions.
template <typename T>
C10_HOST_DEVICE inline T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
C10_HOST_DEVICE inline T larger(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
C10_HOST_DEVICE inline T at_least_zero(T value) {
  return value < 0 ? T(0) : value;
}

template <typename T>
struct Box {
  T x1, y1, x2, y2;

  C10_HOST_DEVICE T area() const {
    return at_least_zero(x2 - x1) * at_least_zero(y2 - y1);
  }
};

// Rounding must be that of the composites, operation by operation: results are compared with == there.
template <typename T>
C10_HOST_DEVICE inline T intersection(const Box<T>& a, const Box<T>& b) {
  const T width = smaller(a.x2, b.x2) - larger(a.x1, b.x1);
  const T height = smaller(a.y2, b.y2) - larger(a.y1, b.y1);
  return at_least_zero(width) * at_least_zero(height);
}

// N boxes as five arrays, so that one box is compared with many by vector instructions. Unused places hold NaN, which
// overlaps nothing.
template <typename T>
struct BoxArray {
  std::vector<T> x1, y1, x2, y2, area;

  explicit BoxArray(int64_t size) : x1(size, T(NAN)), y1(x1), x2(x1), y2(x1), area(x1) {}

  void set(int64_t place, const Box<T>& box) {
    x1[place] = box.x1;
    y1[place] = box.y1;
    x2[place] = box.x2;
    y2[place] = box.y2;
    area[place] = box.area();
  }
};

} // namespace maskrcnn_benchmark

// Runs CUDA kernels on the CPU, so that csrc/cuda/*.cu can be tested without a GPU:
//
//   g++ -x c++ -include test/cuda_emulator/emulator.h -I test/cuda_emulator ... csrc/cuda/nms.cu
//
// compiles the very sources that nvcc compiles. Their KERNELS(CUDA, ...) registers for the CPU.
// Blocks run one after another, the threads of a block take turns: each is a fiber that runs until it has to wait for
// others at a barrier or in a warp collective. CUDA_EMULATOR_ORDER = forward, reverse or random is the order in which
// blocks and threads get their turns: a kernel that lacks a barrier, or counts on an order of blocks, does not give the
// same result in all of them. A barrier that some thread never reaches is an error. Static shared memory and tensors
// are guarded by AddressSanitizer when it is on, dynamic shared memory is then a heap block of the very size asked for.
//
// What it cannot show: races between threads that run in turns here, memory order, alignment on other hardware, speed.
#ifndef CUDA_EMULATOR // not `#pragma once`, which precompiling warns of
#define CUDA_EMULATOR

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../csrc/common.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#undef KERNELS
#define KERNELS(device, module) _TORCH_LIBRARY_IMPL(maskrcnn_benchmark, CPU, module, C10_UID)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, module) _TORCH_LIBRARY_IMPL(library, CPU, module, C10_UID)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
  unsigned int x = 0, y = 0, z = 0;
};

struct uint2 {
  unsigned int x, y;
};

struct uint4 {
  unsigned int x, y, z, w;
};

struct dim3 {
  unsigned int x, y, z;

  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr size_t kStackBytes = 256 << 10;

struct Context {
  ucontext_t context{};
  const void* stack = nullptr;
  size_t size = 0;
};

inline void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.size);
#endif
  swapcontext(&from.context, &to.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

struct Fiber : Context {
  std::unique_ptr<char[]> memory{new char[kStackBytes]};
  unsigned int thread = 0;
  std::function<bool()> ready; // empty: not waiting
};

// Threads that wait for each other, each bringing a value. Those of one round are read while the next one gathers.
struct Meeting {
  std::map<unsigned int, uint64_t> values[2];
  uint64_t round = 0;

  const std::map<unsigned int, uint64_t>& last(uint64_t of_round) const {
    return values[of_round % 2];
  }
};

// The threads of one block after another.
class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(grid.y <= 65535 && grid.z <= 65535, "CUDA emulator: the grid is too large");
    TORCH_CHECK(block.x * block.y * block.z <= 1024 && block.z <= 64, "CUDA emulator: the block is too large");
    TORCH_CHECK(shared_bytes <= 48 << 10, "CUDA emulator: more than 48 KiB of dynamic shared memory");
    kernel_ = &kernel;
    gridDim = grid;
    blockDim = block;
    for (uint64_t number : order(uint64_t{grid.x} * grid.y * grid.z)) {
      blockIdx.x = number % grid.x;
      blockIdx.y = number / grid.x % grid.y;
      blockIdx.z = number / grid.x / grid.y;
      run_block(block.x * block.y * block.z, shared_bytes);
    }
  }

  void* shared_memory() {
    return shared_.get();
  }

  unsigned int lane() const {
    return fiber_->thread % warpSize;
  }

  // Waits for all threads of the block that have not ended; returns their values by thread.
  const std::map<unsigned int, uint64_t>& meet_block(uint64_t value) {
    return meet(block_meeting_, fiber_->thread, value, [this] { return block_meeting_is_complete(); });
  }

  // The same among the lanes of the warp that the mask names, by lane.
  const std::map<unsigned int, uint64_t>& meet_warp(unsigned int mask, uint64_t value) {
    TORCH_CHECK(mask >> lane() & 1, "CUDA emulator: a lane calls a warp collective with a mask that leaves it out");
    const unsigned int warp = fiber_->thread / warpSize;
    Meeting& meeting = warp_meetings_[{warp, mask}];
    return meet(meeting, lane(), value, [this, &meeting, warp, mask] {
      const auto& present = meeting.values[meeting.round % 2];
      for (unsigned int lane = 0; lane < warpSize; ++lane) {
        if ((mask >> lane & 1) && is_running(warp * warpSize + lane) && present.count(lane) == 0) {
          return false;
        }
      }
      return true;
    });
  }

 private:
  static std::vector<uint64_t> order(uint64_t count) {
    std::vector<uint64_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    const char* name = std::getenv("CUDA_EMULATOR_ORDER");
    const std::string order = name ? name : "forward";
    if (order == "reverse") {
      std::reverse(numbers.begin(), numbers.end());
    } else if (order == "random") {
      static std::mt19937 generator(0);
      std::shuffle(numbers.begin(), numbers.end(), generator);
    } else {
      TORCH_CHECK(order == "forward", "CUDA_EMULATOR_ORDER=", order, " is not known");
    }
    return numbers;
  }

  bool is_running(unsigned int thread) const {
    return thread < ended_.size() && !ended_[thread];
  }

  bool block_meeting_is_complete() const {
    return block_meeting_.values[block_meeting_.round % 2].size() == ended_.size() - ended_count_;
  }

  // Whoever sees that all have come opens the next round: the last to come, or one that waits when others end.
  template <typename Complete>
  const std::map<unsigned int, uint64_t>& meet(
      Meeting& meeting, unsigned int place, uint64_t value, const Complete& is_complete) {
    const uint64_t round = meeting.round;
    meeting.values[round % 2][place] = value;
    const auto ready = [&meeting, round, is_complete] {
      if (meeting.round == round && is_complete()) {
        ++meeting.round;
        meeting.values[meeting.round % 2].clear();
      }
      return meeting.round != round;
    };
    if (!ready()) {
      fiber_->ready = ready;
      switch_context(*fiber_, scheduler_);
    }
    return meeting.last(round);
  }

  void run_block(unsigned int threads, size_t shared_bytes) {
    shared_.reset(new char[shared_bytes]);
    std::memset(shared_.get(), 0xa5, shared_bytes); // not zeros, which a kernel might count on
    ended_.assign(threads, false);
    ended_count_ = 0;
    block_meeting_ = {};
    warp_meetings_.clear();
    threads_ = order(threads);
    next_ = 0;
    std::move(fibers_.begin(), fibers_.end(), std::back_inserter(idle_));
    fibers_.clear();
    while (ended_count_ < threads) {
      bool progress = false;
      for (size_t i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i]->ready && fibers_[i]->ready()) {
          resume(*fibers_[i]);
          progress = true;
        }
      }
      if (next_ < threads) {
        start();
        progress = true;
      }
      TORCH_CHECK(progress, "CUDA emulator: threads wait at a barrier that others of them do not reach");
    }
  }

  // A new fiber, which runs threads until one has to wait.
  void start() {
    if (idle_.empty()) {
      idle_.push_back(std::make_unique<Fiber>());
    }
    fibers_.push_back(std::move(idle_.back()));
    idle_.pop_back();
    Fiber& fiber = *fibers_.back();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.memory.get(), kStackBytes); // what an earlier block's frames left there
#endif
    fiber.stack = fiber.memory.get();
    fiber.size = kStackBytes;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.memory.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.ready = nullptr;
    makecontext(&fiber.context, [] { instance().run_threads(); }, 0);
    resume(fiber);
  }

  void resume(Fiber& fiber) {
    fiber.ready = nullptr;
    fiber_ = &fiber;
    set_thread_index();
    switch_context(scheduler_, fiber);
    if (error_) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

  void run_threads() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_.stack, &scheduler_.size);
#endif
    try {
      while (next_ < threads_.size()) {
        fiber_->thread = static_cast<unsigned int>(threads_[next_++]);
        set_thread_index();
        (*kernel_)();
        ended_[fiber_->thread] = true;
        ++ended_count_;
      }
    } catch (...) {
      error_ = std::current_exception();
    }
    switch_context(*fiber_, scheduler_); // never comes back
  }

  void set_thread_index() {
    threadIdx.x = fiber_->thread % blockDim.x;
    threadIdx.y = fiber_->thread / blockDim.x % blockDim.y;
    threadIdx.z = fiber_->thread / blockDim.x / blockDim.y;
  }

  std::mutex mutex_;
  const std::function<void()>* kernel_ = nullptr;
  std::unique_ptr<char[]> shared_;
  std::vector<uint64_t> threads_; // in the order of their turns
  size_t next_ = 0;
  std::vector<bool> ended_;
  unsigned int ended_count_ = 0;
  Meeting block_meeting_;
  std::map<std::pair<unsigned int, unsigned int>, Meeting> warp_meetings_; // by warp and mask
  std::vector<std::unique_ptr<Fiber>> fibers_, idle_;
  Fiber* fiber_ = nullptr;
  Context scheduler_;
  std::exception_ptr error_;
};

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T shuffle(unsigned int mask, T value, int source, int width) {
  const auto& values = Machine::instance().meet_warp(mask, to_bits(value));
  const int lane = static_cast<int>(Machine::instance().lane());
  const bool inside = source / width == lane / width && source >= 0 && values.count(source) != 0;
  T result = value;
  if (inside) {
    std::memcpy(&result, &values.at(source), sizeof(T));
  }
  return result;
}

template <typename T, typename Change>
T exchange(T* address, const Change& change) {
  const T old = *address;
  *address = change(old);
  return old;
}

} // namespace emulator

namespace maskrcnn_benchmark {

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::Machine::instance().shared_memory());
}

} // namespace maskrcnn_benchmark

// Barriers and warp collectives.
inline void __syncthreads() {
  emulator::Machine::instance().meet_block(0);
}

inline int __syncthreads_count(int predicate) {
  const auto& values = emulator::Machine::instance().meet_block(predicate != 0);
  return static_cast<int>(std::count_if(values.begin(), values.end(), [](const auto& item) { return item.second; }));
}

inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) != 0;
}

inline void __syncwarp(unsigned int mask = 0xffffffff) {
  emulator::Machine::instance().meet_warp(mask, 0);
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate) {
  unsigned int result = 0;
  for (const auto& [lane, value] : emulator::Machine::instance().meet_warp(mask, predicate != 0)) {
    result |= static_cast<unsigned int>(value) << lane;
  }
  return result;
}

inline int __any_sync(unsigned int mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

inline int __all_sync(unsigned int mask, int predicate) {
  return !__any_sync(mask, !predicate);
}

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = warpSize) {
  const int lane = static_cast<int>(emulator::Machine::instance().lane());
  return emulator::shuffle(mask, value, lane / width * width + (source & (width - 1)), width);
}

template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = warpSize) {
  const int lane = static_cast<int>(emulator::Machine::instance().lane());
  return emulator::shuffle(mask, value, lane - static_cast<int>(delta), width);
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = warpSize) {
  const int lane = static_cast<int>(emulator::Machine::instance().lane());
  return emulator::shuffle(mask, value, lane + static_cast<int>(delta), width);
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = warpSize) {
  const int lane = static_cast<int>(emulator::Machine::instance().lane());
  return emulator::shuffle(mask, value, lane ^ lane_mask, width);
}

// Memory: one thread runs at a time, so these need no protection.
inline void __threadfence() {}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
void __stcg(T* address, T value) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0, "CUDA emulator: a misaligned address");
  std::memcpy(static_cast<void*>(address), &value, sizeof(T));
}

template <typename T>
T atomicAdd(T* address, T value) {
  return emulator::exchange(address, [=](T old) { return old + value; });
}

template <typename T>
T atomicMax(T* address, T value) {
  return emulator::exchange(address, [=](T old) { return std::max(old, value); });
}

template <typename T>
T atomicMin(T* address, T value) {
  return emulator::exchange(address, [=](T old) { return std::min(old, value); });
}

template <typename T>
T atomicOr(T* address, T value) {
  return emulator::exchange(address, [=](T old) { return old | value; });
}

template <typename T>
T atomicXor(T* address, T value) {
  return emulator::exchange(address, [=](T old) { return old ^ value; });
}

template <typename T>
T atomicExch(T* address, T value) {
  return emulator::exchange(address, [=](T) { return value; });
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return emulator::exchange(address, [=](T old) { return old == expected ? value : old; });
}

// Bits.
inline int __popc(unsigned int bits) {
  return __builtin_popcount(bits);
}

inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}

inline int __ffs(unsigned int bits) {
  return __builtin_ffs(static_cast<int>(bits));
}

inline int __ffsll(unsigned long long bits) {
  return __builtin_ffsll(static_cast<long long>(bits));
}

inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(bits));
}

inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}

template <typename To, typename From>
To __emulator_bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline unsigned int __float_as_uint(float value) {
  return __emulator_bits_as<unsigned int>(value);
}

inline int __float_as_int(float value) {
  return __emulator_bits_as<int>(value);
}

inline float __uint_as_float(unsigned int value) {
  return __emulator_bits_as<float>(value);
}

inline float __int_as_float(int value) {
  return __emulator_bits_as<float>(value);
}

inline long long __double_as_longlong(double value) {
  return __emulator_bits_as<long long>(value);
}

inline double __longlong_as_double(long long value) {
  return __emulator_bits_as<double>(value);
}

// What the sources use of the runtime and of c10/cuda.
using cudaStream_t = void*;
using cudaError_t = int;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulator::Machine::instance().run(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
  return 0;
}

#define C10_CUDA_CHECK(expression) TORCH_CHECK((expression) == 0, "CUDA emulator: ", #expression)

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() {
  return nullptr;
}

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};

struct OptionalCUDAGuard {
  explicit OptionalCUDAGuard(std::optional<c10::Device>) {}
};

} // namespace c10::cuda

#endif

// Memory of large tensors, kept for the next ones. glibc maps blocks above 32 MB one by one and gives each back to the
// system, whatever it is told; the next one costs a fault a page. At 800x1333, a training step of R50-FPN in float32
// began 300,000 to 1,200,000 pages anew, a tenth of its time. In glibc's heap (M_MMAP_MAX 0) they stay, but scatter: peak
// memory rose by a fifth.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "../common.h"

namespace maskrcnn_benchmark {
namespace {

constexpr size_t kLarge = 32 << 20; // bytes: device/cpu.py lets glibc keep what is smaller

struct Block {
  void* data;
  size_t size;
};

// Blocks that tensors hold, and those that they have given back, the oldest first. Together they never take more than
// tensors have held at a time: of the latter so many are freed before a new block is made.
class LargeBlocks {
 public:
  void* take(size_t size) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      // A much larger block would be wanted again by a tensor of its size
      if (block->size >= size && block->size - size <= size / 4 && (best == kept_.end() || block->size < best->size)) {
        best = block;
      }
    }
    if (best == kept_.end()) {
      make_room(size);
      void* data = c10::alloc_cpu(size);
      hold({data, size});
      return data;
    }
    const Block block = *best;
    kept_bytes_ -= block.size;
    kept_.erase(best);
    hold(block);
    return block.data;
  }

  // False, and nothing done, where the data is of no block.
  bool give_back(void* data) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto block = held_.find(data);
    if (block == held_.end()) {
      return false;
    }
    kept_.push_back({data, block->second});
    kept_bytes_ += block->second;
    held_bytes_ -= block->second;
    held_.erase(block);
    return true;
  }

  // A process forked while another thread is in here must find the lock free.
  void before_fork() {
    mutex_.lock();
  }
  void after_fork() {
    mutex_.unlock();
  }

 private:
  void hold(const Block& block) {
    held_.emplace(block.data, block.size);
    held_bytes_ += block.size;
    most_held_ = std::max(most_held_, held_bytes_);
  }

  void make_room(size_t size) {
    const size_t most = std::max(most_held_, held_bytes_ + size);
    for (; !kept_.empty() && held_bytes_ + kept_bytes_ + size > most; kept_.pop_front()) {
      kept_bytes_ -= kept_.front().size;
      c10::free_cpu(kept_.front().data);
    }
  }

  std::mutex mutex_;
  std::list<Block> kept_;
  std::unordered_map<void*, size_t> held_;
  size_t kept_bytes_ = 0, held_bytes_ = 0, most_held_ = 0;
};

// Never destroyed: tensors may outlive a library's static objects.
LargeBlocks& large_blocks() {
  static auto* blocks = new LargeBlocks;
  return *blocks;
}

// Of any size: oneDNN frees by this what it has allocated, see raw_deleter.
void free_block(void* data) {
  if (large_blocks().give_back(data)) {
    c10::profiledCPUMemoryReporter().Delete(data);
  } else {
    c10::GetDefaultCPUAllocator()->raw_deleter()(data);
  }
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    if (size < kLarge) {
      void* data = c10::GetDefaultCPUAllocator()->raw_allocate(size);
      return {data, data, &free_block, at::kCPU};
    }
    void* data = large_blocks().take(size);
    c10::profiledCPUMemoryReporter().New(data, size);
    return {data, data, &free_block, at::kCPU};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &free_block;
  }

  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

void keep_large_blocks() {
  static const bool once = [] {
    c10::SetCPUAllocator(new Allocator);
#ifndef _WIN32
    pthread_atfork(
        [] { large_blocks().before_fork(); }, [] { large_blocks().after_fork(); }, [] { large_blocks().after_fork(); });
#endif
    return true;
  }();
  (void)once;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(maskrcnn_benchmark, m) {
  m.def("keep_large_blocks() -> ()", TORCH_FN(keep_large_blocks));
}

} // namespace maskrcnn_benchmark

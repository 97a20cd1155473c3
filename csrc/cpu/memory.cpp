#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../check.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

namespace fused {
namespace {

using torch::stable::Tensor;

// malloc gives large tensors back to the kernel as soon as they are freed, and the kernel clears
// every page of the next one when it is first touched, which can cost more than a row kernel does.
// LayerNorm + ReLU forward, from fresh pages and from the cache: 4096 × 4096 float32 6.5 and 3.4
// ms, 8192 × 256 0.46 and 0.35 ms (AMD EPYC 9004, 2 threads, November 2026).
constexpr size_t kLarge = size_t{4} << 20;
// Without the cache, huge pages still help where malloc maps a tensor by itself in any case.
constexpr size_t kLargeUncached = size_t{32} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

// A block of memory with huge pages, mapped by itself so that all of it can be given back.
struct Block {
  void* start;
  size_t size;
};

Block map_block(size_t bytes) {
  constexpr size_t kGranule = size_t{64} << 10;
  const size_t size = (bytes + kGranule - 1) / kGranule * kGranule;
  void* const mapped =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  FUSED_CHECK(mapped != MAP_FAILED, "out of memory for ", size, " bytes");
  char* const first = static_cast<char*>(mapped);
  const size_t before = -reinterpret_cast<uintptr_t>(first) % kHugePage;
  if (before) munmap(first, before);
  char* const start = first + before;
  if (before < kHugePage) munmap(start + size, kHugePage - before);
  madvise(start, size, MADV_HUGEPAGE);
  return {start, size};
}

// Large blocks that freed tensors left, kept for the next one of about its size; the oldest goes
// when they are more than FUSED_CPU_CACHE_MB (default 512) for the process. 0 keeps none.
class BlockCache {
 public:
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {  // the newest first: it may still be in the cache
        const Block block = free_[i];
        if (block.size < bytes || block.size > bytes + bytes / 8) continue;
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
        kept_ -= block.size;
        return block;
      }
    }
    return map_block(bytes);
  }

  // From which size on tensors are taken here.
  size_t threshold() const { return most_ ? kLarge : kLargeUncached; }

  void give_back(Block block) {
    if (block.size > most_) {
      munmap(block.start, block.size);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(block);
      kept_ += block.size;
    }
    shrink(most_);
  }

  void shrink(size_t most) {
    for (;;) {
      Block oldest;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (kept_ <= most) return;
        oldest = free_.front();
        free_.erase(free_.begin());
        kept_ -= oldest.size;
      }
      munmap(oldest.start, oldest.size);
    }
  }

  // A fork copies the mutex as it is; the thread that holds it then is not copied.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // What is not a number is said by fused/backends/extension.py.
  static size_t limit() {
    const char* given = std::getenv("FUSED_CPU_CACHE_MB");
    const size_t digits = given ? std::strspn(given, "0123456789") : 0;
    const bool valid = digits >= 1 && digits <= 8 && given[digits] == '\0';
    return (valid ? std::strtoul(given, nullptr, 10) : 512) << 20;
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // the oldest first
  size_t kept_ = 0;
  const size_t most_ = limit();
};

// Never destroyed: tensors may be freed after the static objects of this library are.
BlockCache& block_cache() {
  static BlockCache& cache = *[] {
    auto* const made = new BlockCache;
    const auto unlock = [] { block_cache().unlock(); };
    pthread_atfork([] { block_cache().lock(); }, unlock, unlock);
    return made;
  }();
  return cache;
}

Tensor new_large_tensor(std::initializer_list<int64_t> sizes, const int64_t* strides, int32_t dtype,
                        size_t bytes) {
  const Block block = block_cache().take(bytes);
  static thread_local void* released;  // by torch, where it fails after it took the block
  released = nullptr;
  const auto release = [](void* data, void* context) {
    released = data;
    block_cache().give_back({data, reinterpret_cast<size_t>(context)});
  };
  AtenTensorHandle handle;
  const AOTITorchError failed =
      torch_from_blob(block.start, static_cast<int64_t>(sizes.size()), sizes.begin(), strides, 0,
                      dtype, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, release, reinterpret_cast<void*>(block.size));
  if (failed && released != block.start) block_cache().give_back(block);
  FUSED_CHECK(!failed, "torch makes no tensor of ", bytes, " bytes");
  return Tensor(handle);
}

}  // namespace

bool poison_new_tensors = false;

void empty_block_cache() { block_cache().shrink(0); }

Tensor new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype) {
  const int64_t* const size = sizes.begin();
  int64_t strides[3] = {1, 1, 1};
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(size[i], 1);
  }
  size_t bytes = aoti_torch_dtype_element_size(dtype);
  for (const int64_t extent : sizes) bytes *= static_cast<size_t>(extent);
  Tensor tensor;
  if (bytes >= kLarge && bytes >= block_cache().threshold()) {
    tensor = new_large_tensor(sizes, strides, dtype, bytes);
  } else {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                 aoti_torch_device_type_cpu(), 0, &handle));
    tensor = Tensor(handle);
  }
  if (poison_new_tensors && bytes) std::memset(tensor.data_ptr(), 0xFF, bytes);
  return tensor;
}

std::shared_ptr<void> new_memory(size_t bytes) {
  const auto doubles = static_cast<int64_t>((bytes + sizeof(double) - 1) / sizeof(double));
  const auto tensor = std::make_shared<Tensor>(new_tensor({doubles}, aoti_torch_dtype_float64()));
  return {tensor, tensor->data_ptr()};
}

void* thread_buffer(int slot, size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffers[kBufferSlots];
  thread_local size_t sizes[kBufferSlots] = {};
  if (sizes[slot] < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    sizes[slot] = 0;  // should the allocation fail
    buffers[slot].reset(std::aligned_alloc(64, rounded));
    FUSED_CHECK(buffers[slot] != nullptr, "out of memory for ", rounded, " bytes");
    sizes[slot] = rounded;
  }
  return buffers[slot].get();
}

// From Linux itself: glibc's sysconf multiplies the size on some AMD processors.
size_t last_level_cache() {
  static const size_t bytes = [] {
    for (const char* level : {"3", "2"}) {
      std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/index") + level + "/size");
      size_t kilobytes = 0;
      char unit = 0;
      if (file >> kilobytes >> unit && unit == 'K') return kilobytes << 10;
    }
    return size_t{32} << 20;
  }();
  return bytes;
}

}  // namespace fused

// Memory of the CPU operators: output tensors, scratch, and the size of the last-level cache.
//
// Torch's headers take longer to compile than all of a file's own code, so they are left to who
// needs a tensor's members.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>

namespace torch::stable {
class Tensor;
}

namespace fused {

// A contiguous, uninitialised CPU tensor of one to three dimensions. Large ones come from a cache
// of blocks that were used before (memory.cpp).
torch::stable::Tensor new_tensor(std::initializer_list<int64_t> sizes, int32_t dtype);

// Memory like a new tensor's, for as long as somebody holds it.
std::shared_ptr<void> new_memory(size_t bytes);

// Gives the blocks of that cache back to the system.
void empty_block_cache();

// For tests: new tensors are filled with bytes of ones, which are NaN in every floating dtype.
extern bool poison_new_tensors;

// A buffer of the calling thread that survives the call; slot tells independent uses apart.
constexpr int kBufferSlots = 15;
void* thread_buffer(int slot, size_t bytes);

// Bytes of the largest cache that this process's first CPU sees.
size_t last_level_cache();

}  // namespace fused

// CUDA on a CPU, for tests: what the kernels in csrc/cuda use of the header of this name.
//
// A block's threads are fibers that run one at a time, each until it waits: for the block
// (__syncthreads) or for its warp (a shuffle). When all that live wait for the same, they go on.
// Where that can no longer happen (a barrier that only some threads reach), the launch fails.
// Blocks run one after another, so shared memory is static. Races between threads are not seen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline constexpr cudaError_t cudaErrorLaunchFailure = static_cast<cudaError_t>(719);

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 << 10;

enum class State { running, at_barrier, at_shuffle, done };

struct Fiber {
  ucontext_t context;
  jmp_buf position;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  bool begun = false;
  int shuffles = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  std::function<void()> kernel;
  int current = 0;
  // What the lanes pass in a shuffle: two sets, because the next may begin while this one is read.
  alignas(16) char slots[2][kMostThreads][8];
};
inline Machine machine;

// Jumps instead of swapcontext, which asks the system to save the signal mask every time.
inline void wait_as(State state) {
  Fiber& own = machine.fibers[machine.current];
  own.state = state;
  if (!_setjmp(own.position)) _longjmp(machine.scheduler, 1);
}

// A fiber serves block after block.
inline void run_thread() {
  for (;;) {
    machine.kernel();
    wait_as(State::done);
  }
}

inline void resume(int index) {
  Fiber& fiber = machine.fibers[index];
  machine.current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x);
  fiber.state = State::running;
  if (_setjmp(machine.scheduler)) return;
  if (fiber.begun) _longjmp(fiber.position, 1);
  fiber.begun = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
  setcontext(&fiber.context);
}

// Resumes the threads [first, last) if all wait as `state`; whether it did. Threads that are done
// do not count as waiting: a GPU may take them so, but the kernels shall not need that.
inline bool release(int first, int last, State state) {
  for (int i = first; i < last; ++i) {
    if (machine.fibers[i].state != state) return false;
  }
  for (int i = first; i < last; ++i) resume(i);
  return true;
}

// Whether all threads came to the end.
inline bool run_block() {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  // All at once: positions hold addresses.
  if (machine.fibers.empty()) machine.fibers.resize(kMostThreads);
  for (int i = 0; i < threads; ++i) {
    machine.fibers[i].shuffles = 0;
    resume(i);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (int warp = 0; warp < threads; warp += kWarp) {
      const int last = warp + kWarp < threads ? warp + kWarp : threads;
      while (release(warp, last, State::at_shuffle)) progress = true;
    }
    progress |= release(0, threads, State::at_barrier);
  }
  int waiting = 0;
  for (int i = 0; i < threads; ++i) waiting += machine.fibers[i].state != State::done;
  if (waiting) {
    fprintf(stderr, "emulation: %d of %d threads wait for others that do not come\n", waiting,
            threads);
    machine.fibers.clear();  // they are in the middle of this kernel
  }
  return waiting == 0;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_as(emulation::State::at_barrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= 8);
  emulation::Machine& machine = emulation::machine;
  const int own = machine.current, other = own ^ distance;
  const int set = machine.fibers[own].shuffles++ % 2;
  memcpy(machine.slots[set][own], &value, sizeof(T));
  if (mask != 0xFFFFFFFFu) fprintf(stderr, "emulation: shuffles take the whole warp\n");
  emulation::wait_as(emulation::State::at_shuffle);
  memcpy(&value, machine.slots[set][other], sizeof(T));
  return value;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (!grid.x || !grid.y || block.x * block.y > emulation::kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  emulation::machine.kernel = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      if (!emulation::run_block()) return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "unspecified launch failure";
  }
}

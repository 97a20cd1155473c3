// Sums over the threads of a block, in an order that follows from the block's shape alone.
//
// A block has kWarp to kThreads threads, blockDim.x · blockDim.y, both powers of two. The threads
// of equal threadIdx.y are a team: a part of a warp, a warp, or a whole block of kThreads.
#pragma once

#include <cuda_runtime.h>

namespace fused::cuda {

constexpr int kThreads = 256, kWarp = 32;

// The sum over the team, in all of its threads. All threads of the block must call it. scratch:
// kThreads / kWarp elements, which only teams of the whole block use.
template <class C>
__device__ inline C team_sum(C value, C* scratch) {
  const int team = static_cast<int>(blockDim.x);
  for (int distance = (team < kWarp ? team : kWarp) / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  if (team <= kWarp) return value;
  __syncthreads();  // the sum before may still be read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < team / kWarp; ++warp) value += scratch[warp];
  return value;
}

// The sums over threadIdx.y, in all threads. scratch: kThreads · N elements.
template <class C, int N>
__device__ inline void sum_over_rows(C (&values)[N], C* scratch) {
  const int width = static_cast<int>(blockDim.x) * N;
  C* const first = scratch + threadIdx.x * N;
  C* const own = first + static_cast<int>(threadIdx.y) * width;
  __syncthreads();  // the sums before may still be read
#pragma unroll
  for (int k = 0; k < N; ++k) own[k] = values[k];
  for (int half = static_cast<int>(blockDim.y) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half) {
#pragma unroll
      for (int k = 0; k < N; ++k) own[k] += own[half * width + k];
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = first[k];
}

}  // namespace fused::cuda

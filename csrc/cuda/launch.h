// Launching: the device, the shape of a block, the choice of a kernel by storage type.
#pragma once

#include <cstdint>
#include <utility>

#include "elements.cuh"
#include "problems.h"
#include "team.cuh"

namespace fused::cuda {

// Makes a device the current one until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    if (device < 0 || cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
    changed_ = cudaSetDevice(device) == cudaSuccess;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A block of a team for each of `rows`, of at least a warp in all. A team has a thread for each of
// `packs`, up to a warp; where `wide`, a block's threads where that leaves several packs to each.
inline dim3 block_of(int64_t packs, int64_t rows, bool wide) {
  constexpr int64_t kPacksOfWarp = 8 * kWarp;
  unsigned team = 1, teams = 1;
  while (team < packs && team < kWarp) team *= 2;
  if (wide && packs > kPacksOfWarp) team = kThreads;
  while ((teams < rows || team * teams < kWarp) && team * teams < kThreads) teams *= 2;
  return dim3(team, teams);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int64_t planes, dim3 threads,
           void* stream, Arguments&&... arguments) {
  if (blocks > INT32_MAX || planes > 65535) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(planes));
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the Type of a storage code.
template <class F>
int with_storage(int64_t storage, const F& f) {
  switch (static_cast<Storage>(storage)) {
    case Storage::f32:
      return f(Type<float>{});
    case Storage::bf16:
      return f(Type<__nv_bfloat16>{});
    case Storage::f16:
      return f(Type<__half>{});
    case Storage::f64:
      return f(Type<double>{});
  }
  return cudaErrorInvalidValue;
}

// Whether all of these are multiples of 16 bytes.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

}  // namespace fused::cuda

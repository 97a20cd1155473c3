// The second stage of sums: adds up, in order and in double, what the blocks of a first stage have
// summed. No atomics, so the bits repeat.
#include "launch.h"
#include "sums.h"

namespace fused::cuda {

constexpr int kColumns = 32;

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumProblem p) {
  __shared__ double scratch[kThreads];
  const int64_t col_blocks = ceil_div(p.cols, kColumns), outer = blockIdx.x / col_blocks;
  const int64_t col = blockIdx.x % col_blocks * kColumns + threadIdx.x, plane = blockIdx.y;
  const int64_t storage = static_cast<int64_t>(p.wide ? Storage::f64 : Storage::f32);
  const int64_t first = (plane * p.outer + outer) * p.chunks;
  double total[1] = {0};
  for (int64_t chunk = threadIdx.y; col < p.cols && chunk < p.chunks; chunk += blockDim.y) {
    total[0] += load_any(p.partial, storage, (first + chunk) * p.cols + col);
  }
  sum_over_rows(total, scratch);
  if (threadIdx.y == 0 && col < p.cols) {
    // Not indexed by a number known at run time alone, which would copy the arrays.
    void* const out = plane == 0 ? p.outs[0] : plane == 1 ? p.outs[1] : p.outs[2];
    const int64_t as = plane == 0 ? p.storages[0] : plane == 1 ? p.storages[1] : p.storages[2];
    store_any(out, as, outer * p.cols + col, total[0]);
  }
}

FUSED_EXPORT int fused_cuda_sum(const SumProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  const dim3 block(kColumns, kThreads / kColumns);
  return launch(sum_kernel, p->outer * ceil_div(p->cols, kColumns), p->planes, block, stream, *p);
}

}  // namespace fused::cuda

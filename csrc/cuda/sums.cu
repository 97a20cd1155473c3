// The second stage of sums: adds up, in order and in double, what the blocks of a first stage have
// summed. No atomics, so the bits repeat.
#include "launch.h"

namespace fused::cuda {

constexpr int kColumns = 32;

__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumProblem p) {
  __shared__ double scratch[kThreads];
  const int64_t col_blocks = ceil_div(p.cols, kColumns), outer = blockIdx.x / col_blocks;
  const int64_t col = blockIdx.x % col_blocks * kColumns + threadIdx.x, plane = blockIdx.y;
  const int64_t first = (plane * p.outer + outer) * p.chunks;
  double total[1] = {0};
  for (int64_t chunk = threadIdx.y; col < p.cols && chunk < p.chunks; chunk += blockDim.y) {
    total[0] += load_any(p.partial, p.partial_storage, (first + chunk) * p.cols + col);
  }
  sum_over_rows(total, scratch);
  if (threadIdx.y == 0 && col < p.cols) {
    const int64_t at = outer * p.cols + col;
    if (plane == 0) store_any(p.out0, p.out0_storage, at, total[0]);
    if (plane == 1) store_any(p.out1, p.out1_storage, at, total[0]);
    if (plane == 2) store_any(p.out2, p.out2_storage, at, total[0]);
  }
}

FUSED_EXPORT int fused_cuda_sum(const SumProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  const dim3 block(kColumns, kThreads / kColumns);
  return launch(sum_kernel, p->outer * ceil_div(p->cols, kColumns), p->planes, block, stream, *p);
}

}  // namespace fused::cuda

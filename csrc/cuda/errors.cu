// What Python asks of the library itself.
#include "channel.h"
#include "launch.h"
#include "row.h"
#include "sums.h"

namespace fused::cuda {

FUSED_EXPORT const char* fused_cuda_error(int error) {
  cudaGetLastError();  // a later launch shall not find it again
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// The sizes of the structures, in the order of fused/cuda_library.py: a library of older sources is
// noticed.
FUSED_EXPORT void fused_cuda_sizes(int64_t* sizes) {
  sizes[0] = sizeof(RowProblem);
  sizes[1] = sizeof(SumProblem);
  sizes[2] = sizeof(ChannelProblem);
  sizes[3] = sizeof(StatisticsProblem);
  sizes[4] = sizeof(CoefficientProblem);
}

}  // namespace fused::cuda

// Launchers of the row kernels.
#include "launch.h"
#include "row_backward.cuh"
#include "row_forward.cuh"

namespace fused::cuda {
namespace {

// Whether every pack of every row is a whole one at a multiple of 16 bytes.
template <class T>
bool whole_packs(const RowProblem& p) {
  const bool even =
      (p.cols | p.z_stride | p.dy_stride | p.residual_stride | p.out_stride) % kPack<T> == 0;
  return even && aligned(p.z, p.dy, p.residual, p.out, p.bias, p.norm_weight, p.norm_bias);
}

template <class T, class Kernel>
int launch_rows(Kernel kernel, const RowProblem& p, void* stream) {
  const dim3 block = block_of(ceil_div(p.cols, kPack<T>), p.rows, true);
  return launch(kernel, ceil_div(p.rows, block.y), 1, block, stream, p, whole_packs<T>(p));
}

}  // namespace

FUSED_EXPORT int fused_cuda_row_forward(const RowProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_rows<T>(row_forward_kernel<T>, *p, stream);
  });
}

FUSED_EXPORT int fused_cuda_row_backward(const RowProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->storage, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if (p->means) {
      const int error = launch_rows<T>(row_means_kernel<T>, *p, stream);
      if (error) return error;
    }
    const int64_t packs = ceil_div(p->cols, kPack<T>);
    const dim3 block = block_of(packs, ceil_div(p->rows, p->chunks), false);
    const int64_t blocks = p->chunks * ceil_div(packs, block.x);
    return launch(row_gradient_kernel<T>, blocks, 1, block, stream, *p, whole_packs<T>(*p));
  });
}

}  // namespace fused::cuda

// Launchers of the row kernels.
#include "row_backward.cuh"
#include "row_forward.cuh"
#include "row_launch.h"

namespace fused::cuda {
namespace {

template <class T, class Kernel>
int launch_rows(Kernel kernel, const RowProblem& p, void* stream) {
  const dim3 block = block_of(ceil_div(p.cols, kPack<T>), p.rows, true);
  return launch(kernel, ceil_div(p.rows, block.y), 1, block, stream, p,
                whole_packs(p, p.cols, kPack<T>));
}

}  // namespace

FUSED_EXPORT int fused_cuda_row_forward(const RowProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_rows<T>(row_forward_kernel<T>, *p, stream);
  });
}

FUSED_EXPORT int fused_cuda_row_backward(const RowProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if (p->means) {
      const int error = launch_rows<T>(row_means_kernel<T>, *p, stream);
      if (error) return error;
    }
    const int64_t packs = ceil_div(p->cols, kPack<T>);
    const dim3 block = block_of(packs, ceil_div(p->rows, p->chunks), false);
    const int64_t blocks = p->chunks * ceil_div(packs, block.x);
    return launch(row_gradient_kernel<T>, blocks, 1, block, stream, *p,
                  whole_packs(*p, p->cols, kPack<T>));
  });
}

}  // namespace fused::cuda

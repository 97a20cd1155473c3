// Launchers of the row kernels of gated activations: z has p.cols columns, y and dy have half.
#include "gated_backward.cuh"
#include "gated_forward.cuh"
#include "row_launch.h"

namespace fused::cuda {

FUSED_EXPORT int fused_cuda_gated_forward(const RowProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t half = p->cols / 2, packs = ceil_div(half, kPack<T>);
    // A row's bytes decide on a wide team; no thread of a narrow one is without a pack of y.
    const dim3 block = block_of(packs > kWarp ? 2 * packs : packs, p->rows, true);
    return launch(gated_forward_kernel<T>, ceil_div(p->rows, block.y), 1, block, stream, *p,
                  whole_packs(*p, half, kPack<T>));
  });
}

FUSED_EXPORT int fused_cuda_gated_backward(const RowProblem* p, int device, void* stream) {
  const DeviceScope scope(device);
  return with_storage(p->z_storage, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    const int64_t half = p->cols / 2, packs = ceil_div(half, kGatedPack<T>);
    const bool whole = whole_packs(*p, half, kGatedPack<T>);
    if (p->means) {
      const dim3 block = block_of(packs, p->rows, true);
      const int error =
          launch(gated_means_kernel<T>, ceil_div(p->rows, block.y), 1, block, stream, *p, whole);
      if (error) return error;
    }
    const dim3 block = block_of(packs, ceil_div(p->rows, p->chunks), false);
    const int64_t blocks = p->chunks * ceil_div(packs, block.x);
    return launch(gated_gradient_kernel<T>, blocks, 1, block, stream, *p, whole);
  });
}

}  // namespace fused::cuda

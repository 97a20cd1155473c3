// What Python asks of the library itself.
#include <cstdio>

#include "launch.h"

namespace fused::cuda {

FUSED_EXPORT const char* fused_cuda_error(int error) {
  cudaGetLastError();  // a later launch shall not find it again
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// A line for each launcher: its name, its structure's name, size and declaration.
FUSED_EXPORT const char* fused_cuda_description() {
  static char text[1 << 14];
  size_t length = 0;
#define FUSED_LAUNCHER(name, Problem)                                                         \
  length += snprintf(text + length, sizeof(text) - length, "%s %s %zu %s\n", #name, #Problem, \
                     sizeof(Problem), kDeclaration<Problem>);
  FUSED_FOR_EACH_LAUNCHER(FUSED_LAUNCHER)
#undef FUSED_LAUNCHER
  return text;
}

}  // namespace fused::cuda

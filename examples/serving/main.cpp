// Runs a packaged model on a batch, without Python. export.py makes the package; build with
//
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 main.cpp -o serve -isystem $T/include -isystem $T/include/torch/csrc/api/include
//       -L$T/lib -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl   (on one line)
//
// and run `./serve fused/_C.abi3.so model.pt2 rows`, with the path of the installed extension:
// loading it defines the operators and their CPU kernels. The input is 0, 0.01, 0.02, ...
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: serve extension package rows\n");
    return 2;
  }
  if (!dlopen(arguments[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const int64_t rows = std::atoll(arguments[3]);
  const at::Tensor x = (at::arange(rows * 64) * 0.01).reshape({rows, 64});
  const at::Tensor y = model.run({x})[0];
  const at::Tensor sums = y.sum(1);  // one number for each row
  for (int64_t i = 0; i < rows; ++i) std::printf("%.4f\n", sums[i].item<double>());
}

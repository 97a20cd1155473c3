// Several threads, those of torch.
#pragma once

#include <cstdint>

namespace fused {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;

void run_parallel(int64_t begin, int64_t end, int64_t grain,
                  void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Calls body(begin, end) by several threads for parts of at least `grain` indices.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  run_parallel(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<const F*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fused

// Philox4x32 with 7 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
//
// Eight consecutive elements of a row share one 64-bit counter; element e takes half e % 2 (low
// first) of word e / 2. fused/run/random.py states the whole mapping, for every backend.
#pragma once

#include <cstdint>

namespace fused {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kElementsPerCounter = 8;

// Counters that so many elements of a row take. Always inline: compiled for several instruction
// sets, it must not be a symbol that the linker merges.
__attribute__((always_inline)) constexpr int64_t counters_of(int64_t cols) {
  return (cols + kElementsPerCounter - 1) / kElementsPerCounter;
}

}  // namespace fused

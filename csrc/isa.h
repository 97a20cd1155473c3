// The kernels of the instruction set that is in use: one choice for every family.
#pragma once

#include "cpu/channel.h"
#include "cpu/row.h"

namespace fused {

struct Kernels {
  const char* name;
  const RowKernels& row;
  const ChannelKernels& channel;
  const StageTable& stages;
};

// Those of the best instruction set that the machine has, or of FUSED_CPU_ISA.
const Kernels& active_kernels();

}  // namespace fused

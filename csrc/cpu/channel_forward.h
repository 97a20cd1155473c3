// The forward kernel of the channel norms, for statistics that are known.
#pragma once

#include "channel_input.h"

namespace fused::FUSED_TARGET {

template <class T, By kBy, Through kThrough>
inline void channel_forward(const Stages& stages, const ChannelRows& rows) {
  using Input = ChannelInput<T, kBy>;
  Epilogue<T, kThrough> epilogue(stages);
  const T* const residual = static_cast<const T*>(rows.residual);
  for (int64_t row = 0; row < rows.rows; ++row) {
    if (Input::left_out(rows, row)) continue;
    const int64_t start = row * rows.stride;
    epilogue.output(rows.cols, Input(rows, row),
                    {static_cast<T*>(rows.out) + start, residual ? residual + start : nullptr,
                     rows.counter + static_cast<uint64_t>(row) * rows.row_counters});
  }
  if (stages.streaming) fence_streaming();
}

}  // namespace fused::FUSED_TARGET

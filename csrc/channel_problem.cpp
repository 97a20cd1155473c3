// Checks of the channel operators' arguments; rows and lines.
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/tensor.h>

#include "channel_problem.h"
#include "check.h"
#include "cpu/random.h"
#include "isa.h"

namespace fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Rows of fewer positions than this are taken together, a sample at a time; of batch norm, whose
// coefficients are spread along such a row once for all samples, also longer ones while what
// belongs to the columns stays near the first-level cache. Forward of (64, 512, 16) bfloat16: 1.39
// by row, 0.35 ms by column; of (32, 512, 49) 0.76 and 1.50 ms (AMD EPYC 9004, one thread, November
// 2026).
constexpr int64_t kFewPositions = 16, kFewPositionsOfBatch = 64, kMostSpread = 8192;
// Lines have at least about so many elements.
constexpr int64_t kLine = 256;

void* moved(const void* p, int64_t bytes) {
  return p ? const_cast<char*>(static_cast<const char*>(p)) + bytes : nullptr;
}

int64_t size_of(Storage storage) {
  return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2;
}

}  // namespace

ChannelProblem::ChannelProblem(const Tensor& z_, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const OptionalTensor& mask_,
                               const OptionalTensor& seed, const ChannelScalars& scalars)
    : storage(storage_of(z_)),
      compute(compute_of(storage)),
      channels_last(scalars.channels_last),
      norm(static_cast<Norm>(scalars.norm)),
      eps(scalars.eps),
      kernels(&active_kernels().channel) {
  FUSED_CHECK(z_.dim() == 3, "z must be (samples, channels, positions), got ", z_.dim(),
              " dimensions");
  FUSED_CHECK(z_.is_contiguous(), "z must be contiguous");
  FUSED_CHECK(scalars.norm == 0 || (scalars.norm >= 3 && scalars.norm <= 5), "norm code ",
              scalars.norm, " is not one of batch, group or instance norm");
  samples = z_.size(0);
  channels = z_.size(channels_last ? 2 : 1);
  positions = z_.size(channels_last ? 1 : 2);
  groups = norm == Norm::group ? scalars.groups : channels;
  FUSED_CHECK(norm == Norm::none || (scalars.groups == groups && groups >= 0 &&
                                     (groups == 0 ? channels == 0 : channels % groups == 0)),
              scalars.groups, " groups do not divide ", channels, " channels",
              norm == Norm::group ? "" : " (batch and instance norm have one each)");
  z = z_.data_ptr();
  if (mask_) {
    FUSED_CHECK(channels_last, "a mask needs channels_last");
    FUSED_CHECK(mask_->dim() == 2 && mask_->size(0) == samples && mask_->size(1) == positions &&
                    mask_->scalar_type() == ScalarType::Bool && mask_->is_contiguous(),
                "mask must be contiguous, bool, (", samples, ", ", positions, ")");
    mask = static_cast<const bool*>(mask_->data_ptr());
    has_mask = true;
  }
  weight = norm == Norm::none ? nullptr : column_array(norm_weight, compute, kWeightSlot, channels);
  bias = norm == Norm::none ? nullptr : column_array(norm_bias, compute, kBiasSlot, channels);

  check_activation(scalars.activation);
  stages = stages_of(compute, scalars.activation, scalars.alpha, scalars.beta);
  stages.seed = checked_seed(scalars.threshold, seed);
  (scalars.channel_dropout ? channel_threshold : stages.threshold) =
      static_cast<uint32_t>(scalars.threshold);
  lay_out_rows(stages.threshold != 0);
}

void ChannelProblem::lay_out_rows(bool dropout) {
  const bool aligned = !dropout || positions % kElementsPerCounter == 0;
  const bool spread_once =
      blocks() == 1 && !channel_threshold && channels * positions <= kMostSpread;
  const bool few = positions < (spread_once ? kFewPositionsOfBatch : kFewPositions);
  by = channels_last || (few && aligned) ? By::column : By::row;
  inner = fold = 1;
  if (by == By::row) {
    rows = channels;
    cols = positions;
    row_counters = counters_of(positions);
  } else {
    inner = channels_last ? 1 : positions;
    rows = channels_last ? positions : 1;
    cols = channels * inner;
    row_counters = channels_last ? counters_of(channels) : channels * counters_of(positions);
    const bool foldable = !mask && (!dropout || cols % kElementsPerCounter == 0);
    if (foldable && cols) fold = std::max<int64_t>(1, kLine / cols);
    if (!is_batch() && norm != Norm::none) fold = std::min(fold, std::max<int64_t>(1, rows));
  }
}

void* ChannelProblem::data_like_z(const Tensor& tensor, const char* name) const {
  FUSED_CHECK(tensor.dim() == 3 && tensor.size(0) == samples &&
                  tensor.size(channels_last ? 2 : 1) == channels &&
                  tensor.size(channels_last ? 1 : 2) == positions && tensor.is_contiguous() &&
                  storage_of(tensor) == storage,
              name, " must be contiguous, with the shape and dtype of z");
  return tensor.data_ptr();
}

void ChannelProblem::set_out(const Tensor& tensor) {
  out = tensor.data_ptr();
  stages.streaming = worth_streaming(tensor, cols);
}

ChannelRows ChannelProblem::view(int64_t row, int64_t count) const {
  ChannelRows work;
  work.rows = count;
  work.cols = work.stride = cols;
  work.z = z;
  work.dy = dy;
  work.residual = residual;
  work.shortcut = shortcut;
  work.dshortcut = dshortcut;
  work.out = out;
  work.gradient = gradient;
  work.mask = mask ? mask + row : nullptr;
  work.row_counters = static_cast<uint64_t>(row_counters);
  advance(work, row * cols, static_cast<uint64_t>(row) * work.row_counters);
  return work;
}

ChannelRows ChannelProblem::view_part(int64_t row, int64_t start, int64_t size) const {
  ChannelRows work = view(row, 1);
  advance(work, start, static_cast<uint64_t>(start / kElementsPerCounter));
  work.cols = size;
  return work;
}

ChannelRows ChannelProblem::view_groups(int64_t sample, int64_t first, int64_t last) const {
  if (!is_batch()) return view(sample * rows + first * width(), (last - first) * width());
  ChannelRows work = view(first, samples);
  work.stride = rows * cols;
  work.row_counters = static_cast<uint64_t>(rows * row_counters);
  work.coefficient_step = 0;
  return work;
}

int64_t ChannelProblem::element_size() const { return size_of(storage); }

void ChannelProblem::advance(ChannelRows& work, int64_t elements, uint64_t counters) const {
  const int64_t bytes = elements * size_of(storage);
  work.z = moved(work.z, bytes);
  work.dy = moved(work.dy, bytes);
  work.residual = moved(work.residual, bytes);
  work.shortcut = moved(work.shortcut, bytes);
  work.dshortcut = moved(work.dshortcut, bytes);
  work.out = moved(work.out, bytes);
  work.gradient = moved(work.gradient, elements * size_of(compute));
  work.counter += counters;
}

const void* ChannelProblem::z_at(int64_t element) const {
  return moved(z, element * size_of(storage));
}

int64_t ChannelProblem::present(int64_t row, int64_t count) const {
  return mask ? std::count(mask + row, mask + row + count, true) : count;
}

}  // namespace fused

// The CPU implementations of the channel operators (schemas: fused/backends/schemas.py), on
// libtorch's stable ABI: arguments and outputs. What is done when, and by which thread, is in
// channel_statistics.cpp, channel_forward.cpp, channel_sums.cpp and channel_backward.cpp; the
// arithmetic in cpu/channel_*.h.
#include "channel.h"
#include "check.h"

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fused {
namespace {

using torch::stable::Tensor;

// Calls f with a zero of the compute type.
template <class F>
void in_compute_type(const ChannelProblem& p, const F& f) {
  p.compute == Storage::f64 ? f(0.0) : f(0.0f);
}

// ---- statistics ----

struct StatisticsTensors {
  Tensor mean, variance, count;
};

StatisticsTensors new_statistics(const ChannelProblem& p) {
  FUSED_CHECK(p.norm != Norm::none, "without a norm there are no statistics");
  const int32_t dtype = compute_dtype(p.compute);
  return {new_tensor({p.blocks(), p.groups}, dtype), new_tensor({p.blocks(), p.groups}, dtype),
          new_tensor({p.has_mask ? p.blocks() : 0}, dtype)};
}

template <class C>
C* data_of(const Tensor& tensor) {
  return tensor.numel() ? static_cast<C*>(tensor.data_ptr()) : nullptr;
}

// Statistics that were given, in the compute type.
template <class C>
ChannelStatistics<C> given_statistics(const ChannelProblem& p, const OptionalTensor& mean,
                                      const OptionalTensor& variance) {
  FUSED_CHECK(
      (p.norm != Norm::none) == mean.has_value() && mean.has_value() == variance.has_value(),
      "mean and variance are needed with a norm, and only then");
  ChannelStatistics<C> statistics;
  if (!mean) return statistics;
  for (const Tensor* t : {&*mean, &*variance}) {
    FUSED_CHECK(t->dim() == 2 && t->size(1) == p.groups &&
                    (t->size(0) == 1 || t->size(0) == p.samples) && t->size(0) == mean->size(0),
                "mean and variance must be (1, ", p.groups, ") or (", p.samples, ", ", p.groups,
                ")");
  }
  statistics.rows = mean->size(0);
  const int64_t size = statistics.rows * p.groups;
  statistics.mean = static_cast<const C*>(column_array(mean, p.compute, kMeanSlot, size));
  statistics.variance =
      static_cast<const C*>(column_array(variance, p.compute, kVarianceSlot, size));
  return statistics;
}

// Those of the batch itself: one for each block.
template <class C>
ChannelStatistics<C> own_statistics(const ChannelProblem& p, const OptionalTensor& mean,
                                    const OptionalTensor& variance) {
  const ChannelStatistics<C> statistics = given_statistics<C>(p, mean, variance);
  FUSED_CHECK(statistics.rows == p.blocks(), "mean and variance must have ", p.blocks(),
              " rows, got ", statistics.rows);
  return statistics;
}

std::tuple<Tensor, Tensor, Tensor> statistics_operator(Tensor z, OptionalTensor mask, int64_t norm,
                                                       int64_t groups, bool channels_last) {
  const ChannelProblem p(z, {}, {}, mask, {},
                         {norm, groups, channels_last, 0.0, 0, 0.0, 0.0, 0, false});
  const StatisticsTensors found = new_statistics(p);
  in_compute_type(p, [&](auto zero) {
    using C = decltype(zero);
    channel_statistics(p, data_of<C>(found.mean), data_of<C>(found.variance),
                       data_of<C>(found.count));
  });
  return {found.mean, found.variance, found.count};
}

// ---- forward ----

void set_added(ChannelProblem& p, const OptionalTensor& residual, const OptionalTensor& shortcut) {
  if (residual) p.residual = p.data_like_z(*residual, "residual");
  if (shortcut) p.shortcut = p.data_like_z(*shortcut, "shortcut");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_operator(
    Tensor z, OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor residual,
    OptionalTensor mask, OptionalTensor seed, int64_t norm, int64_t groups, bool channels_last,
    double eps, int64_t activation, double alpha, double beta, int64_t threshold,
    bool channel_dropout, OptionalTensor shortcut) {
  ChannelProblem p(
      z, norm_weight, norm_bias, mask, seed,
      {norm, groups, channels_last, eps, activation, alpha, beta, threshold, channel_dropout});
  set_added(p, residual, shortcut);
  Tensor y = new_tensor({z.size(0), z.size(1), z.size(2)}, dtype_of(z));
  p.set_out(y);
  const StatisticsTensors found = new_statistics(p);
  in_compute_type(p, [&](auto zero) {
    using C = decltype(zero);
    channel_forward(p, data_of<C>(found.mean), data_of<C>(found.variance), data_of<C>(found.count));
  });
  return {y, found.mean, found.variance, found.count};
}

void apply(ChannelProblem& p, const OptionalTensor& mean, const OptionalTensor& variance,
           const OptionalTensor& residual, const OptionalTensor& shortcut) {
  set_added(p, residual, shortcut);
  in_compute_type(
      p, [&](auto zero) { channel_apply(p, given_statistics<decltype(zero)>(p, mean, variance)); });
}

Tensor apply_operator(Tensor z, OptionalTensor mean, OptionalTensor variance,
                      OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor residual,
                      OptionalTensor mask, OptionalTensor seed, int64_t norm, int64_t groups,
                      bool channels_last, double eps, int64_t activation, double alpha, double beta,
                      int64_t threshold, bool channel_dropout, OptionalTensor shortcut) {
  ChannelProblem p(
      z, norm_weight, norm_bias, mask, seed,
      {norm, groups, channels_last, eps, activation, alpha, beta, threshold, channel_dropout});
  Tensor y = new_tensor({z.size(0), z.size(1), z.size(2)}, dtype_of(z));
  p.set_out(y);
  apply(p, mean, variance, residual, shortcut);
  return y;
}

// Writes y over z, for inference: no output to allocate, no fresh pages to touch.
void apply_inplace_operator(Tensor z, OptionalTensor mean, OptionalTensor variance,
                            OptionalTensor norm_weight, OptionalTensor norm_bias,
                            OptionalTensor residual, OptionalTensor mask, OptionalTensor seed,
                            int64_t norm, int64_t groups, bool channels_last, double eps,
                            int64_t activation, double alpha, double beta, int64_t threshold,
                            bool channel_dropout, OptionalTensor shortcut) {
  ChannelProblem p(
      z, norm_weight, norm_bias, mask, seed,
      {norm, groups, channels_last, eps, activation, alpha, beta, threshold, channel_dropout});
  p.out = z.data_ptr();
  apply(p, mean, variance, residual, shortcut);
}

// ---- backward ----

// Sums in double as a tensor of the dtype of `like`; empty where they are not wanted.
Tensor to_gradient(const ChannelProblem& p, const double* sums, const Tensor* like) {
  const int32_t dtype = compute_dtype(p.compute);
  Tensor sum = new_tensor({sums ? p.channels : 0}, dtype);
  if (!sums) return sum;
  in_compute_type(p, [&](auto zero) {
    using C = decltype(zero);
    std::transform(sums, sums + p.channels, data_of<C>(sum),
                   [](double x) { return static_cast<C>(x); });
  });
  if (dtype_of(*like) == dtype) return sum;
  Tensor out = new_tensor({p.channels}, dtype_of(*like));
  torch::stable::copy_(out, sum);
  return out;
}

// Where the gradient of the shortcut goes. Without a norm it is dz, and the tensor is empty.
Tensor new_shortcut_gradient(ChannelProblem& p, const OptionalTensor& shortcut, const Tensor& z) {
  const bool wanted = shortcut && p.norm != Norm::none;
  if (shortcut) p.shortcut = p.data_like_z(*shortcut, "shortcut");
  if (!wanted) return new_tensor({0}, dtype_of(z));
  Tensor gradient = new_tensor({z.size(0), z.size(1), z.size(2)}, dtype_of(z));
  p.dshortcut = gradient.data_ptr();
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_operator(
    Tensor dy, Tensor z, OptionalTensor mean, OptionalTensor variance, OptionalTensor count,
    OptionalTensor norm_weight, OptionalTensor norm_bias, OptionalTensor mask, OptionalTensor seed,
    int64_t wanted, bool constant, int64_t norm, int64_t groups, bool channels_last, double eps,
    int64_t activation, double alpha, double beta, int64_t threshold, bool channel_dropout,
    OptionalTensor shortcut) {
  ChannelProblem p(
      z, norm_weight, norm_bias, mask, seed,
      {norm, groups, channels_last, eps, activation, alpha, beta, threshold, channel_dropout});
  FUSED_CHECK(!(wanted & kWantBias) || p.norm != Norm::group,
              "the gradient of a bias before group norm is not offered; give z without "
              "its bias, or add it outside");
  p.dy = p.data_like_z(dy, "dy");
  const bool normed = p.norm != Norm::none;
  constant = constant || !normed;
  FUSED_CHECK(constant || !mask || count,
              "with a mask, backward needs count, as forward returned it");
  Tensor dz = new_tensor({z.size(0), z.size(1), z.size(2)}, dtype_of(z));
  p.set_out(dz);
  Tensor dshortcut = new_shortcut_gradient(p, shortcut, z);

  double* const totals = double_buffer(kTotalsSlot, 3 * p.channels);
  ChannelTotals sums{};
  if (norm_bias && normed && wanted & kWantNormBias) sums.g = totals;
  if (norm_weight && normed && wanted & kWantNormWeight) sums.gx = totals + p.channels;
  double* dbias = nullptr;
  if (wanted & kWantBias) {
    dbias = totals + 2 * p.channels;
    std::fill_n(dbias, p.channels, 0.0);  // the norm takes a bias before it out again
    if (constant) sums.gs = dbias;
  }
  in_compute_type(p, [&](auto zero) {
    using C = decltype(zero);
    const auto statistics =
        constant ? given_statistics<C>(p, mean, variance) : own_statistics<C>(p, mean, variance);
    const void* const present =
        constant ? nullptr : column_array(count, p.compute, kCountSlot, p.blocks());
    channel_backward(p, statistics, static_cast<const C*>(present), constant, sums);
  });
  return {dz, to_gradient(p, sums.gx, norm_weight ? &*norm_weight : nullptr),
          to_gradient(p, sums.g, norm_bias ? &*norm_bias : nullptr), to_gradient(p, dbias, &z),
          dshortcut};
}

std::tuple<Tensor, Tensor> sums_operator(Tensor dy, Tensor z, Tensor mean, Tensor variance,
                                         OptionalTensor norm_weight, OptionalTensor norm_bias,
                                         OptionalTensor mask, OptionalTensor seed, int64_t norm,
                                         int64_t groups, bool channels_last, double eps,
                                         int64_t activation, double alpha, double beta,
                                         int64_t threshold, bool channel_dropout,
                                         OptionalTensor shortcut) {
  ChannelProblem p(
      z, norm_weight, norm_bias, mask, seed,
      {norm, groups, channels_last, eps, activation, alpha, beta, threshold, channel_dropout});
  FUSED_CHECK(p.is_batch(), "channel_sums is for batch norm");
  p.dy = p.data_like_z(dy, "dy");
  Tensor dshortcut = new_shortcut_gradient(p, shortcut, z);
  const int64_t channels = p.channels;
  Tensor out = new_tensor({2, channels}, compute_dtype(p.compute));
  double* const sums = double_buffer(kSumsSlot, 2 * channels);
  in_compute_type(p, [&](auto zero) {
    using C = decltype(zero);
    channel_sums(p, own_statistics<C>(p, mean, variance), sums);
    std::transform(sums, sums + 2 * channels, data_of<C>(out),
                   [](double x) { return static_cast<C>(x); });
  });
  return {out, dshortcut};
}

Tensor gradient_operator(Tensor dy, Tensor z, Tensor mean, Tensor variance, Tensor sums,
                         Tensor count, OptionalTensor norm_weight, OptionalTensor norm_bias,
                         OptionalTensor mask, OptionalTensor seed, int64_t norm, int64_t groups,
                         bool channels_last, double eps, int64_t activation, double alpha,
                         double beta, int64_t threshold, bool channel_dropout) {
  ChannelProblem p(
      z, norm_weight, norm_bias, mask, seed,
      {norm, groups, channels_last, eps, activation, alpha, beta, threshold, channel_dropout});
  FUSED_CHECK(p.is_batch(), "channel_gradient is for batch norm");
  p.dy = p.data_like_z(dy, "dy");
  Tensor dz = new_tensor({z.size(0), z.size(1), z.size(2)}, dtype_of(z));
  p.set_out(dz);
  const int64_t channels = p.channels;
  double* const of_channels = double_buffer(kSumsSlot, 2 * channels);
  in_compute_type(p, [&](auto zero) {
    using C = decltype(zero);
    const C* const given =
        static_cast<const C*>(column_array(sums, p.compute, kPartialSlot, 2 * channels));
    std::copy_n(given, 2 * channels, of_channels);
    const C* const present = static_cast<const C*>(column_array(count, p.compute, kCountSlot, 1));
    channel_gradient(p, own_statistics<C>(p, mean, variance), present, of_channels);
  });
  return dz;
}

}  // namespace
}  // namespace fused

STABLE_TORCH_LIBRARY_IMPL(fused_lnad, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&fused::statistics_operator));
  m.impl("channel_forward", TORCH_BOX(&fused::forward_operator));
  m.impl("channel_apply", TORCH_BOX(&fused::apply_operator));
  m.impl("channel_apply_", TORCH_BOX(&fused::apply_inplace_operator));
  m.impl("channel_backward", TORCH_BOX(&fused::backward_operator));
  m.impl("channel_sums", TORCH_BOX(&fused::sums_operator));
  m.impl("channel_gradient", TORCH_BOX(&fused::gradient_operator));
}

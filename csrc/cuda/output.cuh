// The output stage of all kernels, and the head of its gradient, for the elements that one thread
// holds: y = activation(h)·keep + residual, or value·activation(gate)·keep + residual. What differs
// between the families is where a pack lies.
#pragma once

#include "gate.cuh"

namespace fused::cuda {

// A place says where a pack lies: at offset() behind the pointers; whole and count() as in
// load_pack; drop(dropout, values) multiplies by its part of dropout's mask.
template <class T>
struct Output {
  using C = Compute<T>;
  int64_t code;
  ActivationParameters<C> parameters;
  Dropout<C> dropout;
  bool added;  // there is a residual

  // Of a row or a channel problem, whose mask of dropout has rows of `cols` elements.
  template <class Problem>
  __device__ Output(const Problem& p, int64_t cols)
      : code(p.activation),
        parameters{static_cast<C>(p.alpha), static_cast<C>(p.beta)},
        dropout(p.seed, p.threshold, cols),
        added(p.residual) {}

  // Leaves y in out, given the activation's value.
  template <class Place, int N>
  __device__ void finish(const Place& at, C (&value)[N], const T* residual, T* out) const {
    if (dropout.threshold) at.drop(dropout, value);
    if (added) {
      C x[N];
      load_pack(residual + at.offset(), at.whole, at.count(), x);
#pragma unroll
      for (int k = 0; k < N; ++k) value[k] += x[k];
    }
    store_pack(out + at.offset(), at.whole, at.count(), value);
  }

  template <class Place, int N>
  __device__ void write(const Place& at, C (&h)[N], const T* residual, T* out) const {
    activate(code, parameters, h);
    finish(at, h, residual, out);
  }
  template <class Place, int N>
  __device__ void write_gated(const Place& at, C (&value)[N], const C (&other)[N],
                              const T* residual, T* out) const {
    gate(code, value, other);
    finish(at, value, residual, out);
  }

  // g, which is dy, becomes the gradient of h.
  template <class Place, int N>
  __device__ void gradient(const Place& at, const C (&h)[N], C (&g)[N]) const {
    activate_gradient(code, parameters, h, g);
    if (dropout.threshold) at.drop(dropout, g);
  }
  // value and other become their own gradients, given dy.
  template <class Place, int N>
  __device__ void gated_gradient(const Place& at, C (&dy)[N], C (&value)[N], C (&other)[N]) const {
    if (dropout.threshold) at.drop(dropout, dy);
    gate_gradient(code, dy, value, other);
  }
};

}  // namespace fused::cuda

// The activations and their derivatives, written once for every number type.
//
// V is a scalar or a vector of floats. The functions used here (broadcast, select, exp, expm1,
// tanh, log1p_exp, normal_cdf, gelu_gradient, reciprocal, finite) are declared next to the type, in
// cpu/math.h or cuda/math.cuh, which is included first. `gradient` takes the gradient of the value
// first and selects where torch does, so that an infinite one gives zero where the activation is
// flat. Values, breakpoints and derivatives at breakpoints are torch's; NaN goes through
// everywhere, which is why comparisons are written so that NaN takes the branch that keeps it.
// Order and codes: fused/spec.py.
#pragma once

#include "device.h"

namespace fused::FUSED_TARGET {

// alpha and beta are the activation's parameters in the order of fused/spec.py.
template <class V>
struct ActivationParameters {
  V alpha, beta;
};

struct Identity {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    return h;
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V, const ActivationParameters<V>&) {
    return g;
  }
};

struct Relu {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0);
    return select(h < zero, zero, h);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0);
    return select(h <= zero, zero, g);
  }
};

struct Relu6 {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0), six = broadcast<V>(6.0);
    return select(h < zero, zero, select(h > six, six, h));
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0);
    return select(h > zero, select(h < broadcast<V>(6.0), g, zero), zero);
  }
};

struct LeakyRelu {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>& parameters) {
    return select(h > broadcast<V>(0.0), h, h * parameters.alpha);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>& parameters) {
    return select(h > broadcast<V>(0.0), g, g * parameters.alpha);
  }
};

struct Elu {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>& parameters) {
    return select(h > broadcast<V>(0.0), h, parameters.alpha * expm1(h));
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>& parameters) {
    return select(h > broadcast<V>(0.0), g, g * (parameters.alpha * exp(h)));
  }
};

// Klambauer et al., "Self-Normalizing Neural Networks", 2017.
struct Selu {
  static constexpr double kAlpha = 1.6732632423543772848170429916717;
  static constexpr double kScale = 1.0507009873554804934193349852946;
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    return select(h > broadcast<V>(0.0), h * broadcast<V>(kScale),
                  broadcast<V>(kAlpha * kScale) * expm1(h));
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    return select(h > broadcast<V>(0.0), g * broadcast<V>(kScale),
                  g * (broadcast<V>(kAlpha * kScale) * exp(h)));
  }
};

template <class V>
FUSED_DEVICE inline V sigmoid(V h) {
  return reciprocal(broadcast<V>(1.0) + exp(-h));
}

// σ and 1 − σ, the second without cancellation. Where σ is 0, so is the second: every derivative
// has their product.
template <class V>
struct SigmoidPair {
  V value, complement;
};

template <class V>
FUSED_DEVICE inline SigmoidPair<V> sigmoid_pair(V h) {
  const V e = exp(-h);
  const V s = reciprocal(broadcast<V>(1.0) + e);
  return {s, finite(e) * s};
}

// h·Φ(h), Φ the normal distribution function.
struct Gelu {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    return h * normal_cdf(h);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    return g * gelu_gradient(h);
  }
};

// h·σ(2u), u = √(2/π)·(h + 0.044715·h³), which is 0.5·h·(1 + tanh u).
struct GeluTanh {
  static constexpr double kSlope = 1.5957691216057308;  // 2·√(2/π)
  static constexpr double kCubic = 0.044715;
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    const V square = h * h;
    return h * sigmoid(h * (broadcast<V>(kSlope * kCubic) * square + broadcast<V>(kSlope)));
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V square = h * h;
    const auto s =
        sigmoid_pair(h * (broadcast<V>(kSlope * kCubic) * square + broadcast<V>(kSlope)));
    const V slope = broadcast<V>(3.0 * kSlope * kCubic) * square + broadcast<V>(kSlope);
    return g * (s.value + h * s.value * s.complement * slope);
  }
};

struct Silu {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    return h * sigmoid(h);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const auto s = sigmoid_pair(h);
    return g * (s.value * (broadcast<V>(1.0) + h * s.complement));
  }
};

// h·tanh(softplus(h)). With e = exp(h) and n = e·(e + 2): tanh(softplus(h)) = n / (n + 2).
struct Mish {
  static constexpr double kLinear = 20.0;  // beyond it, tanh(softplus(h)) rounds to 1
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    const V two = broadcast<V>(2.0), limit = broadcast<V>(kLinear);
    const V e = exp(select(h > limit, limit, h));
    const V n = e * (e + two);
    return select(h > limit, h, h * (n * reciprocal(n + two)));
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V one = broadcast<V>(1.0), two = broadcast<V>(2.0), limit = broadcast<V>(kLinear);
    const V e = exp(select(h > limit, limit, h));
    const V n = e * (e + two);
    const V r = reciprocal(n + two);
    const V t = n * r;
    const V sech2 = broadcast<V>(4.0) * (n + one) * r * r;  // 1 − t²
    const V slope = t + h * (e * reciprocal(one + e)) * sech2;
    return select(h > limit, g, g * slope);
  }
};

struct Sigmoid {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    return sigmoid(h);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const auto s = sigmoid_pair(h);
    return g * (s.value * s.complement);
  }
};

struct Tanh {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    return tanh(h);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V t = tanh(h);
    return g * (broadcast<V>(1.0) - t * t);
  }
};

// min(max(h + 3, 0), 6) / 6
struct Hardsigmoid {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0), six = broadcast<V>(6.0), t = h + broadcast<V>(3.0);
    return select(t < zero, zero, select(t > six, six, t)) * broadcast<V>(1.0 / 6.0);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0), three = broadcast<V>(3.0);
    const V inner = select(h < three, g * broadcast<V>(1.0 / 6.0), zero);
    return select(h > -three, inner, zero);
  }
};

struct Hardswish {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>& parameters) {
    return h * Hardsigmoid::value(h, parameters);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>&) {
    const V zero = broadcast<V>(0.0), three = broadcast<V>(3.0);
    const V inner = h * broadcast<V>(1.0 / 3.0) + broadcast<V>(0.5);
    return select(h <= -three, zero, select(h >= three, g, g * inner));
  }
};

// log(1 + exp(β·h)) / β, linear where β·h exceeds the threshold; alpha is β, beta the threshold.
struct Softplus {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>& parameters) {
    const V scaled = h * parameters.alpha, zero = broadcast<V>(0.0);
    const V positive = select(scaled < zero, zero, scaled);
    const V soft = (positive + log1p_exp(select(scaled > zero, -scaled, scaled)));
    return select(scaled > parameters.beta, h, soft / parameters.alpha);
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>& parameters) {
    const V scaled = h * parameters.alpha;
    return select(scaled > parameters.beta, g, g * sigmoid(scaled));
  }
};

// relu(h)², So et al., "Primer", 2021.
struct ReluSquared {
  template <class V>
  FUSED_DEVICE static V value(V h, const ActivationParameters<V>& parameters) {
    const V r = Relu::value(h, parameters);
    return r * r;
  }
  template <class V>
  FUSED_DEVICE static V gradient(V g, V h, const ActivationParameters<V>& parameters) {
    const V r = Relu::value(h, parameters);
    return g * (r + r);
  }
};

// The activations in the order of their codes in fused/spec.py, 0 being none.
#define FUSED_FOR_EACH_ACTIVATION(apply)                                                       \
  apply(Identity) apply(Relu) apply(Relu6) apply(LeakyRelu) apply(Elu) apply(Selu) apply(Gelu) \
      apply(GeluTanh) apply(Silu) apply(Mish) apply(Sigmoid) apply(Tanh) apply(Hardswish)      \
          apply(Hardsigmoid) apply(Softplus) apply(ReluSquared)

// The gates of the gated activations in the order of their codes.
#define FUSED_FOR_EACH_GATE(apply) \
  apply(Sigmoid) apply(Silu) apply(Gelu) apply(GeluTanh) apply(Relu)

}  // namespace fused::FUSED_TARGET

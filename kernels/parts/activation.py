"""Every activation of spec.py as Triton device functions, forward and gradient side by side.

`h` is a float32 tile. Each gradient takes the incoming gradient `dy` as well, because torch selects
it (`h <= 0 ? 0 : dy`) where a product with a zero derivative would turn inf into NaN. Values at the
breakpoints are those of torch 2.13. NaN propagates; where torch itself gives NaN at ±inf (a product
∞ · 0, as in gelu(-inf)) the same product stands here.

A kernel imports `activate` and `activate_grad`, which choose by the name at compile time. PTX says
that the bare instructions of elementary.py may be used; it describes the polynomials as well.
"""

import triton
import triton.language as tl

from .elementary import LOG2_E, clamp, exp2, expm1, log1p_of_exp, normal_tail, reciprocal

# float32 constants; tl.constexpr so that jitted functions may read them.
INV_SQRT_TAU = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)


@triton.jit
def relu(h):
    return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_grad(dy, h):
    return tl.where(h <= 0.0, 0.0, dy)


@triton.jit
def relu6(h):
    return clamp(h, 0.0, 6.0)


@triton.jit
def relu6_grad(dy, h):
    return tl.where((h <= 0.0) | (h >= 6.0), 0.0, dy)


@triton.jit
def leaky_relu(h, negative_slope):
    return tl.where(h > 0.0, h, h * negative_slope)


@triton.jit
def leaky_relu_grad(dy, h, negative_slope):
    return tl.where(h > 0.0, dy, dy * negative_slope)


@triton.jit
def elu(h, alpha, PTX: tl.constexpr):
    return tl.where(h <= 0.0, alpha * expm1(h, PTX), h)


@triton.jit
def elu_grad(dy, h, alpha, PTX: tl.constexpr):
    return tl.where(h <= 0.0, dy * (alpha * exp2(h * LOG2_E, PTX)), dy)


@triton.jit
def selu(h, PTX: tl.constexpr):
    return elu(h, SELU_ALPHA, PTX) * SELU_SCALE


@triton.jit
def selu_grad(dy, h, PTX: tl.constexpr):
    return elu_grad(dy, h, SELU_ALPHA, PTX) * SELU_SCALE


@triton.jit
def gelu(h, PTX: tl.constexpr):
    q, _ = normal_tail(h, PTX)
    return h * tl.where(h >= 0.0, 1.0 - q, q)


@triton.jit
def gelu_grad(dy, h, PTX: tl.constexpr):
    q, e = normal_tail(h, PTX)
    return dy * (tl.where(h >= 0.0, 1.0 - q, q) + h * (INV_SQRT_TAU * e))


@triton.jit
def gelu_tanh(h, PTX: tl.constexpr):
    """0.5 h (1 + tanh(u)) = h sigmoid(2u), u = sqrt(2/pi) (h + 0.044715 h³)."""
    return h * reciprocal(1.0 + exp2(h * (h * h * -0.1029432407 - 2.302208198), PTX), PTX)


@triton.jit
def gelu_tanh_grad(dy, h, PTX: tl.constexpr):
    """s + h s (1 - s) 2u', s = sigmoid(2u). The bound on h² keeps ∞ · 0 away; s is 0 or 1 there."""
    hh = tl.minimum(h * h, 1e4)
    u = h * (hh * -0.1029432407 - 2.302208198)
    e = exp2(-tl.abs(u), PTX)
    r = reciprocal(1.0 + e, PTX)
    s = tl.where(h >= 0.0, r, e * r)
    return dy * (s + (h * (e * r * r)) * (0.2140644488 * hh + 1.595769122))


@triton.jit
def silu(h, PTX: tl.constexpr):
    return h * sigmoid(h, PTX)


@triton.jit
def silu_grad(dy, h, PTX: tl.constexpr):
    s = sigmoid(h, PTX)
    return dy * (s * (1.0 + h * (1.0 - s)))


@triton.jit
def mish(h, PTX: tl.constexpr):
    """h tanh(softplus(h)) = h n/(n + 2), n = w (w + 2), w = exp(h); 1 beyond h = 20."""
    w = exp2(tl.minimum(h, 20.0) * LOG2_E, PTX)
    n = w * (w + 2.0)
    return h * (n * reciprocal(n + 2.0, PTX))


@triton.jit
def mish_grad(dy, h, PTX: tl.constexpr):
    """t + h sigmoid(h) (1 - t²), t = n/(n + 2), so 1 - t² = 4 (n + 1)/(n + 2)²."""
    w = exp2(tl.minimum(h, 20.0) * LOG2_E, PTX)
    n = w * (w + 2.0)
    r = reciprocal(n + 2.0, PTX)
    slope = 4.0 * (n + 1.0) * r * r * (w * reciprocal(1.0 + w, PTX))
    return dy * (n * r + h * tl.where(h > 20.0, 0.0, slope))


@triton.jit
def sigmoid(h, PTX: tl.constexpr):
    return reciprocal(1.0 + exp2(h * -LOG2_E, PTX), PTX)


@triton.jit
def sigmoid_grad(dy, h, PTX: tl.constexpr):
    """s (1 - s) = e/(1 + e)², e = exp(-|h|), which does not cancel."""
    e = exp2(tl.abs(h) * -LOG2_E, PTX)
    r = reciprocal(1.0 + e, PTX)
    return dy * (e * r * r)


@triton.jit
def tanh(h, PTX: tl.constexpr):
    """Odd polynomial below 0.65 (fit: 6.8e-9 relative), 1 - 2/(1 + exp(2|h|)) with a sign above."""
    s = h * h
    p = ((-0.0055151558 * s + 0.0204694113) * s - 0.0536880199) * s
    p = (p + 0.1333083030) * s - 0.3333325985
    tail = 1.0 - 2.0 * reciprocal(1.0 + exp2(tl.abs(h) * (2.0 * LOG2_E), PTX), PTX)
    return tl.where(tl.abs(h) < 0.65, h + h * s * p, tl.where(h < 0.0, -tail, tail))


@triton.jit
def tanh_grad(dy, h, PTX: tl.constexpr):
    """1 - tanh² = 4e/(1 + e)², e = exp(-2|h|), which does not cancel."""
    e = exp2(tl.abs(h) * (-2.0 * LOG2_E), PTX)
    r = reciprocal(1.0 + e, PTX)
    return dy * (4.0 * e * r * r)


@triton.jit
def hardswish(h):
    return h * (tl.minimum(tl.maximum(h + 3.0, 0.0), 6.0) * (1.0 / 6.0))


@triton.jit
def hardswish_grad(dy, h):
    slope = tl.where(h < 3.0, h * (1.0 / 3.0) + 0.5, 1.0)
    return tl.where(h <= -3.0, 0.0, dy * slope)


@triton.jit
def hardsigmoid(h):
    return clamp(h + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def hardsigmoid_grad(dy, h):
    return tl.where((h > -3.0) & (h < 3.0), dy * (1.0 / 6.0), 0.0)


@triton.jit
def softplus(h, beta, threshold, PTX: tl.constexpr):
    """log(1 + exp(beta h))/beta, and h itself where beta h > threshold."""
    u = h * beta
    value = (tl.maximum(u, 0.0) + log1p_of_exp(-tl.abs(u), PTX)) * (1.0 / beta)
    return tl.where(u > threshold, h, value)


@triton.jit
def softplus_grad(dy, h, beta, threshold, PTX: tl.constexpr):
    u = h * beta
    return tl.where(u > threshold, dy, dy * sigmoid(u, PTX))


@triton.jit
def relu_squared(h):
    r = relu(h)
    return r * r


@triton.jit
def relu_squared_grad(dy, h):
    return tl.where(h <= 0.0, 0.0, dy * (2.0 * h))


@triton.jit
def activate(h, alpha, beta, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """The activation of this name (None: h itself), with its parameters in spec.py's order."""
    if ACTIVATION is None:
        return h
    elif ACTIVATION == "relu":
        return relu(h)
    elif ACTIVATION == "relu6":
        return relu6(h)
    elif ACTIVATION == "leaky_relu":
        return leaky_relu(h, alpha)
    elif ACTIVATION == "elu":
        return elu(h, alpha, PTX)
    elif ACTIVATION == "selu":
        return selu(h, PTX)
    elif ACTIVATION == "gelu":
        return gelu(h, PTX)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(h, PTX)
    elif ACTIVATION == "silu":
        return silu(h, PTX)
    elif ACTIVATION == "mish":
        return mish(h, PTX)
    elif ACTIVATION == "sigmoid":
        return sigmoid(h, PTX)
    elif ACTIVATION == "tanh":
        return tanh(h, PTX)
    elif ACTIVATION == "hardswish":
        return hardswish(h)
    elif ACTIVATION == "hardsigmoid":
        return hardsigmoid(h)
    elif ACTIVATION == "softplus":
        return softplus(h, alpha, beta, PTX)
    elif ACTIVATION == "relu_squared":
        return relu_squared(h)
    else:
        tl.static_assert(False, "activate: unknown activation")


@triton.jit
def activate_grad(dy, h, alpha, beta, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """The gradient with respect to h of `activate`, given the gradient dy of its result."""
    if ACTIVATION is None:
        return dy
    elif ACTIVATION == "relu":
        return relu_grad(dy, h)
    elif ACTIVATION == "relu6":
        return relu6_grad(dy, h)
    elif ACTIVATION == "leaky_relu":
        return leaky_relu_grad(dy, h, alpha)
    elif ACTIVATION == "elu":
        return elu_grad(dy, h, alpha, PTX)
    elif ACTIVATION == "selu":
        return selu_grad(dy, h, PTX)
    elif ACTIVATION == "gelu":
        return gelu_grad(dy, h, PTX)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh_grad(dy, h, PTX)
    elif ACTIVATION == "silu":
        return silu_grad(dy, h, PTX)
    elif ACTIVATION == "mish":
        return mish_grad(dy, h, PTX)
    elif ACTIVATION == "sigmoid":
        return sigmoid_grad(dy, h, PTX)
    elif ACTIVATION == "tanh":
        return tanh_grad(dy, h, PTX)
    elif ACTIVATION == "hardswish":
        return hardswish_grad(dy, h)
    elif ACTIVATION == "hardsigmoid":
        return hardsigmoid_grad(dy, h)
    elif ACTIVATION == "softplus":
        return softplus_grad(dy, h, alpha, beta, PTX)
    elif ACTIVATION == "relu_squared":
        return relu_squared_grad(dy, h)
    else:
        tl.static_assert(False, "activate_grad: unknown activation")

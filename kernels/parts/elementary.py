"""Elementary functions of float32 tiles, from which the activations are made.

With PTX (NVIDIA only) exponential and reciprocal are the bare hardware instructions without the
denormal fix-ups around them: relative errors 2^-22 and 2^-23 (PTX ISA, ex2.approx.ftz and
rcp.approx.ftz); what they flush to zero lies below 1e-38. GELU adds 22 instructions an element
without, 15 with (static: sm_90, triton 3.7.1, forward of 4096 columns against no activation).

The polynomials are own minimax fits (Lawson's algorithm on Chebyshev nodes, float64); each states
its error. tests/triton/interpreted/test_activation_kernels.py measures them against float64.
"""

import triton
import triton.language as tl

# float32; tl.constexpr so that jitted functions may read it.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2^x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.math.exp2(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def clamp(x, low: tl.constexpr, high: tl.constexpr):
    """Clamp that keeps NaN, as torch's does."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def expm1(x, PTX: tl.constexpr):
    """exp(x) - 1 for x ≤ 0, exact in relative terms near 0 (fit on [-0.5, 0]: 1.6e-9 relative)."""
    p = ((0.0011259224 * x + 0.0081932951) * x + 0.0416320483) * x
    p = (p + 0.1666628876) * x + 0.4999998647
    return tl.where(x > -0.5, x + x * x * p, exp2(x * LOG2_E, PTX) - 1.0)


@triton.jit
def log1p_of_exp(x, PTX: tl.constexpr):
    """log(1 + exp(x)) for x ≤ 0, as 2 atanh(s) with s = e/(2 + e) (fit: 4.6e-9 relative)."""
    e = exp2(x * LOG2_E, PTX)
    s = e * reciprocal(2.0 + e, PTX)  # [0, 1/3]
    q = s * s
    p = ((0.1401222975 * q + 0.1399957046) * q + 0.2001084954) * q + 0.3333320657
    return 2.0 * (s + s * q * p)


@triton.jit
def normal_tail(h, PTX: tl.constexpr):
    """(q, e): q = 1 - Φ(|h|), the upper tail of the normal distribution, and e = exp(-h²/2).

    q = t P(t) e with t = 1/(1 + 0.28 |h|), the form of Abramowitz and Stegun 7.1.26 with one
    term more. Error of the fit: 1.9e-8 absolute; relative 1.3e-5 for |h| < 4, 3.6e-3 at 13.
    Eager's Φ = gelu(h)/h in float32 (torch 2.13, CPU), |h| < 4: 2.5e-7 absolute, 9e-4 relative.
    """
    t = reciprocal(1.0 + 0.28 * tl.abs(h), PTX)
    e = exp2(h * h * (-0.5 * LOG2_E), PTX)
    p = ((-0.1071170979 * t + 0.3952859142) * t - 0.2458874307) * t
    p = ((p + 0.2761697636) * t + 0.0645545112) * t + 0.1169943204
    return p * t * e, e

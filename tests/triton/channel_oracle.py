"""The cases of tests/channel_cases.py, run by the launchers of fused.kernels.channel.

They are called as the dispatcher calls them for CUDA tensors: the functions that ops.py registers,
with the operators' own lists of arguments.
"""

from __future__ import annotations

from types import SimpleNamespace

from fused import spec
from fused.backends import launchers

# In place of the operators, which find the C++ kernels for CPU tensors.
LAUNCHERS = SimpleNamespace(
    **launchers.TRITON,
    WANT_NORM_WEIGHT=spec.WANT_NORM_WEIGHT,
    WANT_NORM_BIAS=spec.WANT_NORM_BIAS,
    WANT_BIAS=spec.WANT_BIAS,
)

"""What autocast does to the dtypes of a chain: as it does to those of nn.Sequential."""

from __future__ import annotations

import torch
from torch import Tensor

_AUTOCAST_DEVICES = ("cpu", "cuda")
# What CUDA autocast computes, and returns, in float32 (ATen/autocast_mode.h): these norms;
# softplus, and pow, which square is.
_CUDA_FLOAT32_NORMS = ("layer", "rms", "group")
_CUDA_FLOAT32_ACTIVATIONS = ("softplus", "relu_squared")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives a matrix product on this device; None where it is off."""
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast_by_autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t as autocast would pass it to a matrix product; float64 is never cast."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def float32_under_autocast(
    device_type: str, dtype: torch.dtype, norm: str | None, activation: str | None = None
) -> bool:
    """Whether autocast makes eager's norm or activation read `dtype` as float32."""
    if device_type != "cuda":
        return False
    if norm not in _CUDA_FLOAT32_NORMS and activation not in _CUDA_FLOAT32_ACTIVATIONS:
        return False
    return dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cuda")

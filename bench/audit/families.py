"""Every family of kernels; one entry here adds a family to all that the audit does."""

from __future__ import annotations

from . import (
    add_norm_family,
    channel_family,
    gated_family,
    gemm_family,
    pair_family,
    row_family,
    shortcut_family,
)
from .family import Family

FAMILIES: list[Family] = [
    row_family.FORWARD,
    row_family.BACKWARD,
    add_norm_family.FORWARD,
    add_norm_family.BACKWARD,
    channel_family.FORWARD,
    channel_family.BACKWARD,
    gemm_family.FORWARD,
    gated_family.FORWARD,
    gated_family.BACKWARD,
    pair_family.FORWARD,
    pair_family.BACKWARD,
    *shortcut_family.FAMILIES,
]

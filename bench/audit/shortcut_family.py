"""Calls of the row and channel kernels with a shortcut between norm and activation.

Forward one more tensor is read, backward one more is read and one more written. The properties are
those of row_family.py and channel_family.py, with fewer values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fused.spec import WANT_NORM_BIAS, WANT_NORM_WEIGHT

from . import channel_family, row_family
from .channel_family import SMALL_SCENES
from .family import Family

_FEWER = {
    "shortcut": (True,),
    "activation": ("gelu", "relu", None),
    "parameters": ("float32", "none"),
}


def _with_shortcut(family: Family, headlines: list[dict[str, Any]], **different: Any) -> Family:
    return replace(
        family,
        name=f"{family.name} with shortcut",
        properties=dict(family.properties) | _FEWER | different,
        headlines=headlines,
    )


_WIDTHS = [{}, *({"width": width} for width in (64, 1024, 8192, 16384))]
_TWO_SUMS = {"width": 8192, "wanted": WANT_NORM_WEIGHT | WANT_NORM_BIAS}
ROW_FORWARD = _with_shortcut(row_family.FORWARD, [*_WIDTHS, {"width": 32768}])
ROW_BACKWARD = _with_shortcut(
    row_family.BACKWARD,
    [*_WIDTHS, {"width": 8192, "wanted": 0}, _TWO_SUMS, _TWO_SUMS | {"dtype": "fp32"}],
)

_SCENES = ("batch planar", "batch last", "group held last", "group loop planar")
_HEADLINES = [{"scene": name} for name in _SCENES]
_SCENES += ("group loop half last", "group held planar", "group loop last", "group split last")
_SCENES += ("instance held planar", "no norm planar", "batch narrow", "group narrow")
_SMALL = [*SMALL_SCENES, "group looped by half, channels last"]
_SMALL.remove("group looped, channels last")
CHANNEL_FORWARD, CHANNEL_BACKWARD = (
    replace(
        _with_shortcut(family, _HEADLINES, scene=_SCENES),
        small={name: {"scene": name} for name in _SMALL},
    )
    for family in (channel_family.FORWARD, channel_family.BACKWARD)
)
FAMILIES = [ROW_FORWARD, ROW_BACKWARD, CHANNEL_FORWARD, CHANNEL_BACKWARD]

"""Calls of the channel kernels: batch, group and instance norm, in both layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fused.kernels.channel.backward import channel_backward
from fused.kernels.channel.forward import channel_apply, channel_forward
from torch import Tensor

from fused.spec import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT, Spec, make_spec

from .covering import Case
from .family import DTYPES, Family, Make


class Scene(NamedTuple):
    """A norm and what it runs on; `groups` counts for group norm alone."""

    norm: str | None
    last: bool
    samples: int
    channels: int
    positions: int
    groups: int = 32


# For each way that kernels/tuning/channel.py can choose one or more, in both layouts: z walked
# over, groups held in a tile, groups looped over, groups shared by programs. "narrow": rows of
# memory that are no multiples of 16 bytes.
SCENES = {
    "batch planar": Scene("batch", False, 8, 64, 3136),
    "batch last": Scene("batch", True, 8, 64, 3136),
    "group held last": Scene("group", True, 64, 256, 196),
    "group loop planar": Scene("group", False, 64, 256, 3136),
    "group held planar": Scene("group", False, 64, 512, 16, 1),
    "group loop last": Scene("group", True, 512, 256, 1024, 8),
    "group split planar": Scene("group", False, 8, 320, 4096),
    "group split last": Scene("group", True, 8, 320, 4096),
    "group held short": Scene("group", True, 64, 256, 49),
    "group held rows": Scene("group", True, 4096, 512, 1),
    "instance held planar": Scene("instance", False, 16, 64, 3136),
    "instance loop planar": Scene("instance", False, 16, 64, 12544),
    "instance held last": Scene("instance", True, 64, 256, 196),
    "instance split planar": Scene("instance", False, 2, 16, 2**20),
    "no norm planar": Scene(None, False, 8, 64, 3136),
    "batch narrow": Scene("batch", False, 64, 512, 49),
    "group narrow": Scene("group", False, 64, 256, 196),
    "instance narrow": Scene("instance", True, 8, 30, 100),
}
SMALL_SCENES = {
    "batch, planar": Scene("batch", False, 2, 16, 1000),
    "batch, channels last": Scene("batch", True, 2, 64, 500),
    "group held, planar": Scene("group", False, 2, 16, 72, 2),
    "group held, channels last": Scene("group", True, 2, 64, 64, 8),
    "group looped, planar": Scene("group", False, 1, 8, 5000, 2),
    "group looped, channels last": Scene("group", True, 1, 32, 2048, 1),
    "group split, channels last": Scene("group", True, 2, 48, 1000, 16),
    "instance, planar": Scene("instance", False, 2, 16, 72),
    "no norm, planar": Scene(None, False, 2, 16, 72),
}
# Behind a shortcut a loop holds half as much in backward (shortcut_family.py).
HALF_SCENES = {
    "group loop half last": Scene("group", True, 512, 256, 512, 8),
    "group looped by half, channels last": Scene("group", True, 1, 32, 1024, 1),
}
_EVERY_SCENE = SCENES | SMALL_SCENES | HALF_SCENES
# The device functions of activations are those of the row kernels, which meet all of them; these
# are the cheapest and the dearest in registers.
_COMMON = {
    "scene": tuple(SCENES),
    "activation": ("gelu", None, "relu", "mish"),
    "dropout": ("elements", None, "channels"),
    "dtype": tuple(DTYPES),
    "given": (None, "mask", "statistics"),
    "parameters": ("float32", "none", "same"),
}


def _excluded(case: Case) -> bool:
    scene = _EVERY_SCENE[case["scene"]] if "scene" in case else None
    if scene is None:
        return False
    # Padding is there channels last alone. Statistics are given in evaluation, to batch norm. Where
    # a tile has one parameter for each of its rows, one of 16 bits is a narrow access.
    return (
        (case.get("given") == "mask" and not scene.last)
        or (case.get("given") == "statistics" and scene.norm != "batch")
        or (case.get("parameters") == "same" and not scene.last)
    )


class _Call:
    """The tensors of a case, and its epilogue."""

    def __init__(self, case: Case, make: Make):
        scene = self.scene = _EVERY_SCENE[case["scene"]]
        rows = (scene.positions, scene.channels) if scene.last else scene[3:5]
        shape = (scene.samples, *rows)
        self.case, self.make, self.float32 = case, make, DTYPES["fp32"]
        groups = scene.groups if scene.norm == "group" else scene.channels
        p = 0.1 if case["dropout"] else 0.0
        epilogue = make_spec(scene.norm, 1e-5, case["activation"], p)
        self.codes = Spec(
            *epilogue[:6],
            groups=groups,
            channels_last=scene.last,
            channel_dropout=case["dropout"] == "channels",
        ).channel
        self.shape = shape
        kind = case["parameters"]
        parameter = DTYPES[case["dtype"]] if kind == "same" else self.float32
        self.parameters = tuple(
            None if kind == "none" else make((scene.channels,), parameter) for _ in range(2)
        )
        masked = case["given"] == "mask"
        self.mask = make((scene.samples, scene.positions), torch.bool) if masked else None
        self.seed = make((1,), torch.int64)
        self.groups = groups

    def z(self) -> Tensor:
        return self.make(self.shape, DTYPES[self.case["dtype"]])

    def shortcut(self) -> Tensor | None:
        return self.z() if self.case.get("shortcut") else None

    def statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """mean, variance, count."""
        if self.scene.norm is None:
            return None, None, None
        rows = 1 if self.scene.norm == "batch" else self.scene.samples
        mean, variance = (self.make((rows, self.groups), self.float32) for _ in range(2))
        return mean, variance, None if self.mask is None else self.make((rows,), self.float32)


def _forward(case: Case, make: Make) -> object:
    call = _Call(case, make)
    residual = call.z() if case["residual"] else None
    rest = (*call.parameters, residual, call.mask, call.seed, *call.codes, call.shortcut())
    if call.scene.norm is None or case["given"] == "statistics":
        return channel_apply(call.z(), *call.statistics()[:2], *rest)
    return channel_forward(call.z(), *rest)


def _backward(case: Case, make: Make) -> object:
    call = _Call(case, make)
    wanted = 0
    if case["wanted"]:
        wanted = WANT_NORM_WEIGHT | WANT_NORM_BIAS
        wanted |= 0 if call.scene.norm == "group" else WANT_BIAS
    constant = case["given"] == "statistics"
    codes = (*call.codes, call.shortcut())
    rest = (*call.parameters, call.mask, call.seed, wanted, constant, *codes)
    return channel_backward(call.z(), call.z(), *call.statistics(), *rest)


_HEADLINES = [{"scene": name} for name in list(SCENES)[:4]]
FORWARD = Family(
    name="channel forward",
    properties=_COMMON | {"residual": (False, True)},
    headlines=_HEADLINES,
    small={name: {"scene": name, "residual": True} for name in SMALL_SCENES},
    call=_forward,
    excluded=_excluded,
)
BACKWARD = Family(
    name="channel backward",
    properties=_COMMON | {"wanted": (True, False)},
    headlines=_HEADLINES,
    small={name: {"scene": name} for name in SMALL_SCENES},
    call=_backward,
    excluded=_excluded,
)

"""What the explicit blocks (nn.py) have in common: a Sequential made from names and options."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.jagged import is_jagged, like, values_of, values_of_added
from ..modules.norms import MASKED_NORMS, ChannelDropout
from ..run.checks import check_mask, check_parameter
from ..run.recording import is_plain
from .chain import Chain
from .grammar import NO_PART, NORM
from .guard import KIND_OF, NORM_OF
from .sequential import Sequential


class Built(Sequential):
    """A Sequential whose constructor takes no children, so that a slice is a plain Sequential."""

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return Sequential(OrderedDict([*self._modules.items()][idx]))
        return super().__getitem__(idx)


class Block(Built):
    """A Sequential that is one chain, with what is added and a mask of positions as inputs."""

    channel_dim = -1

    def __init__(self, children: dict[str, nn.Module | None]) -> None:
        super().__init__()
        for name, child in children.items():
            if child is not None:
                self.add_module(name, child)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> Tensor:
        """The block.

        Args:
            input: a tensor, or a jagged nested tensor (batch, ragged, features).
            residual: of the output's shape, added last.
            mask: bool, the shape of the input without its features: positions where it is false
                (padding) take no part in statistics and come out as zero.
            shortcut: of the shape of the norm's result, added to it in front of the activation.

        Raises:
            TypeError: residual or shortcut is not a floating-point tensor, mask not a boolean one.
            ValueError: one of them has another shape or device than it must; mask with channels in
                dimension 1; a jagged input for group or instance norm.
        """
        operation = type(self).__name__
        if is_jagged(input):
            drops = isinstance(self._modules.get("dropout"), ChannelDropout)
            norm = NORM_OF.get(type(self._modules.get("norm")))
            values = values_of(operation, input, norm, mask, drops)
            added = values_of_added(operation, input, residual=residual, shortcut=shortcut)
            return like(input, self(values, **added))
        if residual is None and mask is None and shortcut is None:
            return super().forward(input)
        if mask is not None:
            check_mask(operation, mask, input, self.channel_dim)
        steps = self._current_steps()
        step = steps[0] if len(steps) == 1 else None
        if isinstance(step, Chain) and all(t is None or is_plain(t) for t in (residual, shortcut)):
            shapes = step.output_shapes(input)
            if shapes is not None:
                check_parameter(operation, "shortcut", shortcut, shapes[0], input)
                check_parameter(operation, "residual", residual, shapes[1], input)
                return step(input, residual, mask, shortcut)
        y = input
        for child in self.children():
            if shortcut is not None and KIND_OF.get(type(child), NO_PART) > NORM:
                y, shortcut = y + shortcut, None
            y = child(y, mask) if mask is not None and type(child) in MASKED_NORMS else child(y)
        y = y if shortcut is None else y + shortcut
        if residual is not None:
            check_parameter(operation, "residual", residual, tuple(y.shape), y)
            y = residual + y
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)

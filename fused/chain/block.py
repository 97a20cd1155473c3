"""What the explicit blocks (nn.py) have in common: a Sequential made from names and options."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.jagged import is_jagged, like, residual_values, values_of
from ..modules.norms import MASKED_NORMS, ChannelDropout
from ..run.checks import check_mask, check_residual
from ..run.recording import is_plain
from .chain import Chain
from .guard import NORM_OF
from .sequential import Sequential


class Built(Sequential):
    """A Sequential whose constructor takes no children, so that a slice is a plain Sequential."""

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return Sequential(OrderedDict([*self._modules.items()][idx]))
        return super().__getitem__(idx)


class Block(Built):
    """A Sequential that is one chain, with a residual input and a mask of positions."""

    channel_dim = -1

    def __init__(self, children: dict[str, nn.Module | None]) -> None:
        super().__init__()
        for name, child in children.items():
            if child is not None:
                self.add_module(name, child)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The block.

        Args:
            input: a tensor, or a jagged nested tensor (batch, ragged, features).
            residual: of the output's shape, added last.
            mask: bool, the shape of the input without its features: positions where it is false
                (padding) take no part in statistics and come out as zero.

        Raises:
            TypeError: residual is not a floating-point tensor, mask not a boolean one.
            ValueError: one of them has another shape or device than it must; mask with channels in
                dimension 1; a jagged input for group or instance norm.
        """
        operation = type(self).__name__
        if is_jagged(input):
            drops = isinstance(self._modules.get("dropout"), ChannelDropout)
            norm = NORM_OF.get(type(self._modules.get("norm")))
            values = values_of(operation, input, norm, mask, drops)
            return like(input, self(values, residual_values(operation, input, residual)))
        if residual is None and mask is None:
            return super().forward(input)
        if mask is not None:
            check_mask(operation, mask, input, self.channel_dim)
        steps = self._current_steps()
        step = steps[0] if len(steps) == 1 else None
        if isinstance(step, Chain) and (residual is None or is_plain(residual)):
            shape = step.output_shape(input)
            if shape is not None:
                if residual is not None:
                    check_residual(operation, residual, shape, input)
                return step(input, residual, mask)
        y = input
        for child in self.children():
            y = child(y, mask) if mask is not None and type(child) in MASKED_NORMS else child(y)
        if residual is not None:
            check_residual(operation, residual, tuple(y.shape), y)
            y = residual + y
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)

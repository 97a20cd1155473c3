"""Backward of the channel norms: which kernels make which gradients.

A shortcut's gradient is that of what the norm gives, g: the first kernel that finds g writes it,
and a second one, where there is one, reads it in place of dy, with nothing behind the norm.

Sums over programs are finished in a second stage and a fixed order: no atomics, the bits repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ...spec import WANT_BIAS, WANT_NORM_BIAS, WANT_NORM_WEIGHT
from ..parts.column_sum import sum_columns
from ..tuning import channel as channel_tuning
from ..tuning import rules as tuning
from .gradient import Made, walk_backward
from .group_sums import group_sums
from .held_backward import _channel_held_bwd_kernel
from .loop_backward import _channel_loop_bwd_kernel
from .problem import Problem, problem_of


def _total_sums(partial: Tensor, wanted: Sequence[Tensor | None]) -> None:
    """wanted[i] (channels,) = partial[i] of (sums, …, channels), all added up; None: not needed."""
    if any(t is not None for t in wanted):
        channels = partial.shape[-1]
        outputs = [partial.new_empty(channels) if t is None else t for t in wanted]
        with tuning.device_of(partial):
            sum_columns(partial.flatten(1, -2), outputs)


def _with_shortcut(
    dy: Tensor, shortcut: Tensor | None, problem: Problem
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor]:
    """dy, the shortcut and where its gradient goes as the kernels take them, and as a result."""
    empty = shortcut is None or problem.norm is None
    dshortcut = dy.new_empty((0,) if empty else dy.shape)
    return (dy, shortcut, dshortcut if dshortcut.numel() else None), dshortcut


def _group_backward(
    way: str,
    inputs: tuple[Any, ...],
    count: Tensor | None,
    dz: Tensor,
    with_sums: bool,
    problem: Problem,
    tile: channel_tuning.GroupTile,
) -> Tensor:
    """Writes dz; inputs: as `walk_backward`. Returns float32 (2, programs, channels), of g and g x̂.

    The result is empty without `with_sums`.
    """
    device = tuning.device(dz)
    blocks = triton.cdiv(problem.groups, tile.groups)
    kernel, programs, options = _channel_loop_bwd_kernel, problem.samples, {}
    if way == "held":
        kernel = _channel_held_bwd_kernel
        programs = channel_tuning.held_programs(problem.samples, blocks, tile, device)
        options = channel_tuning.register_options(tile, device)
    shape = (2 if with_sums else 0, programs, problem.channels)
    partial = dz.new_empty(shape, dtype=torch.float32)
    with tuning.device_of(dz):
        kernel[(programs * blocks,)](
            *(*inputs, count, dz, partial if with_sums else None),
            *(problem.samples, problem.channels, problem.positions, problem.groups),
            *(problem.scalars, problem.threshold),
            FORM=problem.form(device, inputs[4]),
            TILE=problem.tile_form(tile),
            num_warps=tile.num_warps,
            **options,
        )
    return partial


def _statistics_gradient(
    inputs: tuple[Any, ...],
    count: Tensor | None,
    wanted: tuple[Tensor | None, Tensor | None],
    dz: Tensor,
    problem: Problem,
) -> None:
    """Gradients through statistics that depend on z; wanted: dnorm_bias and dnorm_weight."""
    _, shortcut, dshortcut = inputs[0]
    device = tuning.device(dz)
    way, tile = problem.group_tile(True, device, shortcut is not None)
    if tile is not None:
        asked = any(t is not None for t in wanted)
        partial = _group_backward(way, inputs, count, dz, asked, problem, tile)
        if asked:
            _total_sums(partial, wanted)
        return
    partial = walk_backward(inputs, problem, made=Made(g=True, gx=True))
    if problem.shared:
        # A gradient of float32 serves as the sum that dz needs as well.
        sums = [
            t if t is not None and t.dtype == torch.float32 else partial.new_empty(problem.channels)
            for t in wanted
        ]
        _total_sums(partial, sums)
        missing = [t for t in wanted if t is not None and t.dtype != torch.float32]
    else:
        sums = list(group_sums(partial, inputs[3][0], problem))
        missing = [t for t in wanted if t is not None]
    if missing:
        _total_sums(partial, wanted)
    if shortcut is not None:
        inputs = ((dshortcut, None, None), *inputs[1:5], None)
        problem = replace(problem, activation=None, threshold=0)
    walk_backward(inputs, problem, sums=(sums[0], sums[1]), count=count, dz=dz)


def channel_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    count: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    wanted: int,
    constant: bool,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    channel_dropout: bool,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `channel_forward` or `channel_apply`, given the gradient dy of its result.

    Args:
        dy, z, shortcut: three dimensions, contiguous; one dtype.
        mean, variance: as the forward had them.
        count: the elements behind each statistic, (samples,) or (1,); None: from the shape.
        wanted: sum of the WANT_ constants: the sums to make. WANT_BIAS is for a bias that z
            contains, one for each channel.
        constant: mean and variance do not depend on z.
        The others are those of the forward.

    Returns:
        dz of z's shape and dtype; dnorm_weight and dnorm_bias, (channels,) in the dtypes of their
        parameters, and dbias, (channels,) in z's dtype. Those that are not wanted, or whose
        parameter does not exist, are float32 and empty, (0,). dshortcut as dz, (0,) without a
        shortcut, and without a norm: it is dz.

    Raises:
        ValueError: a bias in front of group norm, whose gradient is not a sum of what is at hand.
    """
    scalars = (norm, groups, channels_last, eps, activation, alpha, beta, threshold)
    problem = problem_of(z.shape, z.element_size(), mean, *scalars, channel_dropout)
    constant = constant or problem.norm is None
    if problem.norm == "group" and not constant and wanted & WANT_BIAS:
        raise ValueError(
            "channel_backward: the gradient of a bias in front of group norm is not offered,"
            " got wanted & WANT_BIAS; take dz.sum over samples and positions"
        )
    if problem.norm is None:
        norm_weight = norm_bias = mean = variance = None
    dz = z.new_empty(z.shape)
    incoming, dshortcut = _with_shortcut(dy, shortcut, problem)
    # A sum takes the dtype of its owner; zeros stay where there is nothing to add up, and where the
    # norm takes the bias out again.
    owners = (
        norm_weight if wanted & WANT_NORM_WEIGHT else None,
        norm_bias if wanted & WANT_NORM_BIAS else None,
        z if wanted & WANT_BIAS else None,
    )
    stays = (z.numel() == 0, z.numel() == 0, z.numel() == 0 or not constant)
    dnorm_weight, dnorm_bias, dbias = (
        None if owner is None else (owner.new_zeros if zero else owner.new_empty)(problem.channels)
        for owner, zero in zip(owners, stays, strict=True)
    )
    seed = seed if threshold else None
    inputs = (incoming, z, (mean, variance), (norm_weight, norm_bias), mask, seed)
    if z.numel() and constant:
        sums = (dnorm_bias, dnorm_weight, dbias)
        made = Made(dnorm_bias is not None, dnorm_weight is not None, dbias is not None)
        partial = walk_backward(inputs, problem, made=made, dz=dz)
        _total_sums(partial, [t for t in sums if t is not None])
    elif z.numel():
        _statistics_gradient(inputs, count, (dnorm_bias, dnorm_weight), dz, problem)

    def made_or_empty(gradient: Tensor | None) -> Tensor:
        return z.new_empty((0,), dtype=torch.float32) if gradient is None else gradient

    dnorm_weight, dnorm_bias = made_or_empty(dnorm_weight), made_or_empty(dnorm_bias)
    return dz, dnorm_weight, dnorm_bias, made_or_empty(dbias), dshortcut


def channel_sums(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    channel_dropout: bool,
    shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums of batch norm's backward, float32 (2, channels), of g and of g x̂; and dshortcut.

    The arguments are those of `channel_backward`, mean and variance (1, channels); dshortcut too.
    """
    scalars = (norm, groups, channels_last, eps, activation, alpha, beta, threshold)
    problem = problem_of(z.shape, z.element_size(), mean, *scalars, channel_dropout)
    incoming, dshortcut = _with_shortcut(dy, shortcut, problem)
    if z.numel() == 0:
        return z.new_zeros((2, problem.channels), dtype=torch.float32), dshortcut
    sums = z.new_empty((2, problem.channels), dtype=torch.float32)
    seed = seed if threshold else None
    inputs: tuple[Any, ...] = (incoming, z, (mean, variance), (norm_weight, norm_bias), mask, seed)
    _total_sums(walk_backward(inputs, problem, made=Made(g=True, gx=True)), [sums[0], sums[1]])
    return sums, dshortcut


def channel_gradient(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    variance: Tensor,
    sums: Tensor,
    count: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    norm: int,
    groups: int,
    channels_last: bool,
    eps: float,
    activation: int,
    alpha: float,
    beta: float,
    threshold: int,
    channel_dropout: bool,
) -> Tensor:
    """dz of batch norm, of z's shape and dtype, by the sums of all processes together.

    The arguments are those of `channel_sums`; sums (2, channels) and count (1,) are floating point.
    Behind a shortcut, dy is dshortcut, and there is no activation and no dropout.
    """
    scalars = (norm, groups, channels_last, eps, activation, alpha, beta, threshold)
    problem = problem_of(z.shape, z.element_size(), mean, *scalars, channel_dropout)
    dz = z.new_empty(z.shape)
    if z.numel():
        seed = seed if threshold else None
        inputs = ((dy, None, None), z, (mean, variance), (norm_weight, norm_bias), mask, seed)
        walk_backward(inputs, problem, sums=(sums[0], sums[1]), count=count, dz=dz)
    return dz

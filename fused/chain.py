"""A run of children that runs as one operation, where the guard lets it.

The guard decides at every call, in full (stages.py) or, for an input like the last, in short.
Anything may have been done to a child between two calls: hooks, a replaced forward, another class,
a parametrised or pruned or quantised weight. A chain that the guard stops runs its children one by
one, exactly as nn.Sequential would, and remembers why.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _hooks

from . import backend, guard
from .autocast import autocast_dtype
from .autograd import Codes
from .dispatch import (
    apply_linear_row,
    apply_row,
    default_eps,
    linear_chain,
    make_codes,
)
from .dispatch import chain as run_chain
from .guard import FORWARD_OF, activation_of
from .norms import MASKED_NORMS
from .random import draw_seed
from .recording import (
    PLAIN_TENSORS,
    functorch_active,
    is_compiling,
    is_tracing,
    recorded_plain,
)
from .stages import Stages

_autocast_enabled = torch._C._is_any_autocast_enabled
requested = backend.request.get
_STRIDED = torch.strided
_ABSENT = -1  # the address of a parameter that is None


def _no_tensor() -> None:
    return None


@dataclass
class Chain(Stages):
    """A run of children that can be one operation.

    `fused_calls` and `unfused_calls` count eager calls, not compiled ones; `reason` says why the
    last call, when it was unfused, was.
    """

    # What the last input that passed the guard looked like, and what it met; one tuple, because
    # other threads read it.
    passed: tuple[Any, ...] | None = None
    fused_calls: int = 0
    unfused_calls: int = 0
    reason: str = ""

    def _remember(self, x: Tensor) -> None:
        """Notes an input that passed, so that its like needs only the short guard.

        Parameters and buffers are held weakly: those of a functional call must not outlive it.
        """
        shape = self._shape_for_short_guard(x)
        if shape is None or len(getattr(self.norm, "normalized_shape", ())) > 1:
            return
        watched = []
        for child, kind in zip(self.children, self.types, strict=True):
            tensors = [
                (held, name, _no_tensor, _ABSENT)
                if t is None
                else (held, name, weakref.ref(t), t.data_ptr())
                for held in ("_parameters", "_buffers")
                for name, t in child.__dict__[held].items()
            ]
            watched.append((child, kind, FORWARD_OF[kind], tensors))
        values = [(read, child, read(child)) for read, child in self._readers()]
        scalars = self._scalars(x.dtype)
        self.passed = x.dtype, x.device, shape, requested(), watched, values, scalars

    def _readers(self) -> list[tuple[Callable[[Any], Any], nn.Module]]:
        """What reads that which may change about a child, and the child."""
        readers: list[tuple[Callable[[Any], Any], nn.Module]] = []
        if self.attributes is not None and self.activation is not None:
            readers.append((self.attributes, self.activation))
        if self.norm is not None:
            readers.append((guard.norm_shapes, self.norm))
        return readers

    def _shape_for_short_guard(self, x: Tensor) -> Any:
        """What must be the same of two inputs' shapes; None where only the full guard can tell."""
        shape = x.shape
        if not shape or (self.norm is None and self.linear is None and not x.is_contiguous()):
            return None
        return (len(shape), shape[-1]) if self.gated else shape[-1]

    def _passes_again(self, x: Any, passed: tuple[Any, ...]) -> Codes | None:
        """The operators' scalars, if the children are untouched, and input, parameters and buffers
        look as they did; else None. The caller has compared the children's classes.

        A tensor that is the same object with the same memory has kept its dtype, device and shape;
        nn.Module.to changes the memory of the same object.
        """
        dtype, device, shape, asked, watched, values, (eps, p, codes) = passed
        if not self._looks_like(x, dtype, device, asked):
            return None
        if self._shape_for_short_guard(x) != shape:
            return None
        for child, kind, forward, tensors in watched:
            own = child.__dict__
            if guard.touched(own, kind, forward):
                return None
            for held, name, reference, address in tensors:
                t = own[held].get(name, self)
                if t is not reference() or (_ABSENT if t is None else t.data_ptr()) != address:
                    return None
        for read, child, value in values:
            if read(child) != value:
                return None
        norm, dropout = self.norm, self.dropout
        if norm is not None and norm.eps != eps:
            return self._other_codes(passed)
        now = dropout.p if dropout is not None and dropout.training else 0.0
        return codes if now == p else self._other_codes(passed)

    def _looks_like(self, x: Any, dtype: torch.dtype, device: torch.device, asked: str) -> bool:
        """Whether x is a plain tensor of this dtype and device, and the circumstances are plain."""
        return not (
            type(x) not in PLAIN_TENSORS
            or x.dtype is not dtype
            or x.device != device
            or x.is_nested
            or x.layout is not _STRIDED
            or requested() is not asked
            or _hooks._global_forward_hooks
            or _hooks._global_forward_pre_hooks
            or _hooks._global_backward_hooks
            or _hooks._global_backward_pre_hooks
            or _autocast_enabled()
        )

    def _other_codes(self, passed: tuple[Any, ...]) -> Codes:
        """The scalars, where eps or p is not what was remembered; and remembers them."""
        *rest, _ = passed
        scalars = self._scalars(passed[0])
        self.passed = (*rest, scalars)
        return scalars[2]

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if is_compiling() or functorch_active() or forward_ad._current_level >= 0:
            if recorded_plain() or self.static_reason() or self.input_reason(x):
                return self._one_by_one(x, residual, mask)
            return self.run(x, residual, None, mask)
        if is_tracing():
            return self._one_by_one(x, residual, mask)
        passed = self.passed
        if passed is not None:
            codes = self._passes_again(x, passed)
            if codes is not None:
                self.fused_calls += 1
                if residual is None and mask is None and x.dim() == 2:
                    return self._run_rows(x, codes)
                return self.run(x, residual, codes, mask)
        stopped = self.static_reason() or self.input_reason(x)
        self.reason = stopped or self.backend_reason()
        if self.reason:
            self.passed = None
            self.unfused_calls += 1
            if stopped:
                return self._one_by_one(x, residual, mask)
            return self.run(x, residual, None, mask)
        self.fused_calls += 1
        self._remember(x)
        return self.run(x, residual, None, mask)

    def _one_by_one(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        for child, kind in zip(self.children, self.types, strict=True):
            x = child(x, mask) if mask is not None and kind in MASKED_NORMS else child(x)
        x = x if residual is None else residual + x
        return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)

    def _scalars(self, dtype: torch.dtype) -> tuple[float | None, float, Codes]:
        """eps and p as the children have them now, and the operators' scalars made of them; dtype
        is that of the norm's input.
        """
        norm, dropout = self.norm, self.dropout
        eps = None if norm is None else norm.eps
        p = dropout.p if dropout is not None and dropout.training else 0.0
        given = 0.0 if norm is None else default_eps(self.norm_name, eps, dtype)
        if self.activation is None:
            return eps, p, make_codes(self.norm_name, given, None, p)
        activation, parameters = activation_of(self.activation)
        return eps, p, make_codes(self.norm_name, given, activation, p, parameters)

    def _codes(self, dtype: torch.dtype) -> Codes:
        return self._scalars(dtype)[2]

    def _norm_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        if self.norm is None:
            return None, None
        parameters = self.norm._parameters
        return parameters["weight"], parameters.get("bias")

    def _run_rows(self, x: Tensor, codes: Codes) -> Tensor:
        """`run` on (rows, features), where the short guard has passed."""
        # Activation and dropout that does not drop: one torch operator, which nothing can shorten.
        if self.alone is not None and not codes[5]:
            return self.alone(x)
        seed = draw_seed(x.device) if codes[5] else None
        norm_weight, norm_bias = self._norm_parameters()
        if self.linear is None:
            return apply_row(x, norm_weight, norm_bias, None, seed, codes)
        parameters = self.linear._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        return apply_linear_row(x, weight, bias, norm_weight, norm_bias, None, seed, codes)

    def run(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        codes: Codes | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The chain as one operation, on an input that the guard has passed.

        What each position gives is its own, so positions that the mask leaves out are made zero
        afterwards.
        """
        if mask is not None:
            return torch.where(mask.unsqueeze(-1), self.run(x, residual, codes), 0)
        norm_weight, norm_bias = self._norm_parameters()
        dims = 1 if self.norm is None else len(self.norm.normalized_shape)
        if self.linear is None:
            codes = codes or self._codes(x.dtype)
            if self.alone is not None:
                return self._run_alone(x, residual, codes)
            return run_chain(x, dims, norm_weight, norm_bias, residual, None, codes)
        codes = codes or self._codes(autocast_dtype(x.device.type) or x.dtype)
        parameters = self.linear._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if dims > 1:
            z = nn.functional.linear(x, weight, bias)
            return run_chain(z, dims, norm_weight, norm_bias, residual, None, codes)
        return linear_chain(x, weight, bias, norm_weight, norm_bias, residual, None, codes)

    def _run_alone(self, x: Tensor, residual: Tensor | None, codes: Codes) -> Tensor:
        """Activation and dropout: in memory order, and laid out as the input is."""
        assert self.alone is not None
        if not codes[5] and residual is None:
            return self.alone(x)
        if x.is_contiguous():
            return run_chain(x, 1, None, None, residual, None, codes)
        order = guard.memory_order(x)
        assert order is not None
        residual = None if residual is None else residual.permute(order)
        y = run_chain(x.permute(order), 1, None, None, residual, None, codes)
        return y.permute([order.index(d) for d in range(x.dim())])

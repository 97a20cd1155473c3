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
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _hooks

from ..backends import backend
from ..modules.norms import MASKED_NORMS
from ..run.autocast import autocast_dtype
from ..run.prepare import run
from ..run.recording import (
    PLAIN_TENSORS,
    functorch_active,
    is_dynamo_compiling,
    is_exporting,
    is_tracing,
    recorded_plain,
)
from ..run.rows import row
from ..spec import Spec, default_eps, make_spec
from . import guard
from .grammar import NORM
from .guard import FORWARD_OF, KIND_OF, activation_of
from .stages import Stages

_autocast_enabled = torch._C._is_any_autocast_enabled
requested = backend.request.get
_STRIDED = torch.strided
_ABSENT = -1  # the address of a parameter that is None


def _no_tensor() -> None:
    return None


class Passed(NamedTuple):
    """What the last input that passed the guard looked like, and the children's state then.

    Attributes:
        shape: as `Chain.shape_key` gives it.
        request: the backend that was asked for.
        watched: of each child itself, its class, that class's forward, and of each parameter and
            buffer the dictionary and name, a weak reference, the address and, of a norm's, shape
            and strides.
        values: what reads a child, the child, and what was read.
        eps, p: of the norm and the dropout, as they stand in the modules.
        spec: what is made of them.
    """

    dtype: torch.dtype
    device: torch.device
    shape: Any
    request: str
    watched: list[Any]
    values: list[Any]
    eps: float | None
    p: float
    spec: Spec


@dataclass
class Chain(Stages):
    """A run of children that can be one operation.

    `fused_calls` and `unfused_calls` count eager calls, not compiled ones; `reason` says why the
    last call, when it was unfused, was.
    """

    # The last input that passed the guard; one tuple, because other threads read it.
    passed: Passed | None = None
    fused_calls: int = 0
    unfused_calls: int = 0
    reason: str = ""
    # Whether the statistics are those of rows, and dropout is of elements.
    along_rows = True

    def _remember(self, x: Tensor) -> None:
        """Stores what an input looked like, so that its like needs only the short guard.

        Parameters and buffers are held weakly: those of a functional call must not outlive it.
        """
        shape = self.shape_key(x)
        if shape is None or len(getattr(self.norm, "normalized_shape", ())) > 1:
            return
        watched = []
        for child, kind in zip(self.children, self.types, strict=True):
            tensors = [
                (held, name, _no_tensor, _ABSENT, None, None)
                if t is None
                # Another tensor at the same address, as in `norm.weight.data = ...`, may have
                # another shape; a Linear asks torch.
                else (held, name, weakref.ref(t), t.data_ptr(), t.shape, t.stride())
                for held in ("_parameters", "_buffers")
                for name, t in child.__dict__[held].items()
            ]
            watched.append((child, kind, FORWARD_OF[kind], tensors, child is self.norm))
        values = [(read, child, read(child)) for read, child in self._readers()]
        scalars = self._scalars(x.dtype)
        self.passed = Passed(x.dtype, x.device, shape, requested(), watched, values, *scalars)

    def _readers(self) -> list[tuple[Callable[[Any], Any], nn.Module]]:
        """Of each child that may change, a function that reads what may change, and the child."""
        readers: list[tuple[Callable[[Any], Any], nn.Module]] = []
        if self.attributes is not None and self.activation is not None:
            readers.append((self.attributes, self.activation))
        if hasattr(self.norm, "normalized_shape"):
            readers.append((attrgetter("normalized_shape"), self.norm))
        return readers

    def shape_key(self, x: Tensor) -> Any:
        """What the short guard compares of shapes; None where only the full guard can tell."""
        shape = x.shape
        if not shape or (self.alone is not None and not x.is_contiguous()):
            return None
        return (len(shape), shape[-1]) if self.gated else shape[-1]

    def _passes_again(self, x: Any, passed: Passed) -> Spec | None:
        """The spec, if the children are untouched, and input, parameters, buffers and circumstances
        look as they did; else None. The caller has compared the children's classes.

        A tensor that is the same object with the same memory has kept its dtype and device;
        nn.Module.to changes the memory of the same object.
        """
        if (
            type(x) not in PLAIN_TENSORS
            or x.dtype is not passed.dtype
            or x.device != passed.device
            or x.is_nested
            or x.layout is not _STRIDED
            or requested() is not passed.request
            or _hooks._global_forward_hooks
            or _hooks._global_forward_pre_hooks
            or _hooks._global_backward_hooks
            or _hooks._global_backward_pre_hooks
            or _autocast_enabled()
            or self.shape_key(x) != passed.shape
        ):
            return None
        for child, kind, forward, tensors, shaped in passed.watched:
            own = child.__dict__
            if (
                kind.forward is not forward
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return None
            for held, name, reference, address, shape, strides in tensors:
                t = own[held].get(name, self)
                if t is not reference():
                    return None
                if t is None:
                    if address != _ABSENT:  # it was one that nobody holds any more
                        return None
                elif t.data_ptr() != address or (
                    shaped and (t.shape != shape or t.stride() != strides)
                ):
                    return None
        for read, child, value in passed.values:
            if read(child) != value:
                return None
        norm, dropout = self.norm, self.dropout
        p = dropout.p if dropout is not None and dropout.training else 0.0
        if p != passed.p or (norm is not None and norm.eps != passed.eps):
            eps, p, spec = self._scalars(passed.dtype)
            self.passed = passed._replace(eps=eps, p=p, spec=spec)
            return spec
        return passed.spec

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        shortcut: Tensor | None = None,
    ) -> Tensor:
        more = residual, mask, shortcut
        if (
            is_dynamo_compiling()
            or is_exporting()
            or functorch_active()
            or forward_ad._current_level >= 0
        ):
            if recorded_plain() or self.static_reason() or self.input_reason(x):
                return self._one_by_one(x, *more)
            return self.run(x, *more)
        if is_tracing():
            return self._one_by_one(x, *more)
        passed = self.passed
        spec = None if passed is None else self._passes_again(x, passed)
        if spec is not None:
            self.fused_calls += 1
            alone = residual is None and mask is None and shortcut is None
            if not (alone and self.along_rows):
                return self.run(x, *more, spec)
            # Activation and dropout that does not drop: one torch operator, which nothing can
            # shorten.
            if self.alone is not None and not spec.threshold:
                return self.alone(x)
            linear = {} if self.linear is None else self.linear._parameters
            affine = {} if self.norm is None else self.norm._parameters
            get, found = linear.get, affine.get
            return row(spec, x, get("weight"), get("bias"), found("weight"), found("bias"))
        stopped = self.static_reason() or self.input_reason(x)
        self.reason = stopped or self.backend_reason()
        if self.reason:
            self.passed = None
            self.unfused_calls += 1
            if stopped:
                return self._one_by_one(x, *more)
            return self.run(x, *more)
        self.fused_calls += 1
        self._remember(x)
        return self.run(x, *more)

    def _one_by_one(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        shortcut: Tensor | None,
    ) -> Tensor:
        for child, kind in zip(self.children, self.types, strict=True):
            if shortcut is not None and KIND_OF[kind] > NORM:
                x, shortcut = x + shortcut, None
            x = child(x, mask) if mask is not None and kind in MASKED_NORMS else child(x)
        x = x if shortcut is None else x + shortcut
        x = x if residual is None else residual + x
        return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)

    def _scalars(self, dtype: torch.dtype) -> tuple[float | None, float, Spec]:
        """eps and p as the children have them now, and the spec made of them; dtype is that of the
        norm's input.
        """
        norm, dropout = self.norm, self.dropout
        eps = None if norm is None else norm.eps
        p = dropout.p if dropout is not None and dropout.training else 0.0
        given = 0.0 if norm is None else default_eps(self.norm_name, eps, dtype)
        if self.activation is None:
            return eps, p, make_spec(self.norm_name, given, None, p)
        activation, parameters = activation_of(self.activation)
        return eps, p, make_spec(self.norm_name, given, activation, p, parameters)

    def _spec_for(self, x: Tensor) -> Spec:
        cast = None if self.linear is None else autocast_dtype(x.device.type)
        return self._scalars(cast or x.dtype)[2]

    def _linear_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        if self.linear is None:
            return None, None
        parameters = self.linear._parameters
        return parameters["weight"], parameters["bias"]

    def run(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        shortcut: Tensor | None = None,
        spec: Spec | None = None,
    ) -> Tensor:
        """The chain as one operation, on an input that the guard has passed."""
        spec = spec or self._spec_for(x)
        if self.alone is not None:
            y = self._run_alone(x if shortcut is None else x + shortcut, residual, spec)
            return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)
        affine = {} if self.norm is None else self.norm._parameters
        given = (*self._linear_parameters(), affine.get("weight"), affine.get("bias"))
        dims = 1 if self.norm is None else len(self.norm.normalized_shape)
        return run(spec, x, *given, residual, mask, normalized_dims=dims, shortcut=shortcut)

    def _run_alone(self, x: Tensor, residual: Tensor | None, spec: Spec) -> Tensor:
        """Activation and dropout: in memory order, and laid out as the input is."""
        assert self.alone is not None
        if not spec.threshold and residual is None:
            return self.alone(x)
        if x.is_contiguous():
            return run(spec, x, residual=residual)
        order = guard.memory_order(x)
        assert order is not None
        residual = None if residual is None else residual.permute(order)
        y = run(spec, x.permute(order), residual=residual)
        return y.permute([order.index(d) for d in range(x.dim())])

"""Other libraries' fused norms, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .cells import Cell
from .providers import Provider, module_provider

# A norm's call, from the library's function, the input and the module whose parameters it takes.
Call = Callable[[Any, Tensor, Any], Tensor]
# library: norm: module, function and call.
PEERS: dict[str, dict[str, tuple[str, str, Call]]] = {
    "liger": {
        "layer": (
            "liger_kernel.ops.layer_norm",
            "LigerLayerNormFunction",
            lambda f, x, norm: f.apply(x, norm.weight, norm.bias, norm.eps),
        ),
        "rms": (
            "liger_kernel.ops.rms_norm",
            "LigerRMSNormFunction",
            lambda f, x, norm: f.apply(x, norm.weight, _eps(norm), 0.0, "llama", False),
        ),
    },
    "quack": {
        "rms": ("quack", "rmsnorm", lambda f, x, norm: f(x, norm.weight, eps=_eps(norm))),
    },
    "flash-attn": {
        "layer": (
            "flash_attn.ops.triton.layer_norm",
            "layer_norm_fn",
            lambda f, x, norm: f(x, norm.weight, norm.bias, eps=norm.eps),
        ),
        "rms": (
            "flash_attn.ops.triton.layer_norm",
            "rms_norm_fn",
            lambda f, x, norm: f(x, norm.weight, None, eps=_eps(norm)),
        ),
    },
}


def _eps(norm: Any) -> float:
    """torch's RMSNorm takes that of float32 where none is given."""
    return float(torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)


def _find(module: str, name: str) -> Any:
    """The function; None where it cannot be imported, whatever stands in its way."""
    try:
        return getattr(import_module(module), name)
    except Exception:  # a library that does not fit this torch or GPU raises anything
        return None


def missing_peers() -> list[str]:
    """Those that cannot be imported here."""
    return [
        name
        for name, norms in PEERS.items()
        if any(_find(module, function) is None for module, function, _ in norms.values())
    ]


def make_peers(cell: Cell, chain: nn.Sequential) -> list[Provider]:
    """A provider for each library that has this norm; they share the chain's parameters."""
    found = []
    for name, norms in PEERS.items():
        if cell.norm not in norms:
            continue
        module, function, call = norms[cell.norm]
        f = _find(module, function)
        if f is not None:
            forward = partial(_apply, call, f, chain[0])
            found.append(module_provider(name, forward, chain, cell, 1.0))
    return found


def _apply(call: Call, f: Any, norm: nn.Module, x: Tensor) -> Tensor:
    return call(f, x, norm)

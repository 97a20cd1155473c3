"""Which chains are worth rewriting: where our kernels are faster than what runs the rest.

`python -m bench models` measures whole models and, with `--models parts`, what is decided here; the
figures below are of single runs on a busy machine (AMD EPYC with AVX2, one thread, torch 2.13,
November 2026). On GPUs nothing is measured yet; what is taken there follows from the bytes moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from ..chain.grammar import DROPOUT, NORM, is_chain
from ..chain.guard import open_size_reason
from ..spec import CHANNEL_NORMS
from .chains import Found
from .forms import value
from .memory import target_name

# torch's own layer and batch norm are as fast or faster below so many elements on CPUs (LayerNorm
# of 512 × 512 and 4096 × 1024, training: 0.7 and 1.3 of eager's speed).
_LARGE = 1 << 20


def reason(chain: Found, rest: str) -> str:
    """Why a chain is left to what runs the rest; empty where ours is faster.

    Args:
        rest: "inductor" or "eager".
    """
    result = value(chain.last)
    training, cpu = result.requires_grad, result.device.type == "cpu"
    norm = chain.part(NORM)
    if rest == "inductor" and (open_sizes := open_size_reason(result)):
        return open_sizes
    if rest == "inductor" and _at_convolution(chain):
        return "Inductor lays out images as its convolutions like them"
    if rest == "inductor" and cpu and _is_small(chain):
        return "Inductor is as fast at this size"
    if not is_chain(chain.kinds) and chain.gate is None:
        return _alone(chain, training) if cpu else "a single call is left to torch on GPUs"
    if rest == "eager":
        return ""
    statistics = norm is not None and not (
        norm.name in CHANNEL_NORMS and norm.numbers.get("training") is False
    )
    if not training and not statistics and chain.part(DROPOUT) is None:
        # Pointwise operators, which Inductor fuses with more than we see (BatchNorm → ReLU of
        # 512 × 512: it has 1.3 of eager's speed, we 0.6).
        return "without statistics, dropout or gradient, Inductor fuses it"
    if not cpu and not (training and statistics):
        return "on GPUs only norms in training are taken from Inductor until they are measured"
    return ""


def inductor_options(inputs: Iterable[Any]) -> dict[str, bool]:
    """What Inductor is told for backend="fused" where the user says nothing about it.

    On CPUs convolutions keep the layout that the model has, so that chains between them are read
    where they are; by itself that makes Inductor faster, too. `python -m bench models --models
    resnet18` has Inductor as it is, and with TORCHINDUCTOR_LAYOUT_OPTIMIZATION=0 as it is here.
    """
    on_cpu = all(t.device.type == "cpu" for t in inputs if isinstance(t, torch.Tensor))
    said = "TORCHINDUCTOR_LAYOUT_OPTIMIZATION" in os.environ
    return {"layout_optimization": False} if on_cpu and not said else {}


def _at_convolution(chain: Found) -> bool:
    """Whether a chain stands between convolutions that Inductor lays out, without dropout.

    It has other strides there than the graph, and copies for a call that it does not know.
    """
    from torch._inductor import config

    if chain.part(DROPOUT) is not None or not config.layout_optimization:
        return False
    return any(target_name(n).startswith("conv") for n in (chain.source, *chain.last.users))


def _is_small(chain: Found) -> bool:
    """Whether Inductor's own code is as fast, which it is not where something is dropped.

    RMSNorm by hand of 512 × 512, training: 0.9 of Inductor's speed, of 4096 × 1024: 1.1. A gate of
    256 × 512: 1.0 and, in bfloat16, 0.9; of 4096 × 1024: 0.98 and 1.1, halves 1.2 and more.
    """
    large = _LARGE if chain.gate is not None else _LARGE // 2
    return chain.part(DROPOUT) is None and _elements(chain) < large


def _alone(chain: Found, training: bool) -> str:
    """Why a single call is left to torch on CPUs."""
    stage = chain.stages[0]
    # torch draws random numbers slowly, and runs RMSNorm as several operators.
    if stage.kind == DROPOUT or (stage.kind == NORM and stage.name == "rms"):
        return ""
    if stage.kind == NORM and (
        stage.name == "layer" or (stage.name == "batch" and stage.numbers["training"])
    ):
        return "" if _elements(chain) >= _LARGE else "torch's own is as fast at this size"
    return "a chain needs two or more of Linear, norm, activation, dropout, in this order"


def _elements(chain: Found) -> int:
    """How many elements the result has, those of the first call where they may vary."""
    n = value(chain.last).numel()
    return n if isinstance(n, int) else _hint(n)


def _hint(n: torch.SymInt) -> int:
    found = n.node.hint
    return found if isinstance(found, int) else 0

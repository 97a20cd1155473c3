"""The ways into the pass: two backends of torch.compile, and one into Inductor's own.

pyproject.toml names the backends as entry points, by which torch finds them without an import of
this package.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..backends import backend, gemm
from .policy import inductor_options
from .rewrite import rewrite

_PACKAGE = Path(__file__).parent.parent
_SETTING = "pre_grad_custom_pass"


def fused_eager(module: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
    """torch.compile(backend="fused_eager"): chains by our kernels, the rest by eager torch.

    It compiles nothing, so that a model starts in a second. Options are not used. A chain that was
    taken follows `use_backend` at every call; one that was left when the reference was asked for
    stays torch's.
    """
    # Graphs inside it are those of checkpointing, for one.
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            rewrite(part.graph, "eager")
            part.graph.lint()
            part.recompile()
    return module.forward


def fused(
    module: fx.GraphModule,
    inputs: Any,
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """torch.compile(backend="fused"): chains by our kernels, the rest by Inductor.

    What `use_backend` asks for while it compiles holds for what is compiled.

    Args:
        mode, options: Inductor's, as torch.compile takes them. On CPUs convolutions keep the
            model's layout (policy.py) unless options or the environment set `layout_optimization`.
    """
    given = {**inductor_options(inputs), **(options or {})}
    before = given.get(_SETTING, getattr(inductor_config, _SETTING))
    # torch's own wrapper reads and checks what it is given, as it does for backend="inductor".
    compile = torch._TorchCompileInductorWrapper(mode, {**given, _SETTING: _after(before)}, None)
    return compile(module, inputs)


@cache
def _sources() -> str:
    """What all of this package's Python says, and which libraries were built."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    for path in sorted(_PACKAGE.rglob("*.so")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


class Pass(CustomGraphPass):
    """The pass as Inductor takes it: before autograd, and after the passes that were set already.

    Inductor's caches know a graph as it is before the pass, and the pass by its `uuid`.
    """

    def __init__(self, before: tuple[Any, ...]) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        for earlier in self.before:
            earlier(graph)
        rewrite(graph, "inductor")

    def uuid(self) -> Any:
        """Another one for another version, setting, instruction set or earlier pass."""
        earlier = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before]
        if None in earlier:
            return None
        settings = sorted(item for item in os.environ.items() if item[0].startswith("FUSED_"))
        own = _sources(), backend.requested(), settings, backend.cpu_isa(), gemm.enabled
        return f"fused-lnad {own} {earlier}"


def _after(before: Any) -> Pass:
    """The pass behind what the setting holds: nothing, a pass, or several."""
    if isinstance(before, Pass):
        return before
    if before is None:
        return Pass(())
    return Pass(tuple(before) if isinstance(before, list | tuple) else (before,))


class inductor:
    """Puts the pass into Inductor, for torch.compile calls that somebody else makes.

    From the call on, and in a `with` block until its end, whatever this thread compiles by Inductor
    runs its chains by our kernels; what was compiled stays so, and what is compiled again outside
    the block is Inductor's. A pass that is set already runs first, and is what is set again
    afterwards.

    Example:
        >>> with fused.inductor():
        ...     trainer.train()  # Hugging Face's, with torch_compile=True
    """

    def __init__(self) -> None:
        self._before = getattr(inductor_config, _SETTING)
        setattr(inductor_config, _SETTING, _after(self._before))

    def __enter__(self) -> inductor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        setattr(inductor_config, _SETTING, self._before)

"""Tests that run in Triton's interpreter: a process of its own (see ../test_row_interpreter.py)."""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# oracle.py; channel_cases.py, tolerances.py
sys.path[:0] = (str(Path(__file__).resolve().parents[i]) for i in (1, 2))


def patch_once_a_launch() -> None:
    """Patches Triton's language once a launch, not again at every inner call: half of the time.

    An inner call also patches triton.language.core, which the launch therefore does here.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    numpy_type = functools.cache(interpreter._get_np_dtype)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return self.rewrite()(*args, **options)

    interpreter._patch_lang = lambda fn: patch(both)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = lambda t: numpy_type(tl.uint64 if t.scalar.is_ptr() else t.scalar)


if os.environ.get("TRITON_INTERPRET") == "1":
    from bench.audit import interpreter  # found by ../conftest.py

    patch_once_a_launch()
    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]

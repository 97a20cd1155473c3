"""Where the package's parts are: a wheel has all in one folder, a checkout beside it or elsewhere.

From a checkout's root Python takes ./fused before the installed package. Its kernels are then
../kernels, and the compiled libraries, where they were not built in place, those of the installed
package, if it has the same version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_CHECKOUT = _PACKAGE.parent
IN_CHECKOUT = not (_PACKAGE / "kernels").exists() and (_CHECKOUT / "csrc").exists()


def search_path(path: Sequence[str]) -> list[str]:
    """Where Python looks for the package's modules: a checkout's root has `kernels`."""
    return [*path, str(_CHECKOUT)] if IN_CHECKOUT else [*path]


@lru_cache(maxsize=1)
def _folders() -> list[Path]:
    if not IN_CHECKOUT:
        return [_PACKAGE]
    from importlib import metadata

    from .. import __version__

    # Several: the first one found may be the checkout's own egg-info.
    installed = metadata.distributions(name="fused-lnad")
    same = [d for d in installed if d.version == __version__]
    return [_PACKAGE, *(Path(str(d.locate_file("fused"))) for d in same)]


def _first(file: str) -> Path:
    own = _PACKAGE / file
    if own.exists():
        return own
    return next((path for f in _folders() if (path := f / file).exists()), own)


def find(name: str) -> Path:
    """The path of a library, "_C" or "_cuda"; it need not exist."""
    return _first(f"{name}.abi3.so")


def why_missing(name: str, remedy: str) -> str:
    """What the build said of a library that is missing, else the remedy.

    setup.py leaves it in NAME.missing: pip shows it with -v alone.
    """
    record = _first(f"{name}.missing")
    return f"the build said: {record.read_text().strip()}" if record.exists() else remedy

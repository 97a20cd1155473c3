"""Linear → Norm → Activation → Dropout as one operation, forward and backward."""

from typing import TYPE_CHECKING, Any

from .backends.location import search_path

__version__ = "0.1.0"
__path__ = search_path(__path__)

from . import functional
from .backends.backend import use_backend
from .backends.extension import empty_cache
from .chain.convert import Report, fuse_, unfuse_
from .chain.plan import Entry, Plan
from .extras.ensemble import MonteCarlo, mc_dropout
from .extras.fold import FoldReport, fold_
from .extras.scaler import FeatureScaler
from .nn import (
    MLP,
    AddNorm,
    BatchNorm,
    ChannelDropout,
    GeGLU,
    GroupNorm,
    InstanceNorm,
    LinearNormAct,
    NormAct,
    ReGLU,
    ReLUSquared,
    Sequential,
    SwiGLU,
)
from .spec import activations, norms
from .tools.compare import compare
from .tools.comparison import Comparison
from .tools.explain import Call, Explanation, explain

if TYPE_CHECKING:
    from .graph.doors import inductor

__all__ = [
    "MLP",
    "AddNorm",
    "BatchNorm",
    "Call",
    "ChannelDropout",
    "Comparison",
    "Entry",
    "Explanation",
    "FeatureScaler",
    "FoldReport",
    "GeGLU",
    "GroupNorm",
    "InstanceNorm",
    "LinearNormAct",
    "MonteCarlo",
    "NormAct",
    "Plan",
    "ReGLU",
    "ReLUSquared",
    "Report",
    "Sequential",
    "SwiGLU",
    "__version__",
    "activations",
    "compare",
    "empty_cache",
    "explain",
    "fold_",
    "functional",
    "fuse_",
    "inductor",
    "mc_dropout",
    "norms",
    "unfuse_",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name != "inductor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .graph.doors import inductor  # imports Inductor, which takes longer than all of this

    return inductor

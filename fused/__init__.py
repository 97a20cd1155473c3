"""Linear → Norm → Activation → Dropout as one operation, forward and backward."""

from . import functional
from .backend import use_backend
from .convert import Report, fuse_, unfuse_
from .ensemble import mc_dropout
from .extension import empty_cache
from .fold import fold_
from .nn import MLP, LinearNormAct, NormAct, Sequential
from .scaler import FeatureScaler

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "FeatureScaler",
    "LinearNormAct",
    "NormAct",
    "Report",
    "Sequential",
    "__version__",
    "empty_cache",
    "fold_",
    "functional",
    "fuse_",
    "mc_dropout",
    "unfuse_",
    "use_backend",
]

"""Linear → Norm → Activation → Dropout as one operation, forward and backward."""

from . import functional
from .backend import use_backend
from .convert import Report, fuse_, unfuse_
from .nn import MLP, LinearNormAct, NormAct, Sequential

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "LinearNormAct",
    "NormAct",
    "Report",
    "Sequential",
    "__version__",
    "functional",
    "fuse_",
    "unfuse_",
    "use_backend",
]

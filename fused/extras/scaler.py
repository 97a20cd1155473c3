"""FeatureScaler: standardisation or min-max scaling of features, fitted in one pass over the data.

    standard   y = (x − mean) / deviation                       deviation = sqrt(m2 / count)
    minmax     y = (x − minimum) / (maximum − minimum) · (high − low) + low

mean and m2, the sum of squared deviations, are merged batch by batch (moments.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..run.moments import Moments, column_moments, gather, is_constant, merge_moments
from .progress import Progress

__all__ = ["FeatureScaler"]

_EPS = torch.finfo(torch.float64).eps
_STATISTICS = ("count", "mean", "m2", "minimum", "maximum")
_CHUNK = 1 << 20  # elements that are fitted at a time: 8 MiB in float64


class FeatureScaler(nn.Module):
    """Scales each feature by statistics that were fitted before, as scikit-learn's scalers do.

    It agrees with `StandardScaler` (the deviation is that of the population) and `MinMaxScaler`:

    - NaN is a missing value: fitting leaves it out, feature by feature, and it comes out as NaN.
    - ±inf is refused when fitting (ValueError) and stays ±inf when scaling.
    - A constant feature is divided by 1. Constant is, with ε that of float64 and n the count,
      variance ≤ n·ε·variance + (n·mean·ε)², the error bound of the sums; for minmax
      maximum − minimum < 10·ε.
    - A feature of which no value was ever seen comes out as NaN.

    Statistics are float64 whatever the model is converted to (`.half()`, `.to(dtype)` leave them
    alone), so the module needs a device that has float64. Scaling computes in float32, or float64
    for a float64 input, and rounds once. It is differentiable, and so is `inverse`.

    Args:
        num_features: the size of the last dimension.
        mode: "standard" or "minmax".
        feature_range: (low, high) of minmax, in the units of the output.
        device: of the statistics.
        dtype: of what forward and inverse return; None: the input's. `.to(dtype)` changes it.

    Attributes:
        count: values seen of each feature, int64 (num_features,).
        mean, m2: float64 (num_features,); in the data's units, and in their square.
        minimum, maximum: float64 (num_features,); ±inf before anything was seen.
        center, scale: what forward subtracts and divides by, float64 (num_features,); made of the
            others, so not in the state_dict.

    Shape:
        x (..., num_features) → the same.

    Raises:
        ValueError: num_features < 1, unknown mode, low ≥ high.

    Example:
        >>> scaler = FeatureScaler(8).fit(torch.randn(1000, 8) * 5 + 3)
        >>> net = nn.Sequential(scaler, nn.Linear(8, 1))
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    minimum: Tensor
    maximum: Tensor
    center: Tensor
    scale: Tensor
    _fitted: bool

    def __init__(
        self,
        num_features: int,
        mode: str = "standard",
        *,
        feature_range: tuple[float, float] = (0.0, 1.0),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"FeatureScaler: num_features must be at least 1, got {num_features}")
        if mode not in ("standard", "minmax"):
            raise ValueError(
                f"FeatureScaler: unknown mode {mode!r}; known: 'standard' and 'minmax'"
            )
        low, high = feature_range
        if not low < high:
            raise ValueError(
                f"FeatureScaler: feature_range must be low < high, got ({low}, {high})"
            )
        self.num_features, self.mode, self.feature_range = num_features, mode, (low, high)
        self.dtype = dtype
        for name in (*_STATISTICS, "center", "scale"):
            kind = torch.int64 if name == "count" else torch.float64
            buffer = torch.zeros(num_features, device=device, dtype=kind)
            self.register_buffer(name, buffer, persistent=name in _STATISTICS)
        self.reset()

    def reset(self) -> FeatureScaler:
        """Forgets the data. Returns the scaler."""
        zero = torch.zeros_like(self.mean)
        self._set(Moments(zero, zero, zero), zero + torch.inf, zero - torch.inf)
        self._synchronized = False
        return self

    @torch.no_grad()
    def partial_fit(self, x: Tensor) -> FeatureScaler:
        """Adds a batch to the statistics.

        Args:
            x: (..., num_features), floating point; on another device it is copied to that of the
                statistics. NaN is left out. It may have no rows.

        Returns:
            The scaler.

        Raises:
            TypeError, ValueError: another type or shape, or ±inf; the statistics are unchanged.
        """
        self._check("partial_fit", x)
        if bool(x.isinf().any()):
            raise ValueError(
                "FeatureScaler.partial_fit: x has infinite values; replace them, for example by"
                " NaN, which is left out"
            )
        rows = x.detach().reshape(-1, self.num_features)
        if not len(rows):
            return self
        moments, minimum, maximum = self._moments(), self.minimum, self.maximum
        for part in rows.split(self._chunk_rows()):
            values = part.to(self.mean.device, torch.float64)
            present = ~values.isnan()
            moments = merge_moments(moments, column_moments(values, present))
            minimum = torch.minimum(minimum, torch.where(present, values, torch.inf).amin(0))
            maximum = torch.maximum(maximum, torch.where(present, values, -torch.inf).amax(0))
        self._set(moments, minimum, maximum)
        return self

    def fit(self, data: Tensor | Iterable[Any], progress: bool | None = None) -> FeatureScaler:
        """Forgets what it had, and makes one pass over the data.

        Args:
            data: a tensor (..., num_features), or a DataLoader or other iterable of batches, each
                such a tensor, or a tuple or list that begins with one.
            progress: whether to show the progress on stderr: a bar in a terminal, else a line each
                quarter of the way. None: only in a terminal.

        Returns:
            The scaler.

        Raises:
            TypeError, ValueError: as `partial_fit`.
        """
        self.reset()
        if isinstance(data, Tensor):
            self._check("fit", data)
            data = data.reshape(-1, self.num_features).split(self._chunk_rows())
        try:
            total = len(data)  # type: ignore[arg-type]
        except TypeError:  # a generator, or a DataLoader over a stream
            total = 0
        stream = sys.stderr if progress or (progress is None and sys.stderr.isatty()) else None
        with Progress("fit", total, stream) as bar:
            for batch in data:
                x = batch[0] if isinstance(batch, tuple | list) and batch else batch
                if not isinstance(x, Tensor):
                    got = f"a {type(data).__name__} of {type(batch).__name__}; use torch.as_tensor"
                    raise TypeError(f"FeatureScaler.fit: data must be or give tensors, got {got}")
                self.partial_fit(x)
                bar.advance(x.numel() // self.num_features)
        return self

    @torch.no_grad()
    def synchronize(self, process_group: Any = None) -> FeatureScaler:
        """Merges the statistics of all processes: each then has those of all the data.

        Every process of the group must call it, once, after its last batch; also one that has seen
        no data. All get the same bits.

        Args:
            process_group: of torch.distributed; None is the default group. NCCL needs the
                statistics on a GPU.

        Returns:
            The scaler.

        Raises:
            RuntimeError: no process group, or already synchronized: the data would count twice.
        """
        if self._synchronized:
            raise RuntimeError(
                "FeatureScaler.synchronize: already synchronized, so the data would count twice;"
                " call reset and fit again first"
            )
        own = torch.stack([*self._moments(), self.minimum, self.maximum])  # (5, num_features)
        parts = gather("FeatureScaler.synchronize", own, process_group)
        moments = reduce(merge_moments, (Moments(*part[:3]) for part in parts))
        self._set(moments, parts[:, 3].amin(0), parts[:, 4].amax(0))
        self._synchronized = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scales x.

        Raises:
            RuntimeError: nothing was fitted.
            TypeError, ValueError: x is not floating point, or not (..., num_features).
        """
        self._check("forward", x)
        center, scale = self._parameters_for(x)
        y = (x - center) / scale
        if self.mode == "minmax":
            y = y + self.feature_range[0]
        return y.to(self.dtype or x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """What forward made y of, to rounding; shapes and errors are those of forward."""
        self._check("inverse", y)
        center, scale = self._parameters_for(y)
        x = y - self.feature_range[0] if self.mode == "minmax" else y
        return (x * scale + center).to(self.dtype or y.dtype)

    def extra_repr(self) -> str:
        shown = f", feature_range={self.feature_range}" if self.mode == "minmax" else ""
        return f"{self.num_features}, mode={self.mode!r}{shown}"

    def _check(self, operation: str, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            expected = "x must be a floating-point tensor"
            raise TypeError(f"FeatureScaler.{operation}: {expected}, got {got}")
        if x.dim() < 1 or x.shape[-1] != self.num_features:
            raise ValueError(
                f"FeatureScaler.{operation}: x must be (..., {self.num_features}),"
                f" got {tuple(x.shape)}"
            )

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # A flag, since a compiled graph cannot ask the tensor. Buffers may come from elsewhere than
        # from this class, such as another process, so it is looked at again where it is not set.
        if not (self._fitted or torch.compiler.is_compiling()):
            self._fitted = bool(self.count.any())
        if not self._fitted:
            raise RuntimeError(
                "FeatureScaler: nothing was fitted; call fit or partial_fit, or load a state_dict"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.center.to(dtype), self.scale.to(dtype)

    def _chunk_rows(self) -> int:
        return max(1, _CHUNK // self.num_features)

    def _moments(self) -> Moments:
        return Moments(self.count.double(), self.mean, self.m2)

    def _set(self, moments: Moments, minimum: Tensor, maximum: Tensor) -> None:
        for name, value in zip(_STATISTICS, (*moments, minimum, maximum), strict=True):
            getattr(self, name).copy_(value)
        self._update()

    def _update(self) -> None:
        """Makes center and scale of the statistics; NaN for a feature that was never seen."""
        low, high = self.feature_range
        if self.mode == "standard":
            constant = is_constant(self._moments())
            center, scale = self.mean, torch.where(constant, 1.0, (self.m2 / self.count).sqrt())
        else:
            spread = self.maximum - self.minimum
            center, scale = self.minimum, torch.where(spread < 10 * _EPS, 1.0, spread)
            scale = scale / (high - low)
        seen = self.count > 0
        self.center.copy_(torch.where(seen, center, torch.nan))
        self.scale.copy_(torch.where(seen, scale, torch.nan))
        self._fitted = not seen.is_meta and bool(seen.any())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureScaler:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if self.dtype is not None:
            self.dtype = fn(torch.empty(1, dtype=self.dtype)).dtype
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.mean, self.m2 = self.mean.double(), self.m2.double()  # assign=True takes any dtype
        self.minimum, self.maximum = self.minimum.double(), self.maximum.double()
        self._update()

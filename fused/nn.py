"""The modules: Sequential (sequential.py), and the explicit blocks made of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .chain import Chain
from .functional import check_residual
from .guard import PLAIN_TENSORS, ReLUSquared
from .sequential import Sequential
from .spec import ACTIVATIONS, NORM_CODES, activation_parameters

__all__ = ["MLP", "LinearNormAct", "NormAct", "ReLUSquared", "Sequential"]


class _Built(Sequential):
    """A Sequential whose constructor takes no children, so that a slice is a plain Sequential."""

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return Sequential(OrderedDict([*self._modules.items()][idx]))
        return super().__getitem__(idx)


def _make_activation(activation: str | None, parameters: dict[str, float]) -> nn.Module | None:
    activation_parameters(activation, parameters)  # raises for what is unknown
    if activation is None:
        return None
    if activation == "relu_squared":
        return ReLUSquared()
    if activation == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    module = ACTIVATIONS[activation].module
    assert module is not None
    return module(**parameters)


def _make_norm(
    norm: str | None,
    features: int | Sequence[int],
    eps: float | None,
    affine: bool,
    device: Any,
    dtype: Any,
) -> nn.Module | None:
    if norm not in NORM_CODES:
        names = ", ".join(repr(k) for k in NORM_CODES if k)
        raise ValueError(f"unknown norm {norm!r}; known: {names}, or None")
    shape: Any = features if isinstance(features, int) else list(features)
    if norm == "layer":
        return nn.LayerNorm(shape, 1e-5 if eps is None else eps, affine, device=device, dtype=dtype)
    if norm == "rms":
        return nn.RMSNorm(shape, eps, affine, device=device, dtype=dtype)
    return None


class _Block(_Built):
    """A Sequential that is one chain, with a residual input."""

    def __init__(self, children: dict[str, nn.Module | None]) -> None:
        super().__init__()
        for name, child in children.items():
            if child is not None:
                self.add_module(name, child)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The block; `residual`, of the output's shape, is added last.

        Raises:
            TypeError: residual is not a floating-point tensor.
            ValueError: it has another shape or device than the output.
        """
        if residual is None:
            return super().forward(input)
        steps = self._current_steps()
        step, operation = steps[0] if len(steps) == 1 else None, type(self).__name__
        if isinstance(step, Chain) and type(residual) in PLAIN_TENSORS:
            shape = step.output_shape(input)
            if shape is not None:
                check_residual(operation, residual, shape, input)
                return step(input, residual)
        y = super().forward(input)
        check_residual(operation, residual, tuple(y.shape), y)
        return residual + y


class LinearNormAct(_Block):
    """Linear, norm, activation and dropout as one operation.

        y = residual + dropout(activation(norm(x · weightᵀ + bias)))

    Its children are torch's own, named linear, norm, act and dropout.

    Args:
        in_features, out_features: K and N.
        norm: "layer", "rms" or None; over the N features.
        activation: a name of `fused.spec.ACTIVATIONS`, or None.
        dropout: probability; 0 leaves the child out.
        bias: whether the Linear has one.
        eps: the norm's; torch's default where None.
        affine: whether the norm has weight (and, for layer, bias).
        **activation_parameters: negative_slope, alpha, beta, threshold, as torch names them.

    Shape:
        x (..., K), residual (..., N) → (..., N).

    Raises:
        ValueError: unknown norm or activation, dropout outside [0, 1].
        TypeError: a parameter that the activation does not have.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: str | None = None,
        activation: str | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        eps: float | None = None,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        **activation_parameters: float,
    ) -> None:
        super().__init__(
            {
                "linear": nn.Linear(in_features, out_features, bias, device=device, dtype=dtype),
                "norm": _make_norm(norm, out_features, eps, affine, device, dtype),
                "act": _make_activation(activation, activation_parameters),
                "dropout": nn.Dropout(dropout) if dropout else None,
            }
        )


class NormAct(_Block):
    """Norm, activation and dropout as one operation, after any layer.

        y = residual + dropout(activation(norm(x)))

    Its children are torch's own, named norm, act and dropout.

    Args:
        num_features: the size of the last dimension, or the trailing shape that is normalised.
        norm, activation, dropout, eps, affine, **activation_parameters: as in `LinearNormAct`.

    Shape:
        x (..., num_features), residual of x's shape → x's shape.

    Raises:
        ValueError, TypeError: as `LinearNormAct`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        norm: str | None = None,
        activation: str | None = None,
        dropout: float = 0.0,
        eps: float | None = None,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        **activation_parameters: float,
    ) -> None:
        super().__init__(
            {
                "norm": _make_norm(norm, num_features, eps, affine, device, dtype),
                "act": _make_activation(activation, activation_parameters),
                "dropout": nn.Dropout(dropout) if dropout else None,
            }
        )


class MLP(_Built):
    """Blocks of Linear, norm, activation and dropout, and a Linear at the end.

    Args:
        in_features: K of the first block.
        hidden_features: N of each block.
        out_features: N of the last Linear; None leaves it out.
        norm, activation, dropout, bias, eps, affine, **activation_parameters: of every block, as
            in `LinearNormAct`.

    Shape:
        (..., in_features) → (..., out_features).

    Raises:
        ValueError, TypeError: as `LinearNormAct`.

    Example:
        >>> MLP(784, [512, 256], 10, norm="layer", activation="gelu", dropout=0.1)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int | None = None,
        *,
        norm: str | None = "layer",
        activation: str | None = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        eps: float | None = None,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        **activation_parameters: float,
    ) -> None:
        layers: list[nn.Module] = []
        previous = in_features
        for features in hidden_features:
            layers.append(
                LinearNormAct(
                    previous,
                    features,
                    norm=norm,
                    activation=activation,
                    dropout=dropout,
                    bias=bias,
                    eps=eps,
                    affine=affine,
                    device=device,
                    dtype=dtype,
                    **activation_parameters,
                )
            )
            previous = features
        if out_features is not None:
            layers.append(nn.Linear(previous, out_features, bias, device=device, dtype=dtype))
        super().__init__(*layers)

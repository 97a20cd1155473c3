"""The modules: Sequential, and the explicit blocks made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .plan import Chain, Plan, ReLUSquared, Single, make_entry, make_steps
from .spec import ACTIVATIONS, NORM_CODES, activation_parameters

__all__ = ["MLP", "LinearNormAct", "NormAct", "ReLUSquared", "Sequential"]


class Sequential(nn.Sequential):
    """nn.Sequential that runs chains of its children as one operation each.

    A chain is a maximal run of Linear, norm (LayerNorm, RMSNorm), activation, dropout in that
    order, at least two of them. Children stay ordinary torch modules: same state_dict, same hooks,
    same everything; and the result is always nn.Sequential's, dropout masks aside. A chain falls
    back to its children one by one when something was done to one of them that a kernel would not
    see; `plan` says what and why.

    Shape: the children's.

    Example:
        >>> net = Sequential(nn.Linear(784, 512), nn.LayerNorm(512), nn.ReLU(), nn.Dropout(0.2))
        >>> net(torch.randn(4, 784)).shape
        torch.Size([4, 512])
    """

    # The children that the steps were made for, and the steps.
    _planned: tuple[tuple[str, nn.Module], ...] | None = None
    _steps: list[Chain | Single] | None = None

    def forward(self, input: Any) -> Any:
        for step in self._current_steps():
            input = step(input)
        return input

    def _current_steps(self) -> list[Chain | Single]:
        children = tuple(self._modules.items())
        if self._steps is None or children != self._planned:
            self.__dict__["_steps"] = make_steps(children)
            self.__dict__["_planned"] = children
        return self._steps  # type: ignore[return-value]

    def plan(self) -> Plan:
        """What runs fused and why the rest does not; print it.

        Returns:
            One `Entry` per step, with the calls counted so far. Without an input it can only say
            what the children themselves allow; an input of another dtype, device or shape makes a
            call fall back too, and the entry's reason then says so.
        """
        return Plan(make_entry(step) for step in self._current_steps())

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_steps", None)
        state.pop("_planned", None)
        return state


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


class _Block(Sequential):
    """A Sequential that is one chain, with a residual input."""

    def __init__(self, children: dict[str, nn.Module | None]) -> None:
        super().__init__()
        for name, child in children.items():
            if child is not None:
                self.add_module(name, child)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The block; `residual`, of the output's shape, is added last."""
        if residual is None:
            return super().forward(input)
        steps = self._current_steps()
        if len(steps) == 1 and isinstance(steps[0], Chain) and residual.device == input.device:
            step = steps[0]
            if not (step.static_reason() or step.input_reason(input)):
                if not torch.compiler.is_compiling():
                    step.fused_calls += 1
                return step.run(input, residual)
        return residual + super().forward(input)


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


class MLP(nn.Sequential):
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

"""Add & norm by the row kernels, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from add_norm_cases import SEED, check, make
from fused.kernels.tuning import rules as tuning

from bench.audit.interpreter import launches
from fused.backends import launchers
from fused.functional import dropout_mask

OPERATORS = tuple(launchers.TRITON[f"add_norm_{way}"] for way in ("forward", "backward"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tile limits that make rows of some hundred columns too wide for one tile."""
    limits = {"FORWARD_TILE_COLS": 64, "FORWARD_LOOP_COLS": 64, "ROW_SUMS_COLS": 64}
    tuning.forward_tile.cache_clear()
    tuning.backward_tile.cache_clear()
    with (
        mock.patch.multiple(tuning, SHARED_COLS=64, **limits),
        mock.patch.object(tuning, "BACKWARD_TILE_COLS", dict.fromkeys(range(4), 64)),
    ):
        yield
    tuning.forward_tile.cache_clear()
    tuning.backward_tile.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(5, 200), (33, 64), (3, 1025)], ids=str)
def test_shapes(shape: tuple[int, int], norm: str, dtype: torch.dtype) -> None:
    with launches() as log:
        found = check(make(*shape, dtype), norm, 0.3, *OPERATORS)
    # One pass forward, one backward and the second stage of its sums.
    names = [launch.kernel for launch in log]
    assert names == ["_row_fwd_kernel", "_row_bwd_kernel", "_column_sum_kernel"]
    keep = dropout_mask(*shape, 0.3, SEED)
    residual = make(*shape, dtype)[1]
    assert torch.equal(found["h"][~keep], residual[~keep])
    assert not found["dx"][~keep].any() and found["dx"][keep].all()
    check(make(*shape, dtype), norm, 0.0, *OPERATORS)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.usefixtures("small_tiles")
def test_rows_wider_than_a_tile(norm: str, p: float) -> None:
    for dtype in DTYPES[:2]:
        with launches() as log:
            check(make(3, 200, dtype), norm, p, *OPERATORS)
        names = [launch.kernel for launch in log]
        assert names[:2] == ["_row_fwd_kernel", "_row_fwd_loop_kernel"]
        assert names[2:] == ["_row_sums_kernel", "_row_bwd_kernel", "_column_sum_kernel"]


def test_strided_rows_and_no_gradient_of_the_sum() -> None:
    plain = make(6, 100, torch.float32)
    apart = [t if t.dim() == 1 else torch.cat([t, t], 1)[:, :100] for t in plain]
    for a, b in zip(
        check(plain, "layer", 0.2, *OPERATORS).values(),
        check(apart, "layer", 0.2, *OPERATORS).values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    forward, backward = OPERATORS
    x, residual, weight, bias, dy, _ = plain
    _, h, statistics = forward(x, residual, weight, bias, None, 1, 1e-5, 0)
    found = backward(dy, None, h, weight, bias, statistics, None, 0, 1, 1e-5, 0)
    wanted = backward(dy, torch.zeros_like(dy), h, weight, bias, statistics, None, 0, 1, 1e-5, 0)
    assert torch.equal(found[1], wanted[1]) and found[0].numel() == 0


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    y, h, statistics = OPERATORS[0](x, x, None, None, None, 1, 1e-5, 0)
    found = OPERATORS[1](y, h, h, None, None, statistics, None, 0, 1, 1e-5, 0)
    assert y.shape == h.shape == found[1].shape == shape

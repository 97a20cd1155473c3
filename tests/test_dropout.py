"""Dropout's mask: the generator, its statistics, and the same bits on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Inputs, make_epilogue, run_operator
from torch import Tensor

import fused
from fused import functional
from fused.run import random


def philox_4x32(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 on Python integers, written from the paper; any counter, any rounds."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


# Random123 1.14, kat_vectors, philox4x32 10.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_the_oracle_reproduces_the_known_answers(
    counter: list[int], key: list[int], answer: str
) -> None:
    assert " ".join(f"{w:08x}" for w in philox_4x32(counter, key, 10)) == answer


SEEDS = [0, 1, -1, 0x0123456789ABCDEF, -(1 << 63), (1 << 63) - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_words(seed: int) -> None:
    counters = [0, 1, 7, (1 << 32) - 1, 1 << 32, (1 << 40) + 5, (1 << 62) + 3]
    words = random.philox(torch.tensor([seed]), torch.tensor(counters))
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for i, counter in enumerate(counters):
        expected = philox_4x32([counter & 0xFFFFFFFF, counter >> 32, 0, 0], key, 7)
        assert [int(w[i]) for w in words] == expected


def test_mapping_of_elements_to_halves() -> None:
    rows, cols, seed, threshold = 3, 21, 42, 30000
    keep = random.keep_mask(rows, cols, threshold, torch.tensor([seed]))
    for r in range(rows):
        for c in range(cols):
            group = r * math.ceil(cols / 8) + c // 8
            word = philox_4x32([group, 0, 0, 0], [seed, 0], 7)[c % 8 // 2]
            number = word >> 16 if c % 2 else word & 0xFFFF
            assert bool(keep[r, c]) == (number >= threshold)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("seed", SEEDS)
def test_cpp_mask_is_the_reference_mask(seed: int) -> None:
    for rows, cols in ((1, 1), (5, 7), (3, 64), (9, 65), (2, 1000), (33, 130)):
        for p in (0.1, 0.5, 0.93, 1e-5):
            z = torch.ones(rows, cols)
            inputs = Inputs(z=z, dy=z, seed=torch.tensor([seed]))
            found = run_operator(inputs, make_epilogue(None, None, p))
            expected = functional.dropout_mask(rows, cols, p, seed)
            assert torch.equal(found["y"] != 0, expected)
            assert torch.equal(found["dz"], found["y"])
            threshold = round(p * 65536)
            assert (found["y"][expected] == torch.tensor(65536 / (65536 - threshold))).all()


@pytest.mark.usefixtures("isa")
def test_forward_and_backward_share_the_mask_for_every_norm() -> None:
    for norm in (None, "layer", "rms"):
        z = torch.randn(40, 100)
        inputs = Inputs(z=z, dy=torch.ones(40, 100), norm_bias=torch.full((100,), 5.0))
        if norm is None:
            inputs.norm_bias = None
        found = run_operator(inputs, make_epilogue(norm, None, 0.4))
        keep = functional.dropout_mask(40, 100, 0.4, inputs.seed)
        assert torch.equal(found["y"] != 0, keep)
        if norm is not None:
            scale = 65536 / (65536 - round(0.4 * 65536))
            torch.testing.assert_close(found["dnorm_bias"], keep.sum(0) * scale)


# ---- statistics; every planted defect must be caught by the same functions ----

LIMIT = 6.0  # standard deviations; the seeds are fixed, so a good mask never comes near


def mean_z(keep: Tensor, p: float) -> float:
    n, q = keep.numel(), 1 - round(p * 65536) / 65536
    return abs(float(keep.double().mean()) - q) / math.sqrt(q * (1 - q) / n)


def autocorrelation_z(keep: Tensor, dim: int) -> float:
    x = keep.double() - keep.double().mean()
    worst = 0.0
    for lag in (1, 2, 3, 4, 7, 8, 16, 32, 64, 128):
        size = keep.shape[dim] - lag
        product = x.narrow(dim, 0, size) * x.narrow(dim, lag, size)
        z = float(product.mean() / x.var()) * math.sqrt(product.numel())
        worst = max(worst, abs(z))
    return worst


def chi_square_z(keep: Tensor, dim: int) -> float:
    counts = keep.double().sum(dim)
    n, q = keep.shape[dim], float(keep.double().mean())
    chi2 = float(((counts - n * q) ** 2 / (n * q * (1 - q))).sum())
    freedom = counts.numel()
    return abs(chi2 - freedom) / math.sqrt(2 * freedom)


def worst_z(keep: Tensor, p: float) -> float:
    found = [mean_z(keep, p)]
    for dim in (0, 1):
        found += [autocorrelation_z(keep, dim), chi_square_z(keep, dim)]
    return max(found)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_statistics(p: float) -> None:
    for seed in (3, 1 << 40, -7):
        assert worst_z(functional.dropout_mask(1024, 512, p, seed), p) < LIMIT


DEFECTS = {
    "period of 64 columns": lambda keep: keep[:, :64].repeat(1, 8),
    "one mask for every row": lambda keep: keep[:1].expand(1024, -1),
    "one mask for every 32 rows": lambda keep: keep[:32].repeat(32, 1),
    "probability off by 0.003": lambda keep: keep | (torch.rand(keep.shape) < 0.006),
    "last column never dropped": lambda keep: keep.index_fill(1, torch.tensor([511]), True),
    "first row never dropped": lambda keep: keep.index_fill(0, torch.tensor([0]), True),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_caught(defect: str) -> None:
    keep = functional.dropout_mask(1024, 512, 0.5, 3)
    assert worst_z(DEFECTS[defect](keep), 0.5) > LIMIT


def test_seeds_give_independent_masks() -> None:
    first = functional.dropout_mask(512, 512, 0.5, 10)
    for seed in (11, 10 + (1 << 32), -10):
        other = functional.dropout_mask(512, 512, 0.5, seed)
        agree = float((first == other).double().mean())
        assert abs(agree - 0.5) * 2 * 512 < LIMIT


def test_the_mean_is_unbiased_at_the_realised_probability() -> None:
    x = torch.ones(4096, 512)
    for p in (0.1, 1 / 3, 0.9):
        y = functional.norm_act(x, activation="relu", p=p, seed=5)
        q = 1 - round(p * 65536) / 65536
        assert abs(float(y.double().mean()) - 1) < LIMIT * math.sqrt((1 - q) / q / x.numel())


def test_torch_manual_seed_governs_the_mask() -> None:
    net = fused.NormAct(64, activation="relu", norm="layer", dropout=0.5)
    x = torch.randn(8, 64)
    torch.manual_seed(7)
    first, second = net(x), net(x)
    torch.manual_seed(7)
    assert torch.equal(net(x), first) and torch.equal(net(x), second)
    assert not torch.equal(first, second)


def test_edges() -> None:
    x = torch.randn(5, 9)
    assert torch.equal(functional.norm_act(x, activation="relu", p=0.0), torch.relu(x))
    assert torch.equal(functional.norm_act(x, activation="relu", p=0.5, training=False), x.relu())
    assert (functional.norm_act(x, activation="relu", p=1.0) == 0).all()
    assert functional.dropout_mask(3, 4, 0.0, 1).all()
    assert not functional.dropout_mask(3, 4, 1.0, 1).any()
    assert functional.dropout_mask(0, 4, 0.5, 1).shape == (0, 4)

"""Dropout's random numbers: drawing a seed, and the keep mask in plain torch.

One mask on every backend, bit for bit. Philox4x32 with 7 rounds (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC'11); the key is the 64-bit seed, low word first. The tensor is seen
as rows × cols. Eight consecutive elements of a row share one counter

    g = row · ceil(cols / 8) + col // 8        (64 bits, low word first; words 2 and 3 are zero)

and element e = col % 8 takes word e // 2, its low half for even e, its high half for odd e. It is
kept when that 16-bit number is ≥ round(p · 65536). So the mask depends on the seed and the element
alone: not on the tile, the backend or the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import dropout_threshold

PHILOX_ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed of shape (1,) on `device`, from torch's default generator.

    `torch.manual_seed` governs it, activation checkpointing replays it and CUDA graph replays
    advance it, because it stays a tensor.
    """
    return torch.randint(0x7FFFFFFFFFFFFFFF, (1,), device=device)


def philox(seed: Tensor, counter: Tensor, rounds: int = PHILOX_ROUNDS) -> tuple[Tensor, ...]:
    """The four 32-bit words of Philox4x32 for each 64-bit counter, as int64 tensors.

    Args:
        seed: int64, one element; the key.
        counter: int64, any shape; words 0 and 1 of the counter, words 2 and 3 are zero.

    Products of 32-bit words wrap in int64; the bits are right, so the high word needs the mask.
    """
    seed = seed.reshape(())
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = ((p1 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((p0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(rows: int, cols: int, threshold: int, seed: Tensor) -> Tensor:
    """The keep mask (rows, cols), bool, of a 16-bit threshold; `dropout_mask` takes p instead."""
    groups = (cols + 7) // 8
    counter = torch.arange(rows * groups, device=seed.device).reshape(rows, groups)
    words = philox(seed, counter)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).reshape(rows, groups * 8)[:, :cols] >= threshold


def dropout_mask(rows: int, cols: int, p: float, seed: Tensor) -> Tensor:
    """The keep mask (rows, cols), bool, of dropout probability p under a seed."""
    return keep_mask(rows, cols, dropout_threshold(p), seed)

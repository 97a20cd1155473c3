"""Dropout's multiplier for a tile: Philox4x32 with 7 rounds, eight elements per call.

The same bits as fused/run/random.py, which states the rule: counter, word and half of an element.
The mask depends on the seed and the element alone.

Why not tl.randint4x: 32 x 32 → 64 bit products written as one multiplication become IMAD.WIDE. A
prototype measured 10.8 against 12.2 instructions an element at 10 rounds, 8.7 at 7 rounds (SASS of
sm_90, triton 3.7.1, the increment from 4096 to 8192 columns).
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def philox(seed, counter):
    """The four 32-bit words of the 64-bit counters (int64, any shape) under the 64-bit seed."""
    key = seed.to(tl.uint64)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    counter = counter.to(tl.uint64)
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = c0 * 0
    c3 = c0 * 0
    for _ in tl.static_range(PHILOX_ROUNDS):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def dropout_multiplier(
    seed,
    row,  # int64 [BLOCK_M]
    col0,  # first column of the tile, a multiple of 8
    cols,
    threshold,
    PER_THREAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: the scale where an element is kept, 0 where it is dropped.

    PER_THREAD is the number of neighbours that one thread loads with 16 bytes, 8 or 4. With 4 (z is
    float32) two threads repeat one Philox call and take half of its words each: the mask then has
    the layout of the data, where handing words over would cost a trip through shared memory, and
    float32 has twice the instruction budget of bfloat16 (time is bytes).
    """
    part = tl.arange(0, BLOCK_N // PER_THREAD)
    group = part // (8 // PER_THREAD) + col0 // 8
    counter = row[:, None] * ((cols + 7) // 8) + group[None, :]
    w0, w1, w2, w3 = philox(seed, counter)  # [BLOCK_M, BLOCK_N / PER_THREAD]
    if PER_THREAD == 8:
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        upper = (part % 2 == 1)[None, :]
        word = tl.join(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    word = tl.reshape(word, (BLOCK_M, BLOCK_N // 2))
    # In the shifted copy the low half decides, in the word itself the high half does.
    number = tl.reshape(tl.join(word << 16, word), (BLOCK_M, BLOCK_N))
    return scale_or_zero(number, threshold)


@triton.jit
def channel_multiplier(seed, sample, channel, channels, threshold):
    """The same for whole channels of a sample (int64 scalar): float32, of the shape of `channel`.

    The mask lies over (samples, channels). Every channel calls Philox for itself and takes its half
    of a word: a tile has few channels, or the elements of each share the cost.
    """
    counter = sample * ((channels + 7) // 8) + channel // 8
    w0, w1, w2, w3 = philox(seed, counter)
    element = channel % 8
    word = tl.where(element < 4, tl.where(element < 2, w0, w1), tl.where(element < 6, w2, w3))
    return scale_or_zero(tl.where(element % 2 == 0, word << 16, word), threshold)


@triton.jit
def scale_or_zero(number, threshold):
    """The scale where the upper half of the 32-bit number reaches the threshold, else 0."""
    # threshold 65536 (drop everything) wraps to 0 in the comparison; its scale is 0.
    kept = (65536 - threshold).to(tl.float32)
    scale = tl.where(threshold < 65536, tl.div_rn(65536.0, kept), 0.0)
    return tl.where(number >= (threshold.to(tl.uint32) << 16), scale, 0.0)

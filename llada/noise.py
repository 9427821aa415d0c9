"""Keyed randomness: every draw is a pure function of (seed, purpose, index).

No draw depends on the state of a rank's generator. Order and t come from (seed, step), masks and
random lengths from (seed, global sample index), initial weights from (seed, parameter name, row
block). So no layout, restart or number of workers changes a draw. There are two generators:

* `stream`: a Philox-4x64 counter stream (Salmon et al., SC 2011), for many numbers under one key.
  Only its raw 64-bit words are used, which numpy keeps stable across versions; distributions are
  derived from them here.
* `hash64`: the SplitMix64 finalizer (Steele et al., OOPSLA 2014), for one number per index,
  vectorized over indices.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from llada.arrays import F64, I64, U64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment: 2**64 divided by the golden ratio, rounded to an odd number."""
_MASK64 = 2**64 - 1


def purpose_key(purpose: str) -> int:
    """A 64-bit key for a use of randomness, so that two uses never share a stream."""
    # blake2b and not hash(): Python's own differs from process to process.
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def stream(seed: int, purpose: str, *index: int) -> np.random.Philox:
    """The Philox stream of (seed, purpose, up to three indices).

    Streams of different keys do not overlap: seed and purpose are the key, the indices the upper
    three words of the counter. The lowest word, which starts at 0, counts the draws.
    """
    if len(index) > 3:
        raise ValueError(f"a stream has at most three indices, got {len(index)}")
    counter = np.array([0, *index, *([0] * (3 - len(index)))], dtype=np.uint64)
    key = np.array([seed, purpose_key(purpose)], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key)


def uniforms(bits: np.random.Philox, n: int) -> F64:
    """The next `n` numbers of a stream as float64 in [0, 1), 53 bits each."""
    return to_unit(bits.random_raw(n).astype(np.uint64, copy=False))


def to_unit(words: U64) -> F64:
    """64-bit words as float64 in [0, 1): the upper 53 bits."""
    # A float64 has 53 bits of mantissa: more would be rounded, and might round up to 1.
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash64(key: int, index: npt.ArrayLike) -> U64:
    """One pseudo-random 64-bit word per index: two rounds of the SplitMix64 finalizer.

    Args:
        key: from `derive_key`.
        index: integers of any shape; negative ones count from 2**64 down.

    Returns:
        uint64 in the shape of `index`.
    """
    # All arithmetic is modulo 2**64, so overflow is meant.
    with np.errstate(over="ignore"):
        words = np.asarray(index).astype(np.uint64) * _GOLDEN + np.uint64(key)
        for _ in range(2):
            words = words + _GOLDEN
            words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            words = words ^ (words >> np.uint64(31))
    return words


def derive_key(seed: int, purpose: str, *parts: int | str) -> int:
    """A 64-bit key for `hash64` and `permute` from a seed, a purpose and further parts."""
    # NUL separates the parts, so that ("a", "bc") and ("ab", "c") differ.
    text = "\x00".join([str(seed), purpose, *map(str, parts)])
    return purpose_key(text)


def random_lengths(seed: int, samples: npt.ArrayLike, length: int, probability: float) -> I64:
    """The position r at which each window is cut in two segments, [0, r) and [r, length).

    With `probability`, r is uniform on 1..length; otherwise it is `length`, and nothing is cut.

    Args:
        seed: the run's seed.
        samples: global sample indices [n].
        length: tokens per window.
        probability: share of the windows with a random length (the paper: 0.01).

    Returns:
        int64 [n]; r = length means one segment.
    """
    samples = np.asarray(samples, dtype=np.uint64)
    chosen = to_unit(hash64(derive_key(seed, "train/length-chosen"), samples)) < probability
    r = 1 + np.floor(to_unit(hash64(derive_key(seed, "train/length"), samples)) * length).astype(
        np.int64
    )
    return np.where(chosen, r, length)


def timesteps(seed: int, step: int, shares: npt.ArrayLike, mode: str) -> F64:
    """The diffusion time t in [0, 1) of every segment of a global step.

    "iid" draws independent uniforms. "stratified" lays the segments end to end in keyed order, each
    as long as its share of the step's loss, and takes

        t = frac(u + midpoint / total length)

    with one uniform u for the step. Each t on its own is uniform; together they cover [0, 1)
    evenly; and since the order is keyed, the place of a segment in the batch says nothing about
    its t.

    Example: shares (2, 1, 1), order (segment 2, 0, 1), u = 0.3. The segments cover [0, 1), [1, 3)
    and [3, 4) of a total of 4, with midpoints 0.5, 2 and 3.5. So segment 2 gets
    t = 0.3 + 0.5 / 4 = 0.425, segment 0 gets 0.3 + 2 / 4 = 0.8, and segment 1 gets
    frac(0.3 + 3.5 / 4) = 0.175.

    Args:
        seed: the run's seed.
        step: global step.
        shares: share of each segment in the step's loss, in any unit, [n], > 0, in order of the
            global sample index.
        mode: "stratified" or "iid".

    Returns:
        float64 [n].
    """
    shares = np.asarray(shares, dtype=np.float64)
    bits = stream(seed, f"train/t-{mode}", step)
    if mode == "iid":
        return uniforms(bits, len(shares))
    offset = uniforms(bits, 1)[0]
    # Sorting random keys gives a random order; a stable sort gives the same one everywhere.
    order = np.argsort(bits.random_raw(len(shares)), kind="stable")
    ends = np.cumsum(shares[order])
    # float64 throughout: a step has up to millions of tokens, and float32 would merge strata.
    t = np.empty(len(shares))
    t[order] = (offset + (ends - shares[order] / 2) / ends[-1]) % 1.0
    return t


def mask_uniforms(seed: int, sample: int, length: int, purpose: str = "train") -> F64:
    """One uniform in [0, 1) per position of a sample's window, float64 [length].

    The draw of a position depends on its index in the window only, not on how the window is cut.
    """
    return uniforms(stream(seed, f"{purpose}/mask", sample), length)


def permute(index: npt.ArrayLike, n: int, key: int) -> I64:
    """A keyed permutation of 0..n-1, evaluated at `index` without a table.

    A Feistel network of six rounds permutes 0..m-1, where m is the smallest even power of two that
    is at least n. An image of n or more is fed into the network again until it is below n: "cycle
    walking" (Black and Rogaway, CT-RSA 2002). Since m < 4 n, that takes at most four tries on
    average.

    Example: n = 5. The largest value, 4, has 3 bits, so the halves have 2 bits each and m = 16. If
    the network maps 3 to 11 and 11 to 2, the image of 3 is 2. No other index arrives at 2: the
    network is a bijection, so each value has a single predecessor, and the way back from 2 leads
    over 11 to 3.

    Args:
        index: values in 0..n-1, of any shape.
        n: size of the domain.
        key: from `derive_key`.

    Returns:
        int64 in the shape of `index`.
    """
    # Bits of one half, and a mask that keeps them. n = 1 has one half of 1 bit, too.
    half = max(1, ((max(n - 1, 1)).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    out = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)  # the values that are not below n yet
    while todo.any():
        left = out[todo] >> shift
        right = out[todo] & low
        for round_ in range(6):
            # Whatever the hash is, a round can be undone, which makes the network a bijection.
            left, right = right, left ^ (hash64((key + round_) & _MASK64, right) & low)
        out[todo] = (left << shift) | right
        # Cycle walking: what is not below n goes through the rounds again.
        todo[todo] = out[todo] >= n
    return out.astype(np.int64).reshape(np.shape(index))

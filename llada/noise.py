"""Keyed randomness: every draw is a pure function of (seed, purpose, index), never of a rank's
generator state.

Order and t come from (seed, step); masks and random lengths from (seed, global sample index);
initial weights from (seed, parameter name, row block). So no layout, restart or worker count
changes a draw. Two sources are used:

* `stream`: a Philox-4x64 counter stream (Salmon et al., SC 2011) for many numbers under one key.
  Only its raw 64-bit words are used, which numpy keeps stable across versions; distributions are
  derived here.
* `hash64`: the SplitMix64 finaliser (Steele et al., OOPSLA 2014) for one number per index,
  vectorised over indices.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def purpose_key(purpose: str) -> int:
    """A 64-bit number for the name of a use of randomness, so that two uses never share
    a stream.
    """
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def stream(seed: int, purpose: str, *index: int) -> np.random.Philox:
    """The Philox stream of (seed, purpose, up to three indices). Streams of different keys do not
    overlap.
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
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash64(key: int, index: npt.ArrayLike) -> U64:
    """One pseudo-random 64-bit word per index (vectorised): two rounds of the SplitMix64 finaliser
    over index and key.
    """
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
    text = "\x00".join([str(seed), purpose, *map(str, parts)])
    return purpose_key(text)


def random_lengths(
    seed: int, samples: npt.ArrayLike, length: int, probability: float, purpose: str = "train"
) -> I64:
    """Where each sample's window is cut in two: r uniform on 1..length with `probability`, else
    `length` (not cut).

    Args:
        samples: global sample indices [n].
        length: tokens per window.
        probability: share of the windows with a random length (the paper: 0.01).

    Returns:
        int64 [n]; r = length means one segment.
    """
    samples = np.asarray(samples, dtype=np.uint64)
    chosen = to_unit(hash64(derive_key(seed, f"{purpose}/length-chosen"), samples)) < probability
    r = 1 + np.floor(
        to_unit(hash64(derive_key(seed, f"{purpose}/length"), samples)) * length
    ).astype(np.int64)
    return np.where(chosen, r, length)


def timesteps(
    seed: int, step: int, shares: npt.ArrayLike, mode: str, purpose: str = "train"
) -> F64:
    """t in [0, 1) for every segment of a global step.

    stratified: the segments are laid end to end in keyed order, each as long as its share of the
    step's loss; t = frac(u_step + midpoint / total length), in float64. Each t alone is uniform,
    together they cover [0, 1) evenly, and a segment's place in the batch says nothing about its t.
    iid: independent uniforms.

    Args:
        step: global step.
        shares: each segment's share of the step's loss, any unit, [n], > 0, in order of the global
            sample index.
        mode: "stratified" or "iid".
    """
    shares = np.asarray(shares, dtype=np.float64)
    bits = stream(seed, f"{purpose}/t-{mode}", step)
    if mode == "iid":
        return uniforms(bits, len(shares))
    # Segments of 3, 5 and 8 tokens in the keyed order 8, 3, 5 have their midpoints at 4, 9.5 and
    # 13.5 of 16; with an offset of 0.5 their t are 0.75, 0.09 and 0.34.
    offset = uniforms(bits, 1)[0]
    order = np.argsort(bits.random_raw(len(shares)), kind="stable")
    ends = np.cumsum(shares[order])
    t = np.empty(len(shares))
    t[order] = (offset + (ends - shares[order] / 2) / ends[-1]) % 1.0
    return t


def mask_uniforms(seed: int, sample: int, length: int, purpose: str = "train") -> F64:
    """One float64 in [0, 1) per position of a sample's window: a position's draw depends on no
    segmentation.
    """
    return uniforms(stream(seed, f"{purpose}/mask", sample), length)


def permute(index: npt.ArrayLike, n: int, key: int) -> I64:
    """A keyed permutation of 0..n-1, evaluated at `index` without a table (format-preserving,
    vectorised).

    Six Feistel rounds on the smallest even number of bits that holds n, walking each cycle until it
    is back below n (Black and Rogaway, CT-RSA 2002); at most four tries on average.

    Args:
        index: values in 0..n-1.
        n: size of the domain.
        key: from `derive_key`.
    """
    # The rounds permute all numbers of 2 * half bits: for n = 5 those are 0..15.
    half = max(1, ((max(n - 1, 1)).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    out = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        left, right = out[todo] >> shift, out[todo] & low
        for round_ in range(6):
            left, right = right, left ^ (hash64(key + round_ & (2**64 - 1), right) & low)
        out[todo] = (left << shift) | right
        # What is not below n goes through the rounds again. With n = 5 one key sends 3 to 12, 10,
        # 9, 11 and then 0. Such a walk follows a cycle of the permutation, so it comes back below
        # n, and two indices never end at one number.
        todo[todo] = out[todo] >= n
    return out.astype(np.int64).reshape(np.shape(index))

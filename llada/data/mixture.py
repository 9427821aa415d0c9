"""Which window of which corpus a sample is: arithmetic on the global sample index, no table of samples.

The data order is cut into blocks of 10,000 samples. Within a stage (a run of blocks in which the weights stay the same) every
block gives each corpus a fixed integer quota, in keyed order. A sample's position in its corpus is then

    windows consumed before the stage + (block - first block of the stage) * quota + rank within the block

and its epoch is position // windows; each epoch is a keyed permutation of the corpus, keyed by the data's fingerprint, so
neither the path nor the place in the list matters. Stages end where a corpus reaches its cap, always at a block boundary: in a
block for which it has too few windows left it gives those, and the others share the rest by weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llada.config import SHUFFLE_BLOCK
from llada.errors import UserError
from llada.noise import derive_key, permute, stream

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A corpus as the mixture sees it.

    Attributes:
        name: for messages.
        fingerprint: of the data; the key of its order.
        windows: full windows it holds.
        weight: share, relative to the other weights.
        max_windows: windows after which it leaves; None: no cap.
    """

    name: str
    fingerprint: str
    windows: int
    weight: float
    max_windows: int | None = None


@dataclass(frozen=True)
class Stage:
    """Blocks with equal quotas.

    Attributes:
        first_block: where it starts.
        quotas: samples per block of each source, int64 [sources]; they add up to the block, except in the last one of an
            all-capped mixture.
        consumed: windows of each source consumed before the stage, int64 [sources].
    """

    first_block: int
    quotas: I64
    consumed: I64


def quotas_of(weights: Sequence[float], block: int = SHUFFLE_BLOCK) -> I64:
    """Share `block` samples by weight with the largest-remainder method; ties go to the earlier source."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * block
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    quotas[by_remainder[: block - quotas.sum()]] += 1
    return quotas


class Mixture:
    """Sample index -> (source, window).

    Args:
        sources: the corpora in order.
        seed: key of the order.

    Attributes:
        num_samples: samples until every source has reached its cap; None: endless.

    Raises:
        UserError: a source without a full window, with a weight too small for one sample per block, or the same data twice.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self._check()
        self.stages, self.num_samples = self._plan()
        self._slots = lru_cache(maxsize=8)(self._block_slots)

    def _check(self) -> None:
        for i, source in enumerate(self.sources):
            if source.windows < 1:
                raise UserError(
                    f"data.mixture.{i}.path: {source.name} holds no full window or conversation; "
                    "use a smaller data.sequence_length or more text"
                )
            if source.max_windows is not None and source.max_windows < 1:
                raise UserError(
                    f"data.mixture.{i}.max_epochs: less than one of the {source.windows} windows or conversations of {source.name}; "
                    "raise it or drop the entry"
                )
            twins = [other.name for other in self.sources[:i] if other.fingerprint == source.fingerprint]
            if twins:
                raise UserError(
                    f"data.mixture.{i}.path: {source.name} holds the same data as {twins[0]}; give one entry and a larger weight"
                )

    def _plan(self) -> tuple[list[Stage], int | None]:
        """Cut stages where a capped source has too few windows left for another block. Returns them and the number of samples
        until every source has left (None: never)."""
        stages: list[Stage] = []
        block, consumed = 0, np.zeros(len(self.sources), dtype=np.int64)
        caps = [source.max_windows for source in self.sources]
        while active := [i for i, cap in enumerate(caps) if cap is None or cap > consumed[i]]:
            left = {i: cap - int(consumed[i]) for i in active if (cap := caps[i]) is not None}
            quotas = self._quotas(active)
            if not left:
                stages.append(Stage(block, quotas, consumed))
                return stages, None
            length = min(left[i] // int(quotas[i]) for i in left)
            if not length:
                quotas, length = self._last_quotas(active, left), 1
            stages.append(Stage(block, quotas, consumed))
            block, consumed = block + length, consumed + length * quotas
        return stages, int(consumed.sum())

    def _quotas(self, active: list[int], size: int = SHUFFLE_BLOCK) -> I64:
        quotas = np.zeros(len(self.sources), dtype=np.int64)
        quotas[active] = quotas_of([self.sources[i].weight for i in active], size)
        for i in active:
            if quotas[i] == 0 and size == SHUFFLE_BLOCK:
                source = self.sources[i]
                raise UserError(
                    f"data.mixture.{i}.weight: {source.weight} gives {source.name} no sample "
                    f"in a block of {SHUFFLE_BLOCK}; raise it or drop the entry"
                )
        return quotas

    def _last_quotas(self, active: list[int], left: dict[int, int]) -> I64:
        """Of a block in which a source reaches its cap: no source gives more than it has left, the others share the rest."""
        fixed: dict[int, int] = {}
        while rest := [i for i in active if i not in fixed]:
            quotas = self._quotas(rest, SHUFFLE_BLOCK - sum(fixed.values()))
            over = {i: left[i] for i in rest if i in left and quotas[i] >= left[i]}
            if not over:
                break
            fixed |= over
        quotas = quotas if rest else np.zeros(len(self.sources), dtype=np.int64)
        quotas[list(fixed)] = list(fixed.values())
        return quotas

    def _block_slots(self, block: int) -> tuple[Stage, I64, I64]:
        """The stage of a block, and for each of its samples the source and the rank among that source's samples."""
        stage = next(stage for stage in reversed(self.stages) if stage.first_block <= block)
        slots = np.repeat(np.arange(len(self.sources)), stage.quotas)
        slots = slots[np.argsort(stream(self.seed, "mixture/block", block).random_raw(len(slots)), kind="stable")]
        ranks = np.empty(len(slots), dtype=np.int64)
        for i, quota in enumerate(stage.quotas):
            ranks[slots == i] = np.arange(quota)
        return stage, slots, ranks

    def position(self, sample: int) -> tuple[int, int]:
        """(source, position in its endless sequence of windows) of a global sample index.

        Raises IndexError past the last sample of an all-capped mixture.
        """
        block, offset = divmod(sample, SHUFFLE_BLOCK)
        if self.num_samples is not None and sample >= self.num_samples:
            raise IndexError(f"sample {sample} is past the mixture's last, {self.num_samples - 1}")
        stage, slots, ranks = self._slots(block)
        i = int(slots[offset])
        return i, int(stage.consumed[i] + (block - stage.first_block) * stage.quotas[i] + ranks[offset])

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, window) of a global sample index."""
        i, position = self.position(sample)
        source = self.sources[i]
        epoch, index = divmod(position, source.windows)
        key = derive_key(self.seed, "mixture/order", source.fingerprint, epoch)
        return i, int(permute(index, source.windows, key))

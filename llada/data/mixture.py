"""Which window of which corpus a sample is: arithmetic on the global sample index, no table of samples.

The data order is cut into blocks of 10,000 samples. Within a stage (a run of blocks in which the weights stay the same) every
block gives each corpus a fixed integer quota, in keyed order. A sample's position in its corpus is then

    windows consumed before the stage + (block - first block of the stage) * quota + rank within the block

and its epoch is position // windows; each epoch is a keyed permutation of the corpus, keyed by the data's fingerprint, so
neither the path nor the place in the list matters. Stages end where a corpus reaches its cap, always at a block boundary.
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
        quotas: samples per block of each source, int64 [sources]; they add up to the block.
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

    Raises:
        UserError: a source without a full window, with a weight too small for one sample per block, or the same data twice.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self._check()
        self.stages, self.end_block = self._plan()
        self._slots = lru_cache(maxsize=8)(self._block_slots)

    def _check(self) -> None:
        for i, source in enumerate(self.sources):
            if source.windows < 1:
                raise UserError(
                    f"data.mixture.{i}.path: {source.name} holds no full window; use a smaller data.sequence_length or more text"
                )
            twins = [other.name for other in self.sources[:i] if other.fingerprint == source.fingerprint]
            if twins:
                raise UserError(
                    f"data.mixture.{i}.path: {source.name} holds the same data as {twins[0]}; give one entry and a larger weight"
                )

    def _plan(self) -> tuple[list[Stage], int | None]:
        """Cut stages where a capped source has too few windows left for another block. Returns them and the block at which
        every source has left (None: never)."""
        active = list(range(len(self.sources)))
        stages: list[Stage] = []
        block, consumed = 0, np.zeros(len(self.sources), dtype=np.int64)
        while active:
            quotas = np.zeros(len(self.sources), dtype=np.int64)
            quotas[active] = quotas_of([self.sources[i].weight for i in active])
            for i in active:
                if quotas[i] == 0:
                    source = self.sources[i]
                    raise UserError(
                        f"data.mixture.{i}.weight: {source.weight} gives {source.name} no sample "
                        f"in a block of {SHUFFLE_BLOCK}; raise it or drop the entry"
                    )
            lasts = {i: self._blocks_left(i, quotas, consumed) for i in active}
            finite = [blocks for blocks in lasts.values() if blocks is not None]
            if not finite:
                stages.append(Stage(block, quotas, consumed))
                return stages, None
            length = min(finite)
            if length:
                stages.append(Stage(block, quotas, consumed))
                block, consumed = block + length, consumed + length * quotas
            active = [i for i in active if (left := lasts[i]) is None or left > length]
        return stages, block

    def _blocks_left(self, i: int, quotas: I64, consumed: I64) -> int | None:
        cap = self.sources[i].max_windows
        return None if cap is None else int((cap - consumed[i]) // quotas[i])

    @property
    def num_samples(self) -> int | None:
        """Samples until every source has reached its cap; None: endless."""
        return None if self.end_block is None else self.end_block * SHUFFLE_BLOCK

    def _block_slots(self, block: int) -> tuple[Stage, I64, I64]:
        """The stage of a block, and for each of its samples the source and the rank among that source's samples."""
        stage = next(stage for stage in reversed(self.stages) if stage.first_block <= block)
        slots = np.repeat(np.arange(len(self.sources)), stage.quotas)
        slots = slots[np.argsort(stream(self.seed, "mixture/block", block).random_raw(SHUFFLE_BLOCK), kind="stable")]
        ranks = np.empty(SHUFFLE_BLOCK, dtype=np.int64)
        for i, quota in enumerate(stage.quotas):
            ranks[slots == i] = np.arange(quota)
        return stage, slots, ranks

    def position(self, sample: int) -> tuple[int, int]:
        """(source, position in its endless sequence of windows) of a global sample index.

        Raises IndexError past the last sample of an all-capped mixture.
        """
        block, offset = divmod(sample, SHUFFLE_BLOCK)
        if self.end_block is not None and block >= self.end_block:
            raise IndexError(f"sample {sample} is past the mixture's last, {self.end_block * SHUFFLE_BLOCK - 1}")
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

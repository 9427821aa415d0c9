"""Which window of which corpus a sample is: arithmetic on the global sample index, no table of
samples.

The data order is cut into blocks of 10,000 samples. Within a stage (a run of blocks in which the
weights stay the same) every block gives each corpus a fixed integer quota, in keyed order. A
sample's position in its corpus is then

    windows consumed before the stage + (block - first block of the stage) * quota + rank within the
    block

and its epoch is position // windows; each epoch is a keyed permutation of the corpus, keyed by the
data's fingerprint, so neither the path nor the place in the list matters. Stages end where weights
change and where a corpus reaches its cap, always at a block boundary. A change takes effect with
the first block that starts at or after it. In a block for which a capped corpus has too few windows
left it gives those, and the others share the rest by weight.
"""

from __future__ import annotations

import bisect
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
class MixtureSource:
    """A corpus as the mixture sees it.

    Attributes:
        name: for messages.
        fingerprint: of the data; the key of its order.
        windows: full windows it holds.
        weight: share, relative to the other weights; 0: not read.
        max_windows: windows after which it leaves; None: no cap.
        changes: (samples of the run, weight from then on), ascending.
    """

    name: str
    fingerprint: str
    windows: int
    weight: float
    max_windows: int | None = None
    changes: tuple[tuple[int, float], ...] = ()

    def weight_in(self, block: int, size: int = SHUFFLE_BLOCK) -> float:
        """The weight in a block of `size` samples."""
        return next(
            (weight for samples, weight in reversed(self.changes) if samples <= block * size),
            self.weight,
        )

    @property
    def first_weight(self) -> float:
        """Its first weight that is not 0: what it counts in means over corpora, whenever it is
        read.
        """
        return next(
            weight for weight in (self.weight, *(weight for _, weight in self.changes)) if weight
        )


@dataclass(frozen=True)
class Stage:
    """Blocks with equal quotas.

    Attributes:
        first_block: where it starts.
        quotas: samples per block of each source, int64 [sources]; they add up to the block, except
            in the last one of a mixture that ends.
        consumed: windows of each source consumed before the stage, int64 [sources].
    """

    first_block: int
    quotas: I64
    consumed: I64


def quotas_of(weights: Sequence[float], block: int = SHUFFLE_BLOCK) -> I64:
    """Share `block` samples by weight with the largest-remainder method; ties go to the earlier
    source.
    """
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
        block: samples per block.

    Attributes:
        stages: in order.
        num_samples: samples until no source with a weight has windows left; None: endless.

    Raises:
        UserError: a source without a full window, with a weight too small for one sample per block,
            or the same data twice.
    """

    def __init__(
        self, sources: Sequence[MixtureSource], seed: int, block: int = SHUFFLE_BLOCK
    ) -> None:
        self.sources = tuple(sources)
        self.seed, self.block = seed, block
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
                    f"data.mixture.{i}.max_epochs: less than one of the {source.windows} windows or"
                    f" conversations of {source.name}; raise it or drop the entry"
                )
            twins = [
                other.name for other in self.sources[:i] if other.fingerprint == source.fingerprint
            ]
            if twins:
                raise UserError(
                    f"data.mixture.{i}.path: {source.name} holds the same data as {twins[0]}; give"
                    " one entry and a larger weight"
                )

    @property
    def changes(self) -> list[int]:
        """First blocks with other weights than the block before, ascending."""
        blocks = sorted(
            {-(-samples // self.block) for source in self.sources for samples, _ in source.changes}
        )
        return [block for block in blocks if self._weights(block) != self._weights(block - 1)]

    def _weights(self, block: int) -> list[float]:
        return [source.weight_in(block, self.block) for source in self.sources]

    def _plan(self) -> tuple[list[Stage], int | None]:
        """Cut stages where weights change and where a capped source has too few windows left for
        another block. Returns them and the number of samples until no source with a weight has
        windows left (None: never).
        """
        stages: list[Stage] = []
        block, consumed = 0, np.zeros(len(self.sources), dtype=np.int64)
        caps, changes = [source.max_windows for source in self.sources], self.changes
        while True:
            weights = self._weights(block)
            active = [
                i for i, cap in enumerate(caps) if weights[i] and (cap is None or cap > consumed[i])
            ]
            if not active:
                return stages, int(consumed.sum())
            left = {i: cap - int(consumed[i]) for i in active if (cap := caps[i]) is not None}
            quotas = self._quotas(active, weights, self.block)
            self._check_quotas(quotas, active, weights)
            lengths = [left[i] // int(quotas[i]) for i in left] + [
                change - block for change in changes if change > block
            ]
            if not lengths:
                stages.append(Stage(block, quotas, consumed))
                return stages, None
            length = min(lengths)
            if not length:
                quotas, length = self._last_quotas(active, weights, left), 1
            stages.append(Stage(block, quotas, consumed))
            block, consumed = block + length, consumed + length * quotas
            # what a later change would bring cannot follow half a block
            if quotas.sum() < self.block:
                return stages, int(consumed.sum())

    def _quotas(self, active: list[int], weights: list[float], size: int) -> I64:
        quotas = np.zeros(len(self.sources), dtype=np.int64)
        quotas[active] = quotas_of([weights[i] for i in active], size)
        return quotas

    def _check_quotas(self, quotas: I64, active: list[int], weights: list[float]) -> None:
        for i in active:
            if quotas[i] == 0:
                source = self.sources[i]
                where = "weight" if weights[i] == source.weight else "weight_at"
                raise UserError(
                    f"data.mixture.{i}.{where}: {weights[i]} gives {source.name} no sample "
                    f"in a block of {self.block}; raise it or drop the entry"
                )

    def _last_quotas(self, active: list[int], weights: list[float], left: dict[int, int]) -> I64:
        """Of a block in which a source reaches its cap: no source gives more than it has left, the
        others share the rest.
        """
        fixed: dict[int, int] = {}
        while rest := [i for i in active if i not in fixed]:
            quotas = self._quotas(rest, weights, self.block - sum(fixed.values()))
            over = {i: left[i] for i in rest if i in left and quotas[i] >= left[i]}
            if not over:
                break
            fixed |= over
        quotas = quotas if rest else np.zeros(len(self.sources), dtype=np.int64)
        quotas[list(fixed)] = list(fixed.values())
        return quotas

    def stage_of(self, block: int) -> Stage:
        """The stage in which a block lies."""
        return self.stages[
            bisect.bisect_right(self.stages, block, key=lambda stage: stage.first_block) - 1
        ]

    def _block_slots(self, block: int) -> tuple[Stage, I64, I64]:
        """The stage of a block, and for each of its samples the source and the rank among that
        source's samples.
        """
        stage = self.stage_of(block)
        slots = np.repeat(np.arange(len(self.sources)), stage.quotas)
        slots = slots[
            np.argsort(
                stream(self.seed, "mixture/block", block).random_raw(len(slots)), kind="stable"
            )
        ]
        ranks = np.empty(len(slots), dtype=np.int64)
        firsts = np.cumsum(stage.quotas) - stage.quotas
        ranks[np.argsort(slots, kind="stable")] = np.arange(len(slots)) - np.repeat(
            firsts, stage.quotas
        )
        return stage, slots, ranks

    def consumed(self, samples: int) -> I64:
        """Windows of each source that the first `samples` samples read, int64 [sources]."""
        block, rest = divmod(samples, self.block)
        stage, slots, _ = self._slots(block)
        part = np.bincount(slots[:rest], minlength=len(self.sources))
        return stage.consumed + (block - stage.first_block) * stage.quotas + part

    def exhausted_after(self, source: int) -> int | None:
        """Samples after which a source has reached its cap, rounded up to a whole block; None: it
        has none, or is not read so far.
        """
        cap = self.sources[source].max_windows
        if cap is None:
            return None
        for stage in self.stages:
            if stage.consumed[source] >= cap:
                return stage.first_block * self.block
        return self.num_samples

    def stream_positions(self, samples: I64) -> tuple[I64, I64]:
        """MixtureSource, and position in its endless sequence of windows, of global sample indices;
        all int64 [n].

        Raises IndexError past the last sample of a mixture that ends.
        """
        if self.num_samples is not None and len(samples) and samples.max() >= self.num_samples:
            raise IndexError(
                f"sample {samples.max()} is past the mixture's last, {self.num_samples - 1}"
            )
        blocks, offsets = np.divmod(samples, self.block)
        sources, positions = (
            np.empty(len(samples), dtype=np.int64),
            np.empty(len(samples), dtype=np.int64),
        )
        for block in np.unique(blocks).tolist():
            own = blocks == block
            stage, slots, ranks = self._slots(block)
            sources[own] = chosen = slots[offsets[own]]
            positions[own] = (
                stage.consumed[chosen]
                + (block - stage.first_block) * stage.quotas[chosen]
                + ranks[offsets[own]]
            )
        return sources, positions

    def lookup(self, samples: I64) -> tuple[I64, I64]:
        """MixtureSource and window of global sample indices; all int64 [n]."""
        sources, positions = self.stream_positions(samples)
        windows = np.empty(len(samples), dtype=np.int64)
        for i in np.unique(sources).tolist():
            source, from_it = self.sources[i], np.flatnonzero(sources == i)
            epochs, indices = np.divmod(positions[from_it], source.windows)
            for epoch in np.unique(epochs).tolist():
                own = epochs == epoch
                key = derive_key(self.seed, "mixture/order", source.fingerprint, epoch)
                windows[from_it[own]] = permute(indices[own], source.windows, key)
        return sources, windows

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, window) of one global sample index."""
        sources, windows = self.lookup(np.array([sample], dtype=np.int64))
        return int(sources[0]), int(windows[0])

"""Which instance of which corpus a sample is: arithmetic on the global sample index, no table of
samples.

The samples of a run are cut into blocks of 10,000. Within a stage of the mixture (a run of blocks
in which the weights stay the same) every block gives each corpus a fixed integer quota, in keyed
order. A corpus is thus a stream of instances (windows or conversations), and the position of a
sample in its corpus's stream is

    consumed before the stage + (block - first block of the stage) * quota + ordinal in the block

The position's epoch is position // instances, and in each epoch the corpus is read in the order of
a keyed permutation. The key follows the data's fingerprint, so neither the corpus's path nor its
place in the list matters.

With blocks of 10 samples and weights 0.7 and 0.3, every block contains 7 samples of corpus 0 and 3
of corpus 1. Say that the keyed order of block 4 is

    corpus         0 0 1 0 0 0 1 0 1 0
    ordinal        0 1 0 2 3 4 1 5 2 6

Its seventh sample, index 46, is of corpus 1, at position 0 + (4 - 0) * 3 + 1 = 13 of that stream.
If the corpus contains 5 instances, this is number 13 % 5 = 3 of epoch 13 // 5 = 2, and the
permutation of epoch 2 says which instance it is.

Stages end where weights change and where a corpus reaches its cap, always at a block boundary. A
change takes effect with the first block that starts at or after it. In a block for which a capped
corpus has too few instances left it gives those, and the others share the rest by weight.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llada.arithmetic import ceil_div
from llada.arrays import I64
from llada.config import SHUFFLE_BLOCK
from llada.errors import UserError
from llada.noise import derive_key, permute, stream


@dataclass(frozen=True)
class MixtureSource:
    """A corpus as the mixture sees it.

    Attributes:
        name: for messages.
        fingerprint: fingerprint of the data, which keys its order.
        num_instances: windows or conversations that it contains.
        weight: share at the start, relative to the other weights; 0: not read.
        max_instances: instances after which it leaves, over all epochs; None: no cap.
        changes: (samples of the run, weight from then on), ascending.
    """

    name: str
    fingerprint: str
    num_instances: int
    weight: float
    max_instances: int | None = None
    changes: tuple[tuple[int, float], ...] = ()

    def weight_in(self, block: int, size: int = SHUFFLE_BLOCK) -> float:
        """Return the weight in a block of `size` samples."""
        weight = self.weight
        for samples, changed in self.changes:
            if samples <= block * size:
                weight = changed
        return weight

    @property
    def first_weight(self) -> float:
        """First weight that is not 0: the corpus's weight in averages over corpora, even before it
        is first read.
        """
        changed = (weight for _, weight in self.changes)
        # The config refuses a corpus that is never read.
        return next(weight for weight in (self.weight, *changed) if weight)


@dataclass(frozen=True)
class MixtureStage:
    """Blocks with equal quotas.

    Attributes:
        first_block: block at which the stage starts.
        quotas: samples per block of each corpus, int64 [corpora]; they add up to the block, except
            in the last one of a mixture that ends.
        consumed: instances of each corpus consumed before the stage, int64 [corpora].
    """

    first_block: int
    quotas: I64
    consumed: I64


@dataclass(frozen=True)
class _Block:
    """The samples of one block.

    Attributes:
        stage: the stage that contains the block.
        corpora: corpus of each sample, int64 [samples].
        ordinals: ordinal of each sample among those of its corpus in the block, int64 [samples].
    """

    stage: MixtureStage
    corpora: I64
    ordinals: I64


def quotas_of(weights: Sequence[float], block: int = SHUFFLE_BLOCK) -> I64:
    """Share `block` samples by weight with the largest-remainder method.

    Weights of 1, 1 and 1 share 10 samples as 3.33 each: all get 3, and the one that is left goes to
    the largest remainder; of equal remainders, to the earlier corpus: 4, 3, 3.
    """
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * block
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    rest = block - quotas.sum()
    quotas[by_remainder[:rest]] += 1
    return quotas


class Mixture:
    """Maps a global sample index to a corpus and an instance.

    Args:
        sources: the corpora in order.
        seed: key of the order.
        block: samples per block.

    Attributes:
        stages: in order.
        num_samples: samples until no corpus with a weight has instances left; None: endless.

    Raises:
        UserError: a corpus without an instance, with a weight too small for one sample per block,
            or the same data twice.
    """

    def __init__(
        self, sources: Sequence[MixtureSource], seed: int, block: int = SHUFFLE_BLOCK
    ) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self.block = block
        self._check_sources()
        self.stages, self.num_samples = self._cut_stages()
        # The samples of a step lie in one block or in few.
        self._block_of = lru_cache(maxsize=8)(self._make_block)

    def _check_sources(self) -> None:
        for i, source in enumerate(self.sources):
            if source.num_instances < 1:
                raise UserError(
                    f"data.mixture.{i}.path: {source.name} contains no full window or conversation;"
                    " use a smaller data.sequence_length or more text"
                )
            if source.max_instances is not None and source.max_instances < 1:
                raise UserError(
                    f"data.mixture.{i}.max_epochs: allows less than one of the"
                    f" {source.num_instances} windows or conversations of {source.name}; raise it"
                    " or drop the entry"
                )
            # Their orders would have the same keys.
            for other in self.sources[:i]:
                if other.fingerprint == source.fingerprint:
                    raise UserError(
                        f"data.mixture.{i}.path: {source.name} contains the same data as"
                        f" {other.name}; give one entry and a larger weight"
                    )

    # -- stages ------------------------------------------------------------------------------------

    @property
    def changes(self) -> list[int]:
        """First blocks with other weights than the block before, ascending."""
        blocks: set[int] = set()
        for source in self.sources:
            # The first block that starts at or after the change.
            blocks.update(ceil_div(samples, self.block) for samples, _ in source.changes)
        return [
            block for block in sorted(blocks) if self._weights(block) != self._weights(block - 1)
        ]

    def _weights(self, block: int) -> list[float]:
        return [source.weight_in(block, self.block) for source in self.sources]

    def _cut_stages(self) -> tuple[list[MixtureStage], int | None]:
        """Cut stages where weights change and where a capped corpus has too few instances left for
        another block.

        With blocks of 10,000, weights 0.5, 0.3 and 0.2, and a cap of 12,000 on corpus 0:

            blocks  quotas            why
            0, 1    5000 3000 2000    corpus 0 has 12,000 instances left, enough for two blocks
            2       2000 4800 3200    it gives its last 2,000; 8,000 are shared as 0.3 : 0.2
            3, ...     0 6000 4000    it has left

        Returns:
            The stages, and the number of samples until no corpus with a weight has instances left;
            None: never.
        """
        stages: list[MixtureStage] = []
        block = 0
        consumed = np.zeros(len(self.sources), dtype=np.int64)
        changes = self.changes
        while True:
            weights = self._weights(block)
            active = []
            left: dict[int, int] = {}  # instances of the capped corpora that are active
            for i, source in enumerate(self.sources):
                cap = source.max_instances
                if not weights[i] or (cap is not None and cap <= consumed[i]):
                    continue
                active.append(i)
                if cap is not None:
                    left[i] = cap - int(consumed[i])
            if not active:
                return stages, int(consumed.sum())

            quotas = self._quotas(active, weights, self.block)
            self._check_quotas(quotas, active, weights)
            # The stage lasts until a corpus cannot fill its quota or the next change, if any.
            lengths = [count // int(quotas[i]) for i, count in left.items()]
            lengths += [change - block for change in changes if change > block]
            if not lengths:
                stages.append(MixtureStage(block, quotas, consumed))
                return stages, None
            length = min(lengths)
            if not length:
                # A corpus reaches its cap within this block, which is a stage of its own.
                quotas = self._last_quotas(active, weights, left)
                length = 1
            stages.append(MixtureStage(block, quotas, consumed))
            block += length
            # A new array: the stage keeps the old one.
            consumed = consumed + length * quotas
            # The mixture ends with a block that is not full: what a later change would bring
            # cannot follow half a block.
            if quotas.sum() < self.block:
                return stages, int(consumed.sum())

    def _quotas(self, active: list[int], weights: list[float], size: int) -> I64:
        """Share `size` samples among the active corpora by weight, int64 [corpora]."""
        quotas = np.zeros(len(self.sources), dtype=np.int64)
        quotas[active] = quotas_of([weights[i] for i in active], size)
        return quotas

    def _check_quotas(self, quotas: I64, active: list[int], weights: list[float]) -> None:
        for i in active:
            if quotas[i] == 0:
                source = self.sources[i]
                setting = "weight" if weights[i] == source.weight else "weight_at"
                raise UserError(
                    f"data.mixture.{i}.{setting}: {weights[i]} gives {source.name} no sample "
                    f"in a block of {self.block}; raise it or drop the entry"
                )

    def _last_quotas(self, active: list[int], weights: list[float], left: dict[int, int]) -> I64:
        """Return the quotas of a block in which a corpus reaches its cap.

        No corpus gives more than it has left, and the others share the rest. That can exhaust
        another one: of a block of 10 and equal weights, with 1, 4 and many instances left, the
        first gives 1, so the others would give 5 and 4; the second has only 4, so the third gives
        5.
        """
        exhausted: dict[int, int] = {}
        quotas = np.zeros(len(self.sources), dtype=np.int64)
        while True:
            others = [i for i in active if i not in exhausted]
            if not others:
                # All corpora end in this block, the last of the mixture.
                quotas[:] = 0
                break
            quotas = self._quotas(others, weights, self.block - sum(exhausted.values()))
            newly = {i: left[i] for i in others if i in left and quotas[i] >= left[i]}
            if not newly:
                break
            exhausted |= newly
        quotas[list(exhausted)] = list(exhausted.values())
        return quotas

    def stage_of(self, block: int) -> MixtureStage:
        """Return the stage in which a block lies."""
        after = bisect.bisect_right(self.stages, block, key=lambda stage: stage.first_block)
        return self.stages[after - 1]

    def consumed(self, samples: int) -> I64:
        """Return the instances of each corpus that the first `samples` samples read, int64
        [corpora].
        """
        number, rest = divmod(samples, self.block)
        block = self._block_of(number)
        stage = block.stage
        in_stage = (number - stage.first_block) * stage.quotas
        in_block = np.bincount(block.corpora[:rest], minlength=len(self.sources))
        return stage.consumed + in_stage + in_block

    def exhausted_after(self, corpus: int) -> int | None:
        """Return the samples after which a corpus has reached its cap, rounded up to a whole block.

        None: it has no cap, or does not reach it.
        """
        cap = self.sources[corpus].max_instances
        if cap is None:
            return None
        for stage in self.stages:
            if stage.consumed[corpus] >= cap:
                return stage.first_block * self.block
        return self.num_samples

    # -- samples -----------------------------------------------------------------------------------

    def _make_block(self, number: int) -> _Block:
        """Deal the quotas of a block in keyed order."""
        stage = self.stage_of(number)
        # Quotas of 3 and 2 give 0 0 0 1 1, and in keyed order say 1 0 0 1 0.
        corpora = np.repeat(np.arange(len(self.sources)), stage.quotas)
        keys = stream(self.seed, "mixture/block", number).random_raw(len(corpora))
        corpora = corpora[np.argsort(keys, kind="stable")]
        # Sorted by corpus again, stably, the ordinals are 0 1 2 and 0 1; back in keyed order they
        # are 0 0 1 1 2.
        firsts = np.cumsum(stage.quotas) - stage.quotas
        ordinals_by_corpus = np.arange(len(corpora)) - np.repeat(firsts, stage.quotas)
        ordinals = np.empty(len(corpora), dtype=np.int64)
        ordinals[np.argsort(corpora, kind="stable")] = ordinals_by_corpus
        return _Block(stage, corpora, ordinals)

    def stream_positions(self, samples: I64) -> tuple[I64, I64]:
        """Return where samples lie in the streams of their corpora.

        Args:
            samples: global sample indices [n].

        Returns:
            The corpus of each sample and its position in that corpus's endless stream of instances,
            both int64 [n].

        Raises:
            IndexError: a sample past the last of a mixture that ends.
        """
        if self.num_samples is not None and len(samples) and samples.max() >= self.num_samples:
            raise IndexError(
                f"sample {samples.max()} is past the mixture's last, {self.num_samples - 1}"
            )
        blocks, offsets = np.divmod(samples, self.block)
        corpora = np.empty(len(samples), dtype=np.int64)
        positions = np.empty(len(samples), dtype=np.int64)
        for block in np.unique(blocks).tolist():
            own = blocks == block
            dealt = self._block_of(block)
            stage = dealt.stage
            chosen = dealt.corpora[offsets[own]]
            ordinals = dealt.ordinals[offsets[own]]
            corpora[own] = chosen
            positions[own] = (
                stage.consumed[chosen]
                + (block - stage.first_block) * stage.quotas[chosen]
                + ordinals
            )
        return corpora, positions

    def lookup(self, samples: I64) -> tuple[I64, I64]:
        """Return the corpus and the instance in it of samples.

        Args:
            samples: global sample indices [n].

        Returns:
            The corpus of each sample and the number of its instance, both int64 [n].
        """
        corpora, positions = self.stream_positions(samples)
        instances = np.empty(len(samples), dtype=np.int64)
        for corpus in np.unique(corpora).tolist():
            source = self.sources[corpus]
            of_corpus = np.flatnonzero(corpora == corpus)
            # Position 13 of 5 instances is number 3 of epoch 2. The order of that epoch is a
            # permutation of 0..4, evaluated at 3: no two of its five positions give one instance,
            # and another epoch, with another key, has another order.
            epochs, numbers = np.divmod(positions[of_corpus], source.num_instances)
            for epoch in np.unique(epochs).tolist():
                own = epochs == epoch
                key = derive_key(self.seed, "mixture/order", source.fingerprint, epoch)
                instances[of_corpus[own]] = permute(numbers[own], source.num_instances, key)
        return corpora, instances

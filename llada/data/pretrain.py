"""Pretraining data: the plan of a step (segments and t, from the index alone) and its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llada.config import CorpusEntry, RunConfig
from llada.data.corpus import Corpus, problems
from llada.data.mixture import Mixture, Source
from llada.data.shards import Shard
from llada.errors import UserError
from llada.noise import random_lengths, timesteps
from llada.objectives import Batch, MaskedDiffusion, Objective, Window, collate

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
TRAIN, VALIDATION = "train", "validation"


class WindowReader:
    """The windows of one split of a corpus: each shard tiled by `length` tokens, its incomplete last window left out.

    Attributes:
        windows: how many there are.
        dropped: tokens in the incomplete last windows.
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.corpus, self.length = corpus, length
        self.shards: list[Shard] = corpus.shards(split)
        counts = np.array([shard.num_tokens // length for shard in self.shards], dtype=np.int64)
        self.firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.windows = int(self.firsts[-1])
        self.dropped = sum(shard.num_tokens for shard in self.shards) - self.windows * length

    def _place(self, window: int) -> tuple[Shard, int]:
        i = int(np.searchsorted(self.firsts, window, side="right")) - 1
        return self.shards[i], (window - int(self.firsts[i])) * self.length

    def tokens(self, window: int) -> I64:
        """Token ids [length]. Raises UserError when they cannot be this corpus's: [MASK] or an id past the vocabulary."""
        shard, start = self._place(window)
        tokens = shard.tokens(start, start + self.length)
        manifest = self.corpus.manifest
        for wrong, what in ((tokens == manifest.mask_id, "the mask token"), (tokens >= manifest.vocab_size, "an id past the vocabulary")):
            if wrong.any():
                where = start + int(np.argmax(wrong))
                raise UserError(
                    f"{self.corpus.folder}: token {where} of the shard around window {window} is {what}, "
                    "the shard is damaged; run `llada data verify`"
                )
        return tokens

    def document_starts(self, window: int) -> I64:
        """Positions 1..length-1 in the window at which a document starts."""
        shard, start = self._place(window)
        return shard.document_starts(start, start + self.length) - start


@dataclass(frozen=True)
class Plan:
    """Segments of one global step (or one validation), known from the index before any token is read.

    Attributes:
        samples: global sample indices [n].
        sources: corpus of each sample [n].
        windows: window of each sample in its corpus [n].
        bounds: segment boundaries of each sample's window.
        firsts: id of each sample's first segment [n + 1]; segments are numbered through the step.
        lengths: tokens of every segment [segments].
        t: diffusion time of every segment [segments].
        normaliser: divides the step's summed loss: its tokens.
    """

    samples: I64
    sources: I64
    windows: I64
    bounds: list[I64]
    firsts: I64
    lengths: I64
    t: F64
    normaliser: float


class PretrainData:
    """Corpora, mixture and validation split of a run.

    Args:
        config: the run.
        verify: check every byte and token of corpora up to `data.verify_bytes` (one rank does).

    Raises:
        UserError: a folder that is not a sound corpus, corpora of different tokenizers, a model vocabulary that is too small.
    """

    def __init__(self, config: RunConfig, verify: bool = False) -> None:
        self.config = config
        self.corpora = [_open(i, entry) for i, entry in enumerate(config.data.mixture)]
        self._check_vocabulary()
        if verify:
            for corpus in self.corpora:
                small = sum(s.bin_bytes + s.idx_bytes for s in corpus.manifest.shards) <= config.data.verify_bytes
                found = problems(corpus.folder) if small else []
                if found:
                    raise UserError(f"data.mixture: {found[0]}; see all with `llada data verify {corpus.folder}`")
        length = config.data.sequence_length
        self.readers = {split: [WindowReader(corpus, split, length) for corpus in self.corpora] for split in (TRAIN, VALIDATION)}
        self.mixture = Mixture([self._source(i) for i in range(len(self.corpora))], config.seed)
        needed = config.train.steps * config.batch.global_
        if self.mixture.num_samples is not None and self.mixture.num_samples < needed:
            raise UserError(
                f"train.steps: {config.train.steps} steps need {needed} samples, "
                f"the capped mixture holds {self.mixture.num_samples}; raise data.mixture.*.max_epochs"
            )
        manifest = self.corpora[0].manifest
        self.mask_id, self.eos_id = manifest.mask_id, manifest.eos_id
        self.objective: Objective = MaskedDiffusion(config.seed, self.mask_id, config.objective.masking, config.objective.eps)

    def _check_vocabulary(self) -> None:
        first, rows = self.corpora[0], self.config.model.vocab_size
        for i, corpus in enumerate(self.corpora):
            manifest = corpus.manifest
            if manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
                raise UserError(
                    f"data.mixture.{i}.path: {corpus.folder} was prepared with another tokenizer than {first.folder}; prepare both with one"
                )
            highest = max((shard.max_token_id for shard in manifest.shards), default=0)
            if max(highest + 1, manifest.vocab_size) > rows:
                raise UserError(
                    f"model.vocab_size: {rows} is too small for {corpus.folder}, whose tokenizer has {manifest.vocab_size} ids "
                    f"(largest in the data: {highest}); use {manifest.rows}"
                )

    def _source(self, i: int) -> Source:
        entry, windows = self.config.data.mixture[i], self.readers[TRAIN][i].windows
        cap = None if entry.max_epochs is None else int(entry.max_epochs * windows)
        return Source(entry.path, self.corpora[i].manifest.fingerprint(TRAIN), windows, entry.weight, cap)

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is read, in order: compared at resume."""
        return "+".join(f"{s.fingerprint[:16]}x{s.weight:g}" + (f"<{s.max_windows}" if s.max_windows else "") for s in self.mixture.sources)

    @property
    def tokenizer_folder(self) -> Path:
        return self.corpora[0].tokenizer_folder

    # -- training ------------------------------------------------------------------------------------------------------

    def plan(self, step: int) -> Plan:
        """The plan of training step `step` (0-based)."""
        config = self.config
        samples = step * config.batch.global_ + np.arange(config.batch.global_, dtype=np.int64)
        places = [self.mixture.locate(int(sample)) for sample in samples]
        cuts = random_lengths(config.seed, samples, config.data.sequence_length, config.data.random_length_probability)
        bounds = [self.bounds(TRAIN, *place, int(cut)) for place, cut in zip(places, cuts, strict=True)]
        return self.assemble(samples, places, bounds, lambda shares: timesteps(config.seed, step, shares, config.objective.timesteps))

    def batch(self, plan: Plan, offsets: Sequence[int]) -> Batch:
        """The micro-batch of the samples at `offsets` of a training plan."""
        windows = [self.window(TRAIN, plan, i) for i in offsets]
        return collate(windows, [self.objective.corrupt(window) for window in windows], plan.normaliser)

    # -- plans of any split --------------------------------------------------------------------------------------------

    def bounds(self, split: str, source: int, window: int, cut: int) -> I64:
        """Segment boundaries of a window: its ends, the random length and, with data.document_mask, the document starts."""
        inner = [np.array([0, cut, self.config.data.sequence_length], dtype=np.int64)]
        if self.config.data.document_mask:
            inner.append(self.readers[split][source].document_starts(window))
        return np.unique(np.concatenate(inner))

    @staticmethod
    def assemble(samples: I64, places: list[tuple[int, int]], bounds: list[I64], draw_t: Callable[[I64], F64]) -> Plan:
        """A plan from (source, window) and boundaries of every sample; `draw_t` maps all segment lengths to their t."""
        lengths = np.concatenate([np.diff(b) for b in bounds])
        firsts = np.concatenate([[0], np.cumsum([len(b) - 1 for b in bounds])]).astype(np.int64)
        sources, windows = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
        return Plan(samples, sources, windows, bounds, firsts, lengths, draw_t(lengths), float(lengths.sum()))

    def window(self, split: str, plan: Plan, i: int) -> Window:
        """The clean tokens and segments of sample `i` of a plan."""
        first, last = plan.firsts[i], plan.firsts[i + 1]
        tokens = self.readers[split][plan.sources[i]].tokens(int(plan.windows[i]))
        return Window(int(plan.samples[i]), tokens, plan.bounds[i], plan.t[first:last], int(first))


def _open(i: int, entry: CorpusEntry) -> Corpus:
    try:
        return Corpus.open(entry.path)
    except UserError as error:
        raise UserError(f"data.mixture.{i}.path: {error}") from None

"""What every task reads: corpora, mixture and validation split of a run, and the plan of a step."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from llada.config import RunConfig
from llada.data.corpus import CONVERSATIONS, TEXT, Corpus, Manifest, verify_corpus
from llada.data.mixture import Mixture, MixtureSource
from llada.data.shards import OpenFiles
from llada.errors import UserError
from llada.files import read_files
from llada.objectives import Batch, MaskedDiffusion, Objective, Window, collate
from llada.tokenizer import Tokenizer

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
TRAIN, VALIDATION = "train", "validation"
DrawT = Callable[[I64, I64], F64]
"""(row of each segment in the plan, a number that segments of the same text share) -> t of each."""
_MADE_BY = {TEXT: "llada data prepare", CONVERSATIONS: "llada data prepare-sft"}
_TRAINED_BY = {TEXT: "llada pretrain", CONVERSATIONS: "llada sft"}


class Reader(Protocol):
    """The items (windows, conversations) of one split of a corpus that a run can read.

    Attributes:
        corpus: whose split it is.
        count: how many items there are.
    """

    corpus: Corpus
    count: int

    def tokens_per_byte(self) -> float:
        """Predicted tokens (EOS counted) per byte of the text that they stand for."""
        ...

    def summary(self) -> str:
        """What is read and what is left out, for the console."""
        ...


@dataclass(frozen=True)
class StepPlan:
    """Segments of one global step (or one validation), known from the index before any token is
    read.

    Attributes:
        samples: global sample indices [n].
        sources: corpus of each sample [n].
        items: what it is in its corpus: its window, or its reply [n].
        bounds: segment boundaries of each sample's row.
        firsts: id of each sample's first segment [n + 1]; segments are numbered through the step.
        spans: first and past-the-last position of every segment that may be masked [segments, 2];
            empty for filler.
        scales: factor on the weights of every segment [segments].
        t: diffusion time of every segment [segments].
        normaliser: divides the step's summed loss: its tokens in pretraining, its conversations in
            fine-tuning.
    """

    samples: I64
    sources: I64
    items: I64
    bounds: list[I64]
    firsts: I64
    spans: I64
    scales: F64
    t: F64
    normaliser: float

    @property
    def maskable(self) -> I64:
        """Tokens of every segment that may be masked [segments]; 0 for filler."""
        return self.spans[:, 1] - self.spans[:, 0]

    @property
    def lengths(self) -> I64:
        """Tokens of every segment [segments]."""
        return np.concatenate([np.diff(b) for b in self.bounds])

    @property
    def counted(self) -> I64:
        """Tokens of every segment that is not filler."""
        return self.lengths[self.maskable > 0]

    @property
    def tokens(self) -> int:
        """Tokens of the step without filler."""
        return int(self.counted.sum())


class TrainingData(ABC):
    """Corpora, mixture and validation split of a run.

    Args:
        config: the run.
        verify: compare the size of every file and the tokenizers with the manifests, and check
            every byte and token of corpora up to `data.verify_bytes` (one rank does; the others
            meet a damaged file when they read it).

    Raises:
        UserError: a folder that is not a sound corpus of the task's kind, corpora of different
            tokenizers, a model vocabulary that is too small, fewer samples than the run needs.
    """

    kind: ClassVar[str]
    """Of the corpora it reads."""

    unit: str
    """What the error of a validation counts, in the plural: windows, documents or conversations."""

    def __init__(self, config: RunConfig, verify: bool = False) -> None:
        self.config = config
        self._open_files = OpenFiles()
        self._check_sizes = verify
        self.corpora = [self._open(i) for i in range(len(config.data.mixture))]
        self.names = short_names([entry.path for entry in config.data.mixture])
        self._check_vocabulary()
        if verify:
            self._verify()
        self.readers: dict[str, Sequence[Reader]] = {
            split: [self.reader(i, split) for i in range(len(self.corpora))]
            for split in (TRAIN, VALIDATION)
        }
        self.mixture = Mixture([self._source(i) for i in range(len(self.corpora))], config.seed)
        needed = config.train.steps * config.batch.global_
        if self.mixture.num_samples is not None and self.mixture.num_samples < needed:
            raise UserError(
                f"train.steps: {config.train.steps} steps need {needed} samples, the capped mixture"
                f" holds {self.mixture.num_samples}; raise data.mixture.*.max_epochs"
            )
        self.objective = self.make_objective(config.seed)

    # -- what a task decides -----------------------------------------------------------------------

    @abstractmethod
    def reader(self, source: int, split: str) -> Reader:
        """The items of one split of a corpus."""

    @abstractmethod
    def plan(self, step: int) -> StepPlan:
        """The plan of training step `step` (0-based)."""

    @abstractmethod
    def validation_plan(
        self, draws: I64, source: int, items: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        """The plan of a validation.

        Args:
            draws: sample indices, the keys of the masks [n].
            source: corpus.
            items: of its validation split, one a draw [n].
            sweeps: which sweep over t of its item a draw belongs to [n]; a conversation gives
                another reply in the next one.
            draw_t: gives every segment its t.
        """

    @abstractmethod
    def owners(self, plan: StepPlan) -> I64:
        """Of every segment of a validation plan, the number of its window, document or conversation
        in the split [segments].
        """

    @abstractmethod
    def tokens(self, split: str, source: int, item: int) -> I64:
        """Clean tokens of one item as a row [sequence_length]; a reply without its padding is
        followed by EOS.
        """

    @abstractmethod
    def describe(self, source: int, item: int) -> str:
        """What a training item is, in a few words."""

    # -- what all share ----------------------------------------------------------------------------

    def batch(self, plan: StepPlan, offsets: Sequence[int]) -> Batch:
        """The micro-batch of the samples at `offsets` of a training plan."""
        windows = [self.window(TRAIN, plan, i) for i in offsets]
        return collate(
            windows, [self.objective.corrupt(window) for window in windows], plan.normaliser
        )

    def window(self, split: str, plan: StepPlan, i: int) -> Window:
        """The clean tokens and segments of sample `i` of a plan."""
        own = slice(plan.firsts[i], plan.firsts[i + 1])
        tokens = self.tokens(split, int(plan.sources[i]), int(plan.items[i]))
        return Window(
            int(plan.samples[i]),
            tokens,
            plan.bounds[i],
            plan.t[own],
            int(plan.firsts[i]),
            plan.spans[own],
            plan.scales[own],
        )

    def make_objective(self, seed: int) -> Objective:
        """The run's objective with its noise keyed by `seed`."""
        objective = self.config.objective
        return MaskedDiffusion(seed, self.manifest.mask_id, objective.masking, objective.eps)

    @property
    def manifest(self) -> Manifest:
        """Of the first corpus; all have the same tokenizer."""
        return self.corpora[0].manifest

    @property
    def tokenizer_folder(self) -> Path:
        return self.corpora[0].tokenizer_folder

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all corpora. Raises UserError where a corpus holds another one than its
        manifest names.
        """
        found: Tokenizer | None = None
        files: dict[str, bytes] = {}
        for i, corpus in enumerate(self.corpora):
            try:
                # The manifests name one tokenizer. To read a large one takes a second, equal files
                # of the next corpus none.
                if (
                    found is None
                    or not corpus.tokenizer_folder.is_dir()
                    or read_files(corpus.tokenizer_folder) != files
                ):
                    found = corpus.tokenizer()
                    files = read_files(corpus.tokenizer_folder)
            except UserError as error:
                raise UserError(f"data.mixture.{i}.path: {error}") from None
        assert found is not None
        return found

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is read, in order: compared at resume."""
        return "+".join(
            f"{s.fingerprint[:16]}x{s.weight!r}"
            + (f"<{s.max_windows}" if s.max_windows is not None else "")
            + "".join(f"@{samples}x{weight!r}" for samples, weight in s.changes)
            for s in self.mixture.sources
        )

    def weight_changes(self) -> list[str]:
        """A line for every change of the weights that the mixture reaches, for the console."""
        lines, mixture, config = [], self.mixture, self.config
        for first in (block * mixture.block for block in mixture.changes):
            if mixture.num_samples is None or first < mixture.num_samples:
                quotas = mixture.stage_of(first // mixture.block).quotas
                shares = ", ".join(
                    f"{100 * n / quotas.sum():.4g} % {s.name}"
                    for n, s in zip(quotas, mixture.sources, strict=True)
                )
                step, tokens = (
                    first // config.batch.global_ + 1,
                    first * config.data.sequence_length,
                )
                lines.append(f"weights change in step {step:,}, after {tokens:,} tokens: {shares}")
        return lines

    def use(self) -> list[str]:
        """A line for every corpus: its share of the run, how often it is read, and where its cap
        ends that; for the console.
        """
        config, samples = self.config, self.config.train.steps * self.config.batch.global_
        lines = []
        for i, (source, count) in enumerate(
            zip(self.mixture.sources, self.mixture.consumed(samples).tolist(), strict=True)
        ):
            line = (
                f"{source.name}: {100 * count / samples:.4g} % of the run's samples,"
                f" {count / source.windows:.3g} passes"
            )
            end = self.mixture.exhausted_after(i)
            if end is not None and end <= samples:
                step = -(-end // config.batch.global_)
                tokens = (
                    f", after {end * config.data.sequence_length:,} tokens"
                    if config.task == "pretrain"
                    else ""
                )
                line += (
                    f"; its cap (max_epochs {config.data.mixture[i].max_epochs:g}) ends it by step"
                    f" {step:,}{tokens}"
                )
            lines.append(line)
        return lines

    def _open(self, i: int) -> Corpus:
        path = self.config.data.mixture[i].path
        try:
            corpus = Corpus.open(path, self._check_sizes, self._open_files)
        except UserError as error:
            raise UserError(f"data.mixture.{i}.path: {error}") from None
        if corpus.manifest.kind != self.kind:
            raise UserError(
                f"data.mixture.{i}.path: {path} was made by `{_MADE_BY[corpus.manifest.kind]}` and"
                f" can be trained on by `{_TRAINED_BY[corpus.manifest.kind]}` only;"
                f" `{_TRAINED_BY[self.kind]}` reads folders of `{_MADE_BY[self.kind]}`"
            )
        return corpus

    def _check_vocabulary(self) -> None:
        first, rows = self.corpora[0], self.config.model.vocab_size
        for i, corpus in enumerate(self.corpora):
            manifest = corpus.manifest
            if manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
                raise UserError(
                    f"data.mixture.{i}.path: {corpus.folder} was prepared with another tokenizer"
                    f" than {first.folder}; prepare both with one"
                )
            highest = max((shard.max_token_id for shard in manifest.shards), default=0)
            if max(highest + 1, manifest.vocab_size) > rows:
                raise UserError(
                    f"model.vocab_size: {rows} is too small for {corpus.folder}, whose tokenizer"
                    f" has {manifest.vocab_size} ids (largest in the data: {highest}); use"
                    f" {manifest.rows}"
                )

    def _verify(self) -> None:
        self.tokenizer()  # raises
        for corpus in self.corpora:
            small = (
                sum(s.bin_bytes + s.idx_bytes for s in corpus.manifest.shards)
                <= self.config.data.verify_bytes
            )
            found = verify_corpus(corpus.folder) if small else []
            if found:
                raise UserError(
                    f"data.mixture: {found[0]}; see all with `llada data verify {corpus.folder}`"
                )

    def _source(self, i: int) -> MixtureSource:
        entry, count = self.config.data.mixture[i], self.readers[TRAIN][i].count
        cap = None if entry.max_epochs is None else int(entry.max_epochs * count)
        changes = tuple(
            (-(-change.tokens // self.config.data.sequence_length), change.weight)
            for change in entry.weight_at
        )
        return MixtureSource(
            entry.path,
            self.corpora[i].manifest.fingerprint(TRAIN),
            count,
            entry.weight,
            cap,
            changes,
        )


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of corpora in metrics: the last folders of their paths, as many as tell them apart;
    numbered if one is listed again.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
        others = {
            name: {own for own, other in zip(parts, names, strict=True) if other == name}
            for name in names
        }
        if all(len(same) == 1 for same in others.values()):
            break
        depths = [
            depth + (len(others[name]) > 1) for depth, name in zip(depths, names, strict=True)
        ]
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [
        f"{name}.{before + 1}" if before else name for name, before in zip(names, seen, strict=True)
    ]


def check_tokens(corpus: Corpus, tokens: I64, where: str) -> I64:
    """The tokens, if they can be this corpus's. Raises UserError for [MASK] or an id that the
    vocabulary lacks.
    """
    manifest = corpus.manifest
    past = tokens.view(np.uint64) >= manifest.vocab_size  # so a negative id is past it too
    for wrong, what in (
        (tokens == manifest.mask_id, "the mask token"),
        (past, "an id past the vocabulary"),
    ):
        if wrong.any():
            raise UserError(
                f"{corpus.folder}: token {int(np.argmax(wrong))} of {where} is {what}, the shard is"
                " damaged; run `llada data verify`"
            )
    return tokens

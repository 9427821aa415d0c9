"""What every task reads: the corpora, mixture and validation split of a run, and its step plans."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from llada.arithmetic import ceil_div
from llada.arrays import I64
from llada.config import RunConfig
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, SPLITS, TEXT, TRAIN, Manifest
from llada.data.mixture import Mixture, MixtureSource
from llada.data.open_files import OpenFiles
from llada.data.step_plan import DrawT, StepPlan
from llada.data.verify import verify_corpus
from llada.errors import UserError
from llada.files import read_files
from llada.objectives import Batch, Key, Objective, Row, collate
from llada.objectives.registry import SpecialIds, make_objective, start_id
from llada.tokenizer import Tokenizer

_MADE_BY = {TEXT: "llada data prepare", CONVERSATIONS: "llada data prepare-sft"}
_TRAINED_BY = {TEXT: "llada pretrain", CONVERSATIONS: "llada sft"}


class Reader(Protocol):
    """Reads the instances (windows, conversations) of one split of a corpus.

    Attributes:
        corpus: the corpus.
        num_instances: how many there are.
    """

    corpus: Corpus
    num_instances: int

    def tokens_per_byte(self) -> float:
        """Return the predicted tokens (EOS counted) per byte of the text that they stand for."""
        ...

    def summary(self) -> str:
        """Return what is read and what is left out, for the console."""
        ...

    def too_long(self) -> Iterable[dict[str, int]]:
        """Return the documents that do not fit a row: their number, and their sizes in tokens."""
        ...


class TrainingData(ABC):
    """Corpora, mixture and validation split of a run.

    A corpus is named by its index in data.mixture, an instance (a window of text, a conversation)
    by its number in the split.

    Args:
        config: the run.
        verify: compare the size of every file and the tokenizers with the manifests, and check
            every byte and token of corpora up to `data.verify_bytes`. Rank 0 verifies; the other
            ranks fail when they read a damaged file.

    Attributes:
        corpora, names: the corpora and their names in metrics, in the order of data.mixture.
        readers: by split, one per corpus. Each task declares the type of its readers.
        mixture: which instance of which corpus a sample is.
        objective: the run's.
        key: of the noise of training.

    Raises:
        UserError: a folder that is not a sound corpus of the task's kind, corpora of different
            tokenizers, a model vocabulary that is too small, fewer samples than the run needs.
    """

    kind: ClassVar[str]
    """Kind of the corpora that the task reads."""

    readers: Mapping[str, Sequence[Reader]]

    def __init__(self, config: RunConfig, verify: bool = False) -> None:
        self.config = config
        # One for all corpora: the system limits the open files of the process.
        self._open_files = OpenFiles()
        self._check_sizes = verify
        indices = range(len(config.data.mixture))
        self.corpora = [self._open_corpus(i) for i in indices]
        self.names = short_names([entry.path for entry in config.data.mixture])
        # Before the full check, which reads every token and can take minutes.
        self._check_vocabulary()
        if verify:
            self._verify()
        self.readers = {split: [self.open_reader(i, split) for i in indices] for split in SPLITS}
        self.mixture = Mixture([self._mixture_source(i) for i in indices], config.seed)
        self._check_enough_samples()
        self.objective: Objective = make_objective(config.objective, self._special_ids())
        self.key = Key(config.seed)

    # -- what a task decides -----------------------------------------------------------------------

    @abstractmethod
    def normalizer(self, plan: StepPlan) -> float:
        """Return what divides the summed loss of a training step."""

    @property
    @abstractmethod
    def item_name(self) -> str:
        """What validation counts as an item, in the plural: windows, documents or conversations."""

    @abstractmethod
    def open_reader(self, corpus: int, split: str) -> Reader:
        """Return a reader of one split of a corpus."""

    @abstractmethod
    def plan(self, step: int) -> StepPlan:
        """Return the plan of training step `step` (0-based)."""

    @abstractmethod
    def validation_plan(
        self, draws: I64, corpus: int, instances: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        """Return the plan of a validation.

        Args:
            draws: sample indices, the keys of the masks [n].
            corpus: index of the corpus.
            instances: instances of its validation split, one per draw [n].
            sweeps: which sweep over t of its instance a draw belongs to [n]; each sweep over a
                conversation reads another of its replies.
            draw_t: gives every noise group its t.
        """

    @abstractmethod
    def owners(self, plan: StepPlan) -> I64:
        """Return the number in the split of the window, document or conversation that every noise
        group of a validation plan belongs to [g].
        """

    @abstractmethod
    def tokens(self, split: str, corpus: int, example: int) -> I64:
        """Read the clean tokens of one example as a row [sequence_length].

        A reply, without its padding, is followed by EOS up to the end of the row.
        """

    @abstractmethod
    def describe_example(self, corpus: int, example: int) -> str:
        """Return what a training example is, in a few words."""

    # -- what all tasks share ----------------------------------------------------------------------

    def batch(self, plan: StepPlan, offsets: Sequence[int]) -> Batch:
        """Make the micro-batch of the samples at `offsets` of a training plan."""
        # Masks are keyed by the sample's index, so it does not matter which rank, or which
        # micro-batch, a sample is in.
        rows = [self.row(TRAIN, plan, i) for i in offsets]
        corrupted = [self.objective.corrupt(row, self.key) for row in rows]
        return collate(corrupted, self.normalizer(plan))

    def row(self, split: str, plan: StepPlan, i: int) -> Row:
        """Read the clean tokens of sample `i` of a plan, with its segments and noise groups."""
        return Row(
            tokens=self.tokens(split, int(plan.corpora[i]), int(plan.examples[i])),
            bounds=plan.bounds[i],
            groups=plan.groups_of(i),
        )

    @property
    def manifest(self) -> Manifest:
        """Manifest of the first corpus; all have the same tokenizer."""
        return self.corpora[0].manifest

    @property
    def tokenizer_folder(self) -> Path:
        return self.corpora[0].tokenizer_folder

    def check_tokenizers(self) -> None:
        """Check the tokenizer of every corpus.

        Raises:
            UserError: a corpus holds another tokenizer than its manifest names.
        """
        self.tokenizer()

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer, which is the same in all corpora.

        Raises:
            UserError: a corpus holds another tokenizer than its manifest names.
        """
        tokenizer: Tokenizer | None = None
        files: dict[str, bytes] = {}
        for i, corpus in enumerate(self.corpora):
            folder = corpus.tokenizer_folder
            try:
                # Loading a large tokenizer takes a second. Equal files need no second load, since
                # the manifests name one tokenizer.
                is_equal = tokenizer is not None and folder.is_dir() and read_files(folder) == files
                if not is_equal:
                    tokenizer = corpus.tokenizer()
                    files = read_files(folder)
            except UserError as error:
                raise UserError(f"data.mixture.{i}.path: {error}") from None
        assert tokenizer is not None
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides what is read, in order; compared at resume.

        For example "0123456789abcdefx0.7+fedcba9876543210x0.3<900@40000x1.0": two corpora of
        weights 0.7 and 0.3, the second capped at 900 instances, with weight 1 after 40,000 samples.
        """
        parts = []
        for source in self.mixture.sources:
            part = f"{source.fingerprint[:16]}x{source.weight!r}"
            if source.max_instances is not None:
                part += f"<{source.max_instances}"
            for samples, weight in source.changes:
                part += f"@{samples}x{weight!r}"
            parts.append(part)
        return "+".join(parts)

    def _special_ids(self) -> SpecialIds:
        start = self.manifest.eos_id
        if self.config.objective.name == "autoregressive":
            # Only the tokenizer knows its BOS, and loading it can take a second.
            start = start_id(self.corpora[0].tokenizer())
        return SpecialIds(self.manifest.mask_id, start)

    # -- opening and checking ----------------------------------------------------------------------

    def _open_corpus(self, i: int) -> Corpus:
        path = self.config.data.mixture[i].path
        try:
            corpus = Corpus.open(path, self._check_sizes, self._open_files)
        except UserError as error:
            raise UserError(f"data.mixture.{i}.path: {error}") from None
        kind = corpus.manifest.kind
        if kind != self.kind:
            raise UserError(
                f"data.mixture.{i}.path: {path} was made by `{_MADE_BY[kind]}` and can be trained"
                f" on by `{_TRAINED_BY[kind]}` only; `{_TRAINED_BY[self.kind]}` reads folders of"
                f" `{_MADE_BY[self.kind]}`"
            )
        return corpus

    def _check_vocabulary(self) -> None:
        first = self.corpora[0]
        model_size = self.config.model.vocab_size
        for i, corpus in enumerate(self.corpora):
            manifest = corpus.manifest
            if manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
                raise UserError(
                    f"data.mixture.{i}.path: {corpus.folder} was prepared with another tokenizer"
                    f" than {first.folder}; prepare both with one"
                )
            # The ids in the data count too: the embedding must have a row for each of them.
            highest = max((shard.max_token_id for shard in manifest.shards), default=0)
            if max(highest + 1, manifest.vocab_size) > model_size:
                raise UserError(
                    f"model.vocab_size: {model_size} is too small for {corpus.folder}, whose"
                    f" tokenizer has {manifest.vocab_size} ids (largest in the data: {highest});"
                    f" use {manifest.padded_vocab_size}"
                )

    def _verify(self) -> None:
        self.check_tokenizers()
        for corpus in self.corpora:
            # Larger corpora would hold up the start; their files are checked when they are read.
            size = sum(entry.bin_bytes + entry.idx_bytes for entry in corpus.manifest.shards)
            if size > self.config.data.verify_bytes:
                continue
            problems = verify_corpus(corpus.folder)
            if problems:
                raise UserError(
                    f"data.mixture: {problems[0]}; see all with `llada data verify {corpus.folder}`"
                )

    def _check_enough_samples(self) -> None:
        steps = self.config.train.steps
        needed = steps * self.config.batch.global_
        available = self.mixture.num_samples
        if available is not None and available < needed:
            raise UserError(
                f"train.steps: {steps} steps need {needed} samples, the capped mixture holds"
                f" {available}; raise data.mixture.*.max_epochs"
            )

    def _mixture_source(self, i: int) -> MixtureSource:
        entry = self.config.data.mixture[i]
        num_instances = self.readers[TRAIN][i].num_instances
        max_instances = None
        if entry.max_epochs is not None:
            max_instances = int(entry.max_epochs * num_instances)
        # Changes are set in tokens; the mixture counts samples, rounded up.
        changes = tuple(
            (ceil_div(change.tokens, self.config.data.sequence_length), change.weight)
            for change in entry.weight_at
        )
        return MixtureSource(
            name=entry.path,
            fingerprint=self.corpora[i].manifest.fingerprint(TRAIN),
            num_instances=num_instances,
            weight=entry.weight,
            max_instances=max_instances,
            changes=changes,
        )


def short_names(paths: Sequence[str]) -> list[str]:
    """Return names of corpora for metrics: the last folders of their paths, as many as tell them
    apart.

    /a/x/books, /a/y/books and /a/web give x/books, y/books and web. A corpus that is listed twice
    gets a number.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
        paths_of: dict[str, set[tuple[str, ...]]] = {}
        for name, own in zip(names, parts, strict=True):
            paths_of.setdefault(name, set()).add(own)
        ambiguous = [len(paths_of[name]) > 1 for name in names]
        if not any(ambiguous):
            break
        depths = [depth + more for depth, more in zip(depths, ambiguous, strict=True)]
    numbered = []
    for i, name in enumerate(names):
        before = names[:i].count(name)
        if before:
            name = f"{name}.{before + 1}"
        numbered.append(name)
    return numbered


def check_tokens(corpus: Corpus, tokens: I64, where: str) -> I64:
    """Return the tokens if they can be this corpus's.

    Raises:
        UserError: [MASK], or an id that the vocabulary lacks; `where` names the tokens.
    """
    manifest = corpus.manifest
    # As an unsigned number, a negative id is past the vocabulary too.
    is_unknown = tokens.view(np.uint64) >= manifest.vocab_size
    problems = {
        "the mask token": tokens == manifest.mask_id,
        "an id past the vocabulary": is_unknown,
    }
    for problem, wrong in problems.items():
        if wrong.any():
            raise UserError(
                f"{corpus.folder}: token {int(np.argmax(wrong))} of {where} is {problem}, the shard"
                " is damaged; run `llada data verify`"
            )
    return tokens

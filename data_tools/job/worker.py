"""What is done for one unit: its document hashes (for `--dedup`), its shards."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from data_tools.batches import in_batches
from data_tools.filters.decontamination import Contamination
from data_tools.filters.dedup import HASHES, Duplicates, hashes_path, write_hashes
from data_tools.job.pool import Advance, Work
from data_tools.job.splits import Encoded, write_batch
from data_tools.job.work_plan import WorkPlan
from data_tools.readers.input_file import DATASET, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.report import Report, no_document
from llada.data.corpus import TRAIN, VALIDATION
from llada.data.shards import ShardEntry, SplitWriter, token_dtype
from llada.errors import UserError
from llada.files import write_atomically
from llada.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
"""Text that is encoded at a time, of documents that are not longer."""
ENTRIES, PARTS = "units", "parts"
"""Folders of an unfinished preparation: what is known of finished units, and their shards."""


class Kind(Protocol):
    """What documents are. Can be sent to other processes."""

    @property
    def name(self) -> str:
        """TEXT or CONVERSATIONS of `llada.data.corpus`."""
        ...

    @property
    def options(self) -> ReadOptions:
        """How documents are read."""
        ...

    def text(self, document: Any) -> str:
        """All of its text: two documents with the same are duplicates."""
        ...

    def choose(self, tokenizer: Tokenizer, plan: WorkPlan, wanted: str) -> tuple[str, str]:
        """The name of the encoder, and why it is not a faster one."""
        ...

    def open(self, tokenizer: Tokenizer, backend: str) -> Steps:
        """What is done to documents, for the process that does it."""
        ...


class Steps(NamedTuple):
    """What a kind does to documents.

    Attributes:
        read: the documents of a slice of a source (`data_tools.readers.reading`).
        encode: documents -> ids; what it leaves out of them is counted in the report.
    """

    read: Callable[[InputFile, Slice, Report], Iterator[Any]]
    encode: Callable[[list[Any], Report], Encoded]


@dataclass(frozen=True)
class Decontamination:
    """Documents that share an n-gram of words with an evaluation text.

    Attributes:
        files: evaluation texts.
        ngram: words.
        drop: leave the documents out; else they are only counted.
    """

    files: tuple[str, ...]
    ngram: int
    drop: bool


@dataclass(frozen=True)
class UnitJob:
    """The steps of a preparation, for any process that sees its folder.

    Attributes:
        folder: of the unfinished preparation, with its plan and its tokenizer.
        kind: of the documents.
        tokenizer: of the corpus.
        backend: name of the encoder.
        validation_fraction, shard_tokens, dedup, decontamination: see
        `data_tools.documents.text.prepare`.
    """

    folder: Path
    kind: Kind
    tokenizer: Tokenizer
    backend: str
    validation_fraction: float
    shard_tokens: int
    dedup: bool
    decontamination: Decontamination | None

    def open(self, step: str) -> Work:
        """`hashes` or `shards`: a function of the number of a unit."""
        opened = _Opened(self, step)
        return opened.hash if step == HASHES else opened.tokenize


class _Opened:
    """A job in a process that works on it."""

    def __init__(self, job: UnitJob, step: str) -> None:
        self.job = job
        plan = WorkPlan.load(job.folder)
        if plan is None:
            raise UserError(f"--output: {job.folder} is gone; start again")
        self.plan = plan
        self.tokenizer = job.tokenizer
        self.steps = job.kind.open(self.tokenizer, job.backend)
        self.contamination = None if step == HASHES else open_contamination(job.decontamination)

    def hash(self, unit: int, advance: Advance) -> None:
        """Write the hash of every document of a unit, in order."""
        report = Report()
        digests: list[bytes] = []
        seen = Counted(advance, report)
        for document in self._documents(unit, report, []):
            data = self.job.kind.text(document).encode("utf-8", "surrogatepass")
            digests.append(xxhash.xxh3_128_digest(data))
            seen.add(len(data), 0)
        seen.flush()
        write_hashes(hashes_path(self.job.folder, unit), digests)

    def tokenize(self, unit: int, advance: Advance) -> None:
        """Write the shards of a unit, then the entry that says it is done."""
        report, noted = Report(), Counter[str]()
        given: list[list[Any]] = []
        dtype, limit = token_dtype(self.tokenizer.rows), self.job.shard_tokens
        shards: list[ShardEntry] = []
        seen = Counted(advance, report)
        with (
            SplitWriter(self.job.folder / PARTS, TRAIN, dtype, limit, unit) as train,
            SplitWriter(self.job.folder / PARTS, VALIDATION, dtype, limit, unit) as validation,
        ):
            documents = self._unique(unit, self._documents(unit, report, given), report)
            for batch in in_batches(
                documents, lambda document: len(self.job.kind.text(document)), BATCH_BYTES
            ):
                kept = self._clean(batch, report, noted)
                if not kept:
                    continue
                encoded = self.steps.encode(kept, report)
                write_batch(
                    encoded,
                    self.tokenizer,
                    {TRAIN: train, VALIDATION: validation},
                    self.job.validation_fraction,
                )
                seen.add(int(encoded.text_bytes.sum()), len(encoded.flat))
            shards = train.finish() + validation.finish()
        seen.flush()
        entry = {
            "shards": [asdict(shard) for shard in shards],
            "given": given,
            "skipped": dict(report.skipped),
            "noted": dict(noted),
            "listed": report.listed,
            "encoder": self.job.backend,
        }
        write_atomically(entry_path(self.job.folder, unit), json.dumps(entry))

    def _documents(self, unit: int, report: Report, given: list[list[Any]]) -> Iterator[Any]:
        """Of every piece in turn; `given` gets [source, documents, what was left out if there are
        none] of each.
        """
        for piece in self.plan.units[unit]:
            source = self.plan.sources[piece.source]
            _check_unchanged(source)
            before, count = report.skipped.copy(), 0
            for document in self.steps.read(source, piece.slice, report):
                count += 1
                yield document
            reasons = {} if count else dict(report.skipped - before)
            if source.named and not count and self._num_pieces[piece.source] == 1:
                raise no_document(source.path, Counter(reasons))
            given.append([piece.source, count, reasons])

    @functools.cached_property
    def _num_pieces(self) -> Counter[int]:
        """Pieces that each source is cut into."""
        return Counter(piece.source for unit in self.plan.units for piece in unit)

    def _unique(self, unit: int, documents: Iterator[Any], report: Report) -> Iterator[Any]:
        """Without those that are copies of an earlier one."""
        if not self.job.dedup:
            yield from documents
            return
        copies = Duplicates(self.job.folder).of(unit)
        for number, document in enumerate(documents):
            if number in copies:
                report.skipped["documents that repeat an earlier one"] += 1
            else:
                yield document

    def _clean(self, batch: list[Any], report: Report, noted: Counter[str]) -> list[Any]:
        """Without those that overlap an evaluation text, if so asked."""
        rule = self.job.decontamination
        if self.contamination is None or rule is None:
            return batch
        overlaps = self.contamination.overlaps([self.job.kind.text(document) for document in batch])
        if not overlaps.any():
            return batch
        counts = report.skipped if rule.drop else noted
        counts["documents that overlap an evaluation text"] += int(overlaps.sum())
        return (
            [document for document, drop in zip(batch, overlaps, strict=True) if not drop]
            if rule.drop
            else batch
        )


class Counted:
    """Passes on what is done, a few times a second at most."""

    def __init__(self, advance: Advance, report: Report, every: int = BATCH_BYTES) -> None:
        self._advance, self._report, self._every = advance, report, every
        self._text = self._tokens = self._left_out = 0

    def add(self, text: int, tokens: int) -> None:
        self._text += text
        self._tokens += tokens
        if self._text >= self._every:
            self.flush()

    def flush(self) -> None:
        left_out = sum(self._report.skipped.values())
        self._advance(self._text, self._tokens, left_out - self._left_out)
        self._text, self._tokens, self._left_out = 0, 0, left_out


def entry_path(folder: Path, unit: int) -> Path:
    """The file that says that a unit is done, and with what."""
    return folder / ENTRIES / f"{unit:05d}.json"


def open_contamination(rule: Decontamination | None) -> Contamination | None:
    """The evaluation texts of a rule."""
    if rule is None:
        return None
    from data_tools.filters.decontamination import evaluation_texts

    return Contamination(evaluation_texts(rule.files), rule.ngram)


def _check_unchanged(source: InputFile) -> None:
    """Raises UserError if a file is not the one that was planned with."""
    if source.format == DATASET:
        return
    try:
        status = os.stat(source.path)
    except OSError as error:
        raise UserError(
            f"--input: {source.path}: cannot be read any more ({error.strerror})"
        ) from None
    if (status.st_size, str(status.st_mtime_ns)) != (source.bytes, source.stamp):
        raise UserError(
            f"--input: {source.path} has changed since the preparation began; start over with"
            " --force"
        )


def held_out_hash(data: bytes) -> int:
    """The 64-bit hash that decides on which side a document is."""
    return xxhash.xxh3_64_intdigest(data)

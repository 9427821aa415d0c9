"""The work on one unit: read its documents, filter them, encode them and write their shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Generic

import xxhash

from data_tools.batches import in_batches
from data_tools.documents.base import Document, DocumentEncoder, DocumentType
from data_tools.filters.decontamination import Contamination, evaluation_texts
from data_tools.filters.dedup import Duplicates, hashes_path, write_hashes
from data_tools.job.options import CorpusOptions, DecontaminationOptions
from data_tools.job.splits import write_batch
from data_tools.job.unit_result import UNIT_SHARDS, RangeCount, UnitResult
from data_tools.job.work_plan import WorkPlan
from data_tools.readers.formats import DATASET
from data_tools.readers.input_file import InputFile
from data_tools.readers.report import Report, no_document
from data_tools.types import Advance
from llada.data.manifest import TRAIN, VALIDATION
from llada.data.shard_format import token_dtype
from llada.data.shard_writer import SplitWriter
from llada.errors import UserError
from llada.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
"""Bytes of text that are encoded at a time; a longer document is a batch of its own."""


@dataclass(frozen=True)
class UnitWorker(Generic[Document]):
    """Does units of a preparation, in any process that sees its folder.

    Attributes:
        folder: folder of the unfinished preparation, with its plan.
        document_type: type of the documents.
        tokenizer: tokenizer of the corpus.
        backend: name of the encoder.
        options: how the corpus is written.
    """

    folder: Path
    document_type: DocumentType[Document]
    tokenizer: Tokenizer
    backend: str
    options: CorpusOptions

    def __getstate__(self) -> dict[str, object]:
        # The cached properties below are not sent to other processes: encoders cannot be pickled,
        # and the index of the evaluation texts may be large.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _plan(self) -> WorkPlan:
        plan = WorkPlan.load(self.folder)
        if plan is None:
            raise UserError(f"--output: {self.folder} is gone; start again")
        return plan

    @cached_property
    def _encoder(self) -> DocumentEncoder[Document]:
        return self.document_type.open(self.tokenizer, self.backend)

    @cached_property
    def _contamination(self) -> Contamination | None:
        return open_contamination(self.options.decontamination)

    @cached_property
    def _ranges_per_source(self) -> Counter[int]:
        """Number of input ranges that each source is cut into."""
        counts = Counter[int]()
        for input_ranges in self._plan.units:
            counts.update(input_range.source for input_range in input_ranges)
        return counts

    def hash_unit(self, unit: int, advance: Advance) -> None:
        """Write the hash of every document of a unit, in order; the first pass of `--dedup`."""
        report = Report()
        throttled = ThrottledAdvance(advance, report)
        digests: list[bytes] = []
        for document in self._read(unit, report, []):
            text = self.document_type.text(document).encode("utf-8", "surrogatepass")
            digests.append(xxhash.xxh3_128_digest(text))
            throttled.add(len(text), 0)
        throttled.flush()
        write_hashes(hashes_path(self.folder, unit), digests)

    def encode_unit(self, unit: int, advance: Advance) -> None:
        """Write the shards of a unit, then its result, which marks it as done."""
        report = Report()
        noted = Counter[str]()
        given: list[RangeCount] = []
        throttled = ThrottledAdvance(advance, report)
        shards_folder = self.folder / UNIT_SHARDS
        dtype = token_dtype(self.tokenizer.padded_vocab_size)
        shard_tokens = self.options.shard_tokens
        with (
            SplitWriter(shards_folder, TRAIN, dtype, shard_tokens, unit) as train,
            SplitWriter(shards_folder, VALIDATION, dtype, shard_tokens, unit) as validation,
        ):
            writers = {TRAIN: train, VALIDATION: validation}
            documents = self._drop_duplicates(unit, self._read(unit, report, given), report)
            for batch in in_batches(documents, self._text_length, BATCH_BYTES):
                kept = self._drop_contaminated(batch, report, noted)
                if not kept:
                    continue
                encoded = self._encoder.encode(kept, report)
                write_batch(encoded, self.tokenizer, writers, self.options.validation_fraction)
                throttled.add(int(encoded.text_bytes.sum()), len(encoded.flat_tokens))
            shards = train.finish() + validation.finish()
        throttled.flush()
        # The result is written after all other files of the unit are on the disk, so an interrupted
        # unit has no result and is done again.
        result = UnitResult(shards, given, report.skipped, noted, report.listed, self.backend)
        result.save(self.folder, unit)

    def _text_length(self, document: Document) -> int:
        return len(self.document_type.text(document))

    def _read(self, unit: int, report: Report, given: list[RangeCount]) -> Iterator[Document]:
        """Yield the documents of a unit, and append what each of its input ranges gave to `given`.

        Raises:
            UserError: a source has changed since the plan was made, or a named source gives no
                document.
        """
        for input_range in self._plan.units[unit]:
            source = self._plan.sources[input_range.source]
            _check_unchanged(source)
            skipped_before = report.skipped.copy()
            count = 0
            for document in self._encoder.read(source, input_range.slice, report):
                count += 1
                yield document
            left_out = Counter[str]()
            if not count:
                left_out = report.skipped - skipped_before
                # If there are several ranges of the source, another may have a document; `finish`
                # checks their sum.
                is_whole_source = self._ranges_per_source[input_range.source] == 1
                if source.named and is_whole_source:
                    raise no_document(source.path, left_out)
            given.append(RangeCount(input_range.source, count, left_out))

    def _drop_duplicates(
        self, unit: int, documents: Iterator[Document], report: Report
    ) -> Iterator[Document]:
        """Yield the documents, with `dedup` only those that repeat no earlier one."""
        if not self.options.dedup:
            yield from documents
            return
        repeated = Duplicates(self.folder).of(unit)
        for number, document in enumerate(documents):
            if number in repeated:
                report.skipped["documents that repeat an earlier one"] += 1
            else:
                yield document

    def _drop_contaminated(
        self, batch: list[Document], report: Report, noted: Counter[str]
    ) -> list[Document]:
        """Return the documents to keep; those that overlap an evaluation text are counted."""
        options = self.options.decontamination
        if self._contamination is None or options is None:
            return batch
        texts = [self.document_type.text(document) for document in batch]
        overlaps = self._contamination.overlaps(texts)
        if not overlaps.any():
            return batch
        counts = noted
        if options.drop:
            counts = report.skipped
        counts["documents that overlap an evaluation text"] += int(overlaps.sum())
        if not options.drop:
            return batch
        return [document for document, overlap in zip(batch, overlaps, strict=True) if not overlap]


class ThrottledAdvance:
    """Adds up progress, and passes it on after every `every` bytes of text.

    Args:
        advance: function that receives the progress.
        report: report whose number of things left out is passed on too.
        every: bytes of text between two calls.
    """

    def __init__(self, advance: Advance, report: Report, every: int = BATCH_BYTES) -> None:
        self._advance = advance
        self._report = report
        self._every = every
        self._text_bytes = 0
        self._tokens = 0
        self._left_out_before = 0

    def add(self, text_bytes: int, tokens: int) -> None:
        self._text_bytes += text_bytes
        self._tokens += tokens
        if self._text_bytes >= self._every:
            self.flush()

    def flush(self) -> None:
        left_out = sum(self._report.skipped.values())
        self._advance(self._text_bytes, self._tokens, left_out - self._left_out_before)
        self._text_bytes = 0
        self._tokens = 0
        self._left_out_before = left_out


def open_contamination(options: DecontaminationOptions | None) -> Contamination | None:
    """Return the index of the evaluation texts, or None if none are set."""
    if options is None:
        return None
    return Contamination(evaluation_texts(options.files), options.ngram)


def _check_unchanged(source: InputFile) -> None:
    """Raise UserError if a file has changed since the plan was made."""
    # A dataset is not a single file. Its fingerprint is part of the plan's digest, which is
    # compared when a command starts.
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

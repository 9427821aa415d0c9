"""`llada data prepare`: documents -> token shards, manifest and a copy of the tokenizer, in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

import llada
from data_tools.readers import ReadOptions, Report, parse_extensions, read, sample_texts
from llada.data.corpus import CONVERSATIONS, FORMAT_VERSION, MANIFEST, TEXT, Manifest
from llada.data.shards import ShardEntry, ShardWriter, token_dtype
from llada.errors import UserError
from llada.files import new_folder
from llada.tokenizer import Tokenizer, train_byte_level_bpe

I64 = npt.NDArray[np.int64]
T = TypeVar("T")

SPLITS = ("train", "validation")
_BATCH_CHARACTERS = 4 << 20
_SAMPLE_CHARACTERS = 1 << 20
_CORPUS_FILES = (MANIFEST, "tokenizer", *(f"{split}-*.{suffix}" for split in SPLITS for suffix in ("bin", "idx", "replies")))
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_special_tokens.json",
)


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    validation_fraction: float = 0.005,
    add_special_tokens: bool = False,
    text_field: str = "text",
    extensions: Sequence[str] | None = None,
    skip_bad: bool = False,
    shard_tokens: int = 2**28,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Tokenize and shard.

    Args:
        inputs: files and folders.
        tokenizer_path: Hugging Face folder, tokenizer.json or SentencePiece model.
        output: folder to make; written beside it and renamed at the end.
        validation_fraction: share of the documents, chosen by the hash of their text, that goes to the validation split.
        add_special_tokens: append LLaDA's special tokens that the tokenizer lacks; the result is saved with the corpus.
        text_field, extensions, skip_bad: see ReadOptions.
        shard_tokens: a shard is closed by the document with which it has this many.
        force: replace a prepared corpus at `output`.
        progress: show a progress line on stderr.

    Raises:
        UserError: anything wrong with inputs, tokenizer, options or output; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    options = ReadOptions(text_field, parse_extensions(extensions), skip_bad)
    recorded = {"text_field": text_field, "extensions": sorted(options.extensions) if options.extensions else None, "skip_bad": skip_bad}
    settings = CorpusSettings(TEXT, tokenizer_path, validation_fraction, add_special_tokens, shard_tokens, force, progress, recorded)
    report = Report()

    def batches(tokenizer: Tokenizer) -> Iterator[Encoded]:
        for texts in in_batches(read(inputs, options, report), len, _BATCH_CHARACTERS):
            yield _encode(texts, tokenizer)

    return write_corpus(output, settings, batches, report)


@dataclass(frozen=True)
class CorpusSettings:
    """How a corpus is written, whatever its documents are.

    Attributes:
        kind: TEXT or CONVERSATIONS.
        tokenizer_path, validation_fraction, add_special_tokens, shard_tokens, force, progress: see `prepare`.
        recorded: further options for the manifest.
    """

    kind: str
    tokenizer_path: str | Path
    validation_fraction: float
    add_special_tokens: bool
    shard_tokens: int
    force: bool
    progress: bool
    recorded: dict[str, Any]

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"--validation-fraction: {self.validation_fraction} is not in [0, 1)")
        if self.shard_tokens < 1:
            raise UserError(f"--shard-tokens: {self.shard_tokens} is less than 1")


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids.

    Attributes:
        flat: the ids of all documents one after the other, each with its EOS, int64.
        lengths: ids of each document, int64 [n].
        text_bytes: UTF-8 bytes of each document's text, int64 [n].
        hashes: 64-bit hash of each document, which decides whether it is held out [n].
        replies: of conversations, rows of REPLY_FIELDS in order of their documents, int64 [replies, 5].
    """

    flat: I64
    lengths: I64
    text_bytes: I64
    hashes: Sequence[int]
    replies: I64 | None = None


def write_corpus(
    output: str | Path, settings: CorpusSettings, batches: Callable[[Tokenizer], Iterator[Encoded]], report: Report
) -> Manifest:
    """Write the folder of a corpus: shards of both splits, the tokenizer, the manifest.

    Args:
        output: folder to make; written beside it and renamed at the end.
        settings: how.
        batches: documents, encoded with the tokenizer.
        report: filled by whoever reads, by the time the batches end.
    """
    with new_folder(output, settings.force, "a prepared corpus", _CORPUS_FILES) as folder:
        tokenizer = Tokenizer.load(settings.tokenizer_path, require_mask=not settings.add_special_tokens)
        if settings.add_special_tokens:
            tokenizer = tokenizer.with_special_tokens()
        dtype = token_dtype(tokenizer.rows)
        writers = {split: _SplitWriter(folder, split, dtype, settings.shard_tokens) for split in SPLITS}
        try:
            with _progress(settings.progress) as show:
                for batch in batches(tokenizer):
                    _write_batch(batch, tokenizer, writers, settings.validation_fraction)
                    show(int(batch.text_bytes.sum()), len(batch.flat), sum(report.skipped.values()))
            shards = [entry for split in SPLITS for entry in writers[split].finish()]
        finally:
            for writer in writers.values():
                writer.abort()
        tokenizer.save(folder / "tokenizer")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool_version=llada.__version__,
            kind=settings.kind,
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            rows=tokenizer.rows,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            options={
                "validation_fraction": settings.validation_fraction,
                "add_special_tokens": settings.add_special_tokens,
                "shard_tokens": settings.shard_tokens,
                **settings.recorded,
            },
            sources=report.sources,
            skipped=dict(sorted(report.skipped.items())),
            shards=shards,
        )
        manifest.save(folder)
    return manifest


def summary(manifest: Manifest) -> str:
    """What was prepared, in a few lines."""
    lines = []
    for split in SPLITS:
        documents, tokens, text_bytes = manifest.totals(split)
        if documents:
            lines.append(f"{split}: {_totals(manifest, split, documents, tokens, text_bytes)}")
        else:
            consequence = "nothing to train on" if split == "train" else "training on this corpus has no validation"
            lines.append(f"{split}: no documents; {consequence} (--validation-fraction is {manifest.options['validation_fraction']:g})")
    lines += [f"left out: {count:,} {reason}" for reason, count in manifest.skipped.items()]
    return "\n".join(lines)


def _totals(manifest: Manifest, split: str, documents: int, tokens: int, text_bytes: int) -> str:
    shards = manifest.of(split)
    files = f"{len(shards)} shard{'s' if len(shards) > 1 else ''}"
    if manifest.kind == CONVERSATIONS:
        replies = sum(entry.replies for entry in shards)
        return f"{documents:,} conversations with {replies:,} replies, {tokens:,} tokens, {text_bytes:,} bytes of replies, {files}"
    return f"{documents:,} documents, {tokens:,} tokens, {text_bytes:,} bytes of text, {text_bytes / tokens:.2f} bytes per token, {files}"


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    text_field: str = "text",
    extensions: Sequence[str] | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> tuple[Tokenizer, float]:
    """Train a byte-level BPE on the documents of the inputs and save it as the folder `output`.

    Returns:
        The tokenizer, and the bytes per token (no EOS counted) on up to a million characters of the inputs.

    Raises:
        UserError: anything wrong with inputs, options or output; nothing is left behind.
    """
    options = ReadOptions(text_field, parse_extensions(extensions), skip_bad)
    with new_folder(output, force, "a tokenizer", _TOKENIZER_FILES) as folder:
        made = train_byte_level_bpe(read(inputs, options, Report()), vocab_size)
        made.save(folder)
    texts = list(sample_texts(inputs, None, _SAMPLE_CHARACTERS, options))
    return made, sum(len(text.encode()) for text in texts) / max(1, len(made.encode_batch(texts)[0]))


# -- documents to shards -----------------------------------------------------------------------------------------------


class _SplitWriter:
    """The shards of one split: a new one when the current one is full."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], limit: int) -> None:
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, limit
        self._writer: ShardWriter | None = None
        self._entries: list[ShardEntry] = []

    def append(self, flat: I64, lengths: I64, text_bytes: I64, replies: I64 | None) -> None:
        """Add documents, each with its EOS; where shards end does not depend on how documents are grouped into calls."""
        ends = np.cumsum(lengths)
        first, start = 0, 0
        while first < len(lengths):
            if self._writer is None:
                self._writer = ShardWriter(self._folder, f"{self._split}-{len(self._entries):05d}", self._dtype, self._split)
            room = self._limit - self._writer.tokens
            last = min(int(np.searchsorted(ends, start + room)) + 1, len(lengths))
            stop = int(ends[last - 1])
            own = None
            if replies is not None:
                low, high = np.searchsorted(replies[:, 0], (first, last))
                own = replies[low:high] - np.array([first, 0, 0, 0, 0])
            self._writer.append(flat[start:stop], lengths[first:last], int(text_bytes[first:last].sum()), own)
            first, start = last, stop
            if self._writer.tokens >= self._limit:
                self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._entries.append(self._writer.close())
            self._writer = None

    def finish(self) -> list[ShardEntry]:
        self._close()
        return self._entries

    def abort(self) -> None:
        """Give up an open shard."""
        if self._writer is not None:
            self._writer.abort()


def in_batches(documents: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Group documents until their sizes add up to `limit`."""
    batch: list[T] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += size_of(document)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Tokenizer) -> Encoded:
    """Every text and its EOS."""
    raw = [text.encode("utf-8") for text in texts]
    flat, lengths = tokenizer.encode_batch(texts)
    sizes = np.array([len(data) for data in raw], dtype=np.int64)
    hashes = [xxhash.xxh3_64_intdigest(data) for data in raw]
    return Encoded(np.insert(flat, np.cumsum(lengths), tokenizer.eos_id), lengths + 1, sizes, hashes)


def _write_batch(batch: Encoded, tokenizer: Tokenizer, writers: dict[str, _SplitWriter], fraction: float) -> None:
    """Append every document to the split that its hash names."""
    flat = batch.flat
    wrong = (flat < 0) | (flat >= tokenizer.vocab_size) | (flat == tokenizer.mask_id)
    if wrong.any():
        token_id = int(flat[np.argmax(wrong)])
        raise UserError(
            f"--tokenizer: {tokenizer.name} gave id {token_id} for text; allowed are 0..{tokenizer.vocab_size - 1} "
            f"without the mask token {tokenizer.mask_id}"
        )
    held_out = np.array([value / 2**64 < fraction for value in batch.hashes])
    owner = np.repeat(np.arange(len(held_out)), batch.lengths)
    for split, chosen in (("train", ~held_out), ("validation", held_out)):
        if chosen.any():
            replies = batch.replies
            if replies is not None:
                replies = replies[chosen[replies[:, 0]]]
                replies[:, 0] = (np.cumsum(chosen) - 1)[replies[:, 0]]
            writers[split].append(flat[chosen[owner]], batch.lengths[chosen], batch.text_bytes[chosen], replies)


@contextmanager
def _progress(wanted: bool) -> Iterator[Any]:
    """A function of (bytes, tokens of a batch, things left out so far) that keeps a line on stderr up to date, or does nothing."""
    if not wanted:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    started, text, tokens = time.perf_counter(), 0, 0
    with Progress(SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as display:
        task = display.add_task("reading")

        def show(more_text: int, more_tokens: int, left_out: int) -> None:
            nonlocal text, tokens
            text, tokens = text + more_text, tokens + more_tokens
            rate = text / 1e6 / max(time.perf_counter() - started, 1e-9)
            display.update(task, description=f"{text / 1e6:,.0f} MB, {rate:,.1f} MB/s, {tokens:,} tokens, {left_out:,} left out")

        yield show

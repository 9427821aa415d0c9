"""`llada data prepare`: documents -> token shards, manifest and a copy of the tokenizer, in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

import llada
from data_tools.readers import ReadOptions, Report, parse_extensions, read, sample_texts
from llada.data.corpus import FORMAT_VERSION, MANIFEST, Manifest
from llada.data.shards import ShardEntry, ShardWriter, token_dtype
from llada.errors import UserError
from llada.files import new_folder
from llada.tokenizer import Tokenizer, train_byte_level_bpe

I64 = npt.NDArray[np.int64]

SPLITS = ("train", "validation")
_BATCH_CHARACTERS = 4 << 20
_SAMPLE_CHARACTERS = 1 << 20
_CORPUS_FILES = (MANIFEST, "tokenizer", "train-*.bin", "train-*.idx", "validation-*.bin", "validation-*.idx")
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
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction: {validation_fraction} is not in [0, 1)")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens: {shard_tokens} is less than 1")
    options = ReadOptions(text_field, parse_extensions(extensions), skip_bad)
    report = Report()
    with new_folder(output, force, "a prepared corpus", _CORPUS_FILES) as folder:
        tokenizer = Tokenizer.load(tokenizer_path, require_mask=not add_special_tokens)
        if add_special_tokens:
            tokenizer = tokenizer.with_special_tokens()
        dtype = token_dtype(tokenizer.rows)
        writers = {split: _SplitWriter(folder, split, dtype, shard_tokens) for split in SPLITS}
        try:
            with _progress(progress) as show:
                for texts in _batches(read(inputs, options, report)):
                    show(*_write_batch(texts, tokenizer, writers, validation_fraction), sum(report.skipped.values()))
            shards = [entry for split in SPLITS for entry in writers[split].finish()]
        finally:
            for writer in writers.values():
                writer.abort()
        tokenizer.save(folder / "tokenizer")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool_version=llada.__version__,
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            rows=tokenizer.rows,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            options={
                "validation_fraction": validation_fraction,
                "add_special_tokens": add_special_tokens,
                "text_field": text_field,
                "extensions": sorted(options.extensions) if options.extensions else None,
                "skip_bad": skip_bad,
                "shard_tokens": shard_tokens,
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
            shards = len(manifest.of(split))
            lines.append(
                f"{split}: {documents:,} documents, {tokens:,} tokens, {text_bytes:,} bytes of text, "
                f"{text_bytes / tokens:.2f} bytes per token, {shards} shard{'s' if shards > 1 else ''}"
            )
        else:
            consequence = "nothing to train on" if split == "train" else "training on this corpus has no validation"
            lines.append(f"{split}: no documents; {consequence} (--validation-fraction is {manifest.options['validation_fraction']:g})")
    lines += [f"left out: {count:,} {reason}" for reason, count in manifest.skipped.items()]
    return "\n".join(lines)


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

    def append(self, flat: I64, lengths: I64, text_bytes: I64) -> None:
        """Add documents, each with its EOS; where shards end does not depend on how documents are grouped into calls."""
        ends = np.cumsum(lengths)
        first, start = 0, 0
        while first < len(lengths):
            if self._writer is None:
                self._writer = ShardWriter(self._folder, f"{self._split}-{len(self._entries):05d}", self._dtype, self._split)
            room = self._limit - self._writer.tokens
            last = min(int(np.searchsorted(ends, start + room)) + 1, len(lengths))
            stop = int(ends[last - 1])
            self._writer.append(flat[start:stop], lengths[first:last], int(text_bytes[first:last].sum()))
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


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_batch(texts: list[str], tokenizer: Tokenizer, writers: dict[str, _SplitWriter], fraction: float) -> tuple[int, int]:
    """Encode a batch and append every document, with its EOS, to the split that its hash names. Returns bytes and tokens."""
    raw = [text.encode("utf-8") for text in texts]
    held_out = np.array([xxhash.xxh3_64_intdigest(data) / 2**64 < fraction for data in raw])
    sizes = np.array([len(data) for data in raw], dtype=np.int64)
    flat, lengths = tokenizer.encode_batch(texts)
    wrong = (flat < 0) | (flat >= tokenizer.vocab_size) | (flat == tokenizer.mask_id)
    if wrong.any():
        token_id = int(flat[np.argmax(wrong)])
        raise UserError(
            f"--tokenizer: {tokenizer.name} gave id {token_id} for text; allowed are 0..{tokenizer.vocab_size - 1} "
            f"without the mask token {tokenizer.mask_id}"
        )
    with_eos = np.insert(flat, np.cumsum(lengths), tokenizer.eos_id)
    owner = np.repeat(np.arange(len(texts)), lengths + 1)
    for split, chosen in (("train", ~held_out), ("validation", held_out)):
        if chosen.any():
            writers[split].append(with_eos[chosen[owner]], lengths[chosen] + 1, sizes[chosen])
    return int(sizes.sum()), len(with_eos)


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

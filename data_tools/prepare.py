"""`llada data prepare`: documents -> token shards, manifest and a copy of the tokenizer, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import llada
from data_tools.readers import ReadOptions, Report, parse_extensions, read
from llada.data.shards import FORMAT_VERSION, MANIFEST, Manifest, ShardEntry, ShardWriter, token_dtype
from llada.errors import UserError
from llada.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20
SPLITS = ("train", "validation")


@dataclass
class _Progress:
    """A line on the terminal, rewritten once a second; nothing where stderr is not a terminal."""

    wanted: bool
    started: float = 0.0
    shown: float = 0.0
    text: int = 0
    tokens: int = 0

    def add(self, text_bytes: int, tokens: int, bad: int) -> None:
        self.started = self.started or time.perf_counter()
        self.text += text_bytes
        self.tokens += tokens
        now = time.perf_counter()
        if self.wanted and now - self.shown > 1:
            self.shown = now
            rate = self.text / 1e6 / max(now - self.started, 1e-9)
            print(
                f"\r{self.text / 1e6:,.0f} MB, {self.tokens:,} tokens, {rate:.1f} MB/s, {bad} left out ",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.wanted and self.text:
            print(file=sys.stderr)


class _SplitWriter:
    """The shards of one split: a new one when the current one is full."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], limit: int) -> None:
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, limit
        self._writer: ShardWriter | None = None
        self.entries: list[ShardEntry] = []

    def append(self, flat: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self._folder, f"{self._split}-{len(self.entries):05d}", self._dtype, self._split)
        self._writer.append(flat, lengths, text_bytes)
        if self._writer.tokens >= self._limit:
            self.finish()

    def finish(self) -> None:
        if self._writer is not None:
            with self._writer as writer:
                self.entries.append(writer.close())
            self._writer = None


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
        shard_tokens: a shard is closed when it has this many.
        force: replace a prepared corpus at `output`.
        progress: show a progress line.

    Raises:
        UserError: anything wrong with inputs, tokenizer, options or output; nothing is left behind.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction: {validation_fraction} is not in [0, 1)")
    output = Path(output)
    _check_output(output, force)
    tokenizer = Tokenizer.load(tokenizer_path, require_mask=not add_special_tokens)
    if add_special_tokens:
        tokenizer = tokenizer.with_special_tokens()
    options = ReadOptions(text_field, parse_extensions(extensions), skip_bad)
    report = Report()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    line = _Progress(progress)
    try:
        writers = {split: _SplitWriter(partial, split, token_dtype(tokenizer.rows), shard_tokens) for split in SPLITS}
        for texts in _batches(read(inputs, options, report)):
            _write_batch(texts, tokenizer, writers, validation_fraction, line, sum(report.skipped.values()))
        for writer in writers.values():
            writer.finish()
        tokenizer.save(partial / "tokenizer")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool_version=llada.__version__,
            dtype=token_dtype(tokenizer.rows).name,
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
            shards=[entry for split in SPLITS for entry in writers[split].entries],
        )
        manifest.save(partial)
        _put_in_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        line.close()
    return manifest


def _check_output(output: Path, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not (output / MANIFEST).is_file():
        raise UserError(f"--output: '{output}' exists and is not a prepared corpus; choose another folder")
    if not force:
        raise UserError(f"--output: '{output}' exists; --force replaces it")


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename, with what was there before kept until the new one stands."""
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_batch(
    texts: list[str], tokenizer: Tokenizer, writers: dict[str, _SplitWriter], fraction: float, line: _Progress, bad: int
) -> None:
    """Encode a batch and append every document, with its EOS, to the split that its hash names."""
    raw = [text.encode("utf-8") for text in texts]
    held_out = np.array([xxhash.xxh3_64_intdigest(data) / 2**64 < fraction for data in raw])
    sizes = np.array([len(data) for data in raw])
    flat, lengths = tokenizer.encode_batch(texts)
    wrong = (flat < 0) | (flat >= tokenizer.vocab_size) | (flat == tokenizer.mask_id)
    if wrong.any():
        raise UserError(
            f"tokenizer {tokenizer.name}: gave id {int(flat[np.argmax(wrong)])} for text, not an ordinary id below {tokenizer.vocab_size}"
        )
    ends = np.cumsum(lengths)
    with_eos = np.insert(flat, ends, tokenizer.eos_id)
    owner = np.repeat(np.arange(len(texts)), lengths + 1)
    for split, chosen in (("train", ~held_out), ("validation", held_out)):
        if chosen.any():
            writers[split].append(with_eos[chosen[owner]], lengths[chosen] + 1, int(sizes[chosen].sum()))
    line.add(int(sizes.sum()), len(with_eos), bad)


def summary(manifest: Manifest) -> str:
    """What was prepared, in a few lines."""
    lines = []
    for split in SPLITS:
        documents, tokens, text_bytes = manifest.totals(split)
        if documents:
            lines.append(
                f"{split}: {documents:,} documents, {tokens:,} tokens, {text_bytes / tokens:.2f} bytes per token, "
                f"{len(manifest.of(split))} shards"
            )
        else:
            lines.append(f"{split}: no documents" + ("; training on this corpus has no validation" if split == "validation" else ""))
    lines += [f"left out: {count:,} {reason}" for reason, count in manifest.skipped.items()]
    return "\n".join(lines)

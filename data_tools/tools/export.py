"""`llada data export`: decode a prepared corpus to JSON Lines."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from data_tools.job.progress import progress_bar
from data_tools.tools.decoding import decode_documents
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, SPLITS, ShardEntry
from llada.errors import UserError, did_you_mean
from llada.outputs import new_file, refuse_inside

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        documents: number of lines.
        text_bytes: UTF-8 bytes of their text.
        prepared_bytes: UTF-8 bytes of the text that was prepared, from the manifest. They differ
            from `text_bytes` if the tokenizer does not decode every text unchanged.
    """

    documents: int
    text_bytes: int
    prepared_bytes: int


def export(
    folder: str | Path,
    output: str | Path,
    *,
    split: str | None = None,
    text_field: str = "text",
    force: bool = False,
    progress: bool = False,
) -> ExportResult:
    """Decode the documents of a corpus to JSON Lines, in order: one object with one field per line.

    Args:
        folder: folder of a prepared corpus of text.
        output: file to make; compressed if its name ends in .gz or .zst.
        split: train or validation; None for both, in this order.
        text_field: name of the field.
        force: whether to replace a file at `output`.
        progress: whether to show a bar on stderr.

    Raises:
        UserError: a damaged corpus, conversations, an unknown split, an output that may not be
            made; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    import orjson

    if split is not None and split not in SPLITS:
        raise UserError(
            f"--split: unknown split '{split}'{did_you_mean(split, SPLITS)}; allowed:"
            f" {', '.join(SPLITS)}"
        )
    corpus = Corpus.open(folder)
    refuse_inside(output, corpus.folder, "--output")
    if corpus.manifest.kind == CONVERSATIONS:
        raise UserError(
            f"export: {folder} contains conversations; only corpora of text can be exported"
        )
    if not Path(output).name.endswith(_SUFFIXES):
        raise UserError(f"--output: '{output}' does not end with .jsonl, .jsonl.gz or .jsonl.zst")
    tokenizer = corpus.tokenizer()
    entries = _shards_of(corpus, split)
    num_documents = 0
    text_bytes = 0
    with (
        new_file(output, force) as file,
        _compressor(file, Path(output).suffix) as lines,
        progress_bar(progress, "exporting", sum(entry.tokens for entry in entries)) as advance,
    ):
        for entry in entries:
            # The text of a damaged shard might look right.
            for shard_file in corpus.files_of(entry):
                shard_file.check_hash()
            for _, flat, lengths in corpus.shard(entry).runs():
                for text in decode_documents(tokenizer, flat, lengths):
                    lines.write(orjson.dumps({text_field: text}) + b"\n")
                    text_bytes += len(text.encode())
                num_documents += len(lengths)
                advance(len(flat))
    return ExportResult(num_documents, text_bytes, sum(entry.text_bytes for entry in entries))


def _shards_of(corpus: Corpus, split: str | None) -> list[ShardEntry]:
    if split is not None:
        return corpus.manifest.of(split)
    entries = []
    for name in SPLITS:
        entries += corpus.manifest.of(name)
    return entries


class _Writer(Protocol):
    def write(self, data: bytes, /) -> object: ...


@contextmanager
def _compressor(file: BinaryIO, suffix: str) -> Iterator[_Writer]:
    """Yield a writer that compresses into `file` by suffix, and is complete when the block ends.

    Equal texts give equal bytes: the gzip header has no name and no time.
    """
    if suffix == ".gz":
        with gzip.GzipFile(
            filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0
        ) as gzip_file:
            yield gzip_file
    elif suffix == ".zst":
        import zstandard

        # The caller still has to sync the file, so it must not be closed.
        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as zstd_file:
            yield zstd_file
    else:
        yield file

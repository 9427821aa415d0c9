"""`llada data export` and `import`: prepared corpora to JSON Lines, and Megatron datasets made
elsewhere to prepared corpora.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_tools.job.finish import new_manifest
from data_tools.job.progress import progress_bar
from data_tools.tools.agreement import Agreement
from data_tools.tools.megatron import IndexedDataset
from data_tools.tools.rewrite import SHARD_TOKENS
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, CORPUS_FILES, SPLITS, TEXT, Manifest
from llada.data.shard_format import I64, token_dtype
from llada.data.shard_writer import SplitWriter
from llada.errors import UserError, did_you_mean
from llada.outputs import new_file, new_folder, refuse_inside
from llada.tokenizer import Tokenizer

# -- export ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        documents: lines.
        text_bytes: UTF-8 bytes of their text.
        prepared_bytes: of the text that the documents were made from, as the manifest says; other
            than text_bytes where the tokenizer does not give text back unchanged.
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
) -> Exported:
    """Decode the documents of a corpus to JSON Lines, one object with one field a document, in
    order.

    Args:
        folder: of a prepared corpus of text.
        output: file to make; .gz and .zst are compressed.
        split: train or validation; None: both, in this order.
        text_field: name of the field.
        force: replace a file at `output`.
        progress: show a bar on stderr.

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
            f"export: {folder} holds conversations; only corpora of text can be exported"
        )
    if not Path(output).name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise UserError(f"--output: '{output}' does not end with .jsonl, .jsonl.gz or .jsonl.zst")
    tokenizer = corpus.tokenizer()
    entries = [
        entry for name in SPLITS if split in (None, name) for entry in corpus.manifest.of(name)
    ]
    documents = text_bytes = 0
    with (
        new_file(output, force) as raw,
        _compressed(raw, Path(output).suffix) as file,
        progress_bar(progress, "exporting", sum(entry.tokens for entry in entries)) as done,
    ):
        for entry in entries:
            for damaged_file in corpus.files_of(entry):
                damaged_file.check_hash()
            for _, flat, lengths in corpus.shard(entry).runs():
                for text in _texts(tokenizer, flat, lengths):
                    file.write(orjson.dumps({text_field: text}) + b"\n")
                    text_bytes += len(text.encode())
                documents += len(lengths)
                done(len(flat))
    return Exported(documents, text_bytes, sum(entry.text_bytes for entry in entries))


def _texts(tokenizer: Tokenizer, flat: I64, lengths: I64) -> Iterator[str]:
    """The text of each document; special tokens, EOS among them, are not text."""
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        yield tokenizer.decode(flat[start:end].tolist(), skip_special_tokens=True)


@contextmanager
def _compressed(file: BinaryIO, suffix: str) -> Iterator[Any]:
    """What is written to the result is in `file` when the block ends, compressed as the suffix
    says; equal texts give equal bytes.
    """
    if suffix == ".gz":
        with gzip.GzipFile(
            filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0
        ) as packed:
            yield packed
    elif suffix == ".zst":
        import zstandard

        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as packed:
            yield packed
    else:
        yield file


# -- import ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What was made.

    Attributes:
        manifest: of the corpus.
        eos_added: documents that did not end with EOS.
        special_inside: documents with BOS or EOS before their end; kept as they are.
        doubts: what suggests that the tokenizer is another one than the data was made with, one
            sentence each.
    """

    manifest: Manifest
    eos_added: int
    special_inside: int
    doubts: list[str]


def import_datasets(
    shards: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    validation_fraction: float = 0.005,
    add_special_tokens: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
    progress: bool = False,
) -> Imported:
    """Make a prepared corpus of Megatron datasets that were tokenized with this tokenizer, without
    tokenizing again.

    Every document is decoded: its text decides whether it is held out, as in `llada data prepare`,
    and the manifest counts its bytes.

    Args:
        shards: .bin, .idx, or both without suffix.
        tokenizer_path, output, validation_fraction, add_special_tokens, shard_tokens, force: as of
        `llada data prepare`.
        progress: show a bar on stderr.

    Raises:
        UserError: anything wrong with shards, tokenizer, options or output, an id that the
            tokenizer does not give, ids that are clearly another tokenizer's; nothing is left
            behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction: {validation_fraction} is not in [0, 1)")
    datasets = _opened(shards)
    with (
        new_folder(output, force, "a prepared corpus", CORPUS_FILES) as folder,
        ExitStack() as stack,
    ):
        tokenizer = Tokenizer.load(tokenizer_path, require_mask=not add_special_tokens)
        own_ids = tokenizer.vocab_size
        if add_special_tokens:
            tokenizer = tokenizer.with_special_tokens()
        dtype = token_dtype(tokenizer.padded_vocab_size)
        writers = {
            split: stack.enter_context(SplitWriter(folder, split, dtype, shard_tokens))
            for split in SPLITS
        }
        done = stack.enter_context(
            progress_bar(progress, "importing", sum(dataset.num_tokens for dataset in datasets))
        )
        work = _Import(tokenizer, own_ids, validation_fraction, writers)
        sources = []
        for dataset in datasets:
            before = work.documents
            work.agreement = Agreement(tokenizer)
            for first, flat, lengths in dataset.runs():
                work.add(dataset, first, flat, lengths)
                done(len(flat))
            work.doubts += work.agreement.doubts(str(dataset.bin_path))
            sources.append(
                {
                    "path": str(dataset.bin_path),
                    "bytes": dataset.bin_path.stat().st_size,
                    "documents": work.documents - before,
                }
            )
        if not work.documents:
            raise UserError(
                f"import: no document in {', '.join(map(str, shards))} that is not empty"
            )
        tokenizer.save(folder / "tokenizer")
        manifest = new_manifest(
            tokenizer,
            kind=TEXT,
            options={
                "validation_fraction": validation_fraction,
                "add_special_tokens": add_special_tokens,
                "shard_tokens": shard_tokens,
                "imported": {"eos_added": work.eos_added, "special_inside": work.special_inside},
            },
            sources=sources,
            skipped=dict(sorted(work.skipped.items())),
            shards=[entry for split in SPLITS for entry in writers[split].finish()],
        )
        manifest.save(folder)
    return Imported(manifest, work.eos_added, work.special_inside, work.doubts)


def _opened(shards: Sequence[str | Path]) -> list[IndexedDataset]:
    datasets = [IndexedDataset(path) for path in shards]
    seen: set[str] = set()
    for dataset in datasets:
        place = os.path.realpath(dataset.bin_path)
        if place in seen:
            raise UserError(
                f"import: {dataset.bin_path} is given twice; its documents would be there twice"
            )
        seen.add(place)
    return datasets


class _Import:
    """Documents of datasets to the splits of a corpus.

    Args:
        tokenizer: of the corpus.
        own_ids: ids below this are those of the tokenizer as it was given; no other can be in the
            data.
        fraction: of the documents that is held out.
        writers: of the splits.

    Attributes:
        agreement: of the tokenizer with the dataset that is read.
        doubts: of all datasets.
    """

    def __init__(
        self, tokenizer: Tokenizer, own_ids: int, fraction: float, writers: dict[str, SplitWriter]
    ) -> None:
        self._tokenizer, self._own_ids, self._fraction, self._writers = (
            tokenizer,
            own_ids,
            fraction,
            writers,
        )
        self.documents = self.eos_added = self.special_inside = 0
        self.skipped: Counter[str] = Counter()
        self.agreement = Agreement(tokenizer)
        self.doubts: list[str] = []

    def add(self, dataset: IndexedDataset, first: int, flat: I64, lengths: I64) -> None:
        """Take the documents of a run that begins with document `first`."""
        self._check_ids(dataset, first, flat, lengths)
        found: dict[str, list[tuple[I64, int]]] = {split: [] for split in SPLITS}
        ends = np.cumsum(lengths)
        for start, end, text in zip(
            ends - lengths, ends, _texts(self._tokenizer, flat, lengths), strict=True
        ):
            raw = text.encode()
            if not raw:
                self.skipped["empty documents"] += 1
                continue
            self.agreement.add(flat[start:end], text)
            held_out = xxhash.xxh3_64_intdigest(raw) / 2**64 < self._fraction
            found[SPLITS[held_out]].append((self._with_eos(flat[start:end]), len(raw)))
        for split, documents in found.items():
            if documents:
                ids, sizes = zip(*documents, strict=True)
                self._writers[split].append(
                    np.concatenate(ids), np.array([len(own) for own in ids]), np.array(sizes)
                )
            self.documents += len(documents)

    def _with_eos(self, ids: I64) -> I64:
        eos, bos = self._tokenizer.eos_id, self._tokenizer.bos_id
        if ids[-1] != eos:
            self.eos_added += 1
            ids = np.append(ids, eos)
        body = ids[:-1]
        self.special_inside += bool(
            (body == eos).any() or (bos is not None and (body == bos).any())
        )
        return ids

    def _check_ids(self, dataset: IndexedDataset, first: int, flat: I64, lengths: I64) -> None:
        mask = self._tokenizer.mask_id
        wrong = (flat < 0) | (flat >= self._own_ids) | (flat == mask)
        if wrong.any():
            place = int(np.argmax(wrong))
            document = first + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            what = (
                "the mask token"
                if flat[place] == mask
                else f"not one of the tokenizer's ids 0..{self._own_ids - 1}"
            )
            raise UserError(
                f"{dataset.bin_path}: document {document} holds id {flat[place]}, {what};"
                " --tokenizer must be the one it was made with"
            )

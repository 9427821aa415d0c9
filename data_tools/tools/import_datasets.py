"""`llada data import`: make a prepared corpus of Megatron datasets that other tools tokenized."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from data_tools.defaults import SHARD_TOKENS, VALIDATION_FRACTION
from data_tools.job.finish import new_manifest
from data_tools.job.options import check_validation_fraction
from data_tools.job.progress import progress_bar
from data_tools.job.splits import is_held_out
from data_tools.tools.agreement import TokenizerAgreement
from data_tools.tools.decoding import decode_documents
from data_tools.tools.megatron import IndexedDataset
from llada.arrays import I64
from llada.data.manifest import CORPUS_FILES, SPLITS, TEXT, TRAIN, VALIDATION, Manifest, ShardEntry
from llada.data.shard_format import token_dtype
from llada.data.shard_writer import SplitWriter
from llada.errors import UserError
from llada.outputs import new_folder
from llada.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImportOptions:
    """How datasets are imported.

    Attributes:
        validation_fraction: share of the documents to hold out, chosen by a hash of their text, as
            by `llada data prepare`.
        add_special_tokens: whether to append LLaDA's special tokens that the tokenizer lacks.
        shard_tokens: number of tokens with which a shard is full; its last document may exceed it.

    Raises:
        UserError: the fraction is not in [0, 1).
    """

    validation_fraction: float = VALIDATION_FRACTION
    add_special_tokens: bool = False
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        check_validation_fraction(self.validation_fraction)


@dataclass(frozen=True)
class ImportResult:
    """What was made.

    Attributes:
        manifest: manifest of the corpus.
        eos_added: number of documents that did not end with EOS.
        special_inside: number of documents with BOS or EOS before their end, which are kept as
            they are.
        doubts: signs that the data was made with another tokenizer, one line per dataset.
    """

    manifest: Manifest
    eos_added: int
    special_inside: int
    doubts: list[str]


class _Source(TypedDict):
    """What a manifest says of a file that was read."""

    path: str
    bytes: int
    documents: int


def import_datasets(
    shards: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    options: ImportOptions | None = None,
    *,
    force: bool = False,
    progress: bool = False,
) -> ImportResult:
    """Make a prepared corpus of Megatron datasets of a tokenizer, without tokenizing again.

    Every document is decoded: its text decides whether it is held out, and the manifest counts the
    bytes of the text.

    Args:
        shards: paths of datasets: .bin, .idx, or the name of both without suffix.
        tokenizer_path: tokenizer that made the data: Hugging Face folder, tokenizer.json or
            SentencePiece model.
        output: folder to make.
        options: how datasets are imported.
        force: whether to replace a prepared corpus at `output`.
        progress: whether to show a bar on stderr.

    Raises:
        UserError: something is wrong with shards, tokenizer, options or output, an id is not one of
            the tokenizer's, or the ids are clearly another tokenizer's; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    options = options or ImportOptions()
    datasets = _open_datasets(shards)
    with (
        new_folder(output, force, "a prepared corpus", CORPUS_FILES) as folder,
        ExitStack() as stack,
    ):
        tokenizer = Tokenizer.load(tokenizer_path, require_mask=not options.add_special_tokens)
        # Ids of tokens that are added below cannot be in the data.
        num_data_ids = tokenizer.vocab_size
        if options.add_special_tokens:
            tokenizer = tokenizer.with_special_tokens()
        dtype = token_dtype(tokenizer.padded_vocab_size)
        writers = {}
        for split in SPLITS:
            writer = SplitWriter(folder, split, dtype, options.shard_tokens)
            writers[split] = stack.enter_context(writer)
        num_tokens = sum(dataset.num_tokens for dataset in datasets)
        advance = stack.enter_context(progress_bar(progress, "importing", num_tokens))
        importer = _Importer(tokenizer, num_data_ids, options.validation_fraction, writers)
        sources = [importer.add_dataset(dataset, advance) for dataset in datasets]
        if not importer.num_documents:
            raise UserError(
                f"import: no document in {', '.join(map(str, shards))} that is not empty"
            )
        tokenizer.save(folder / "tokenizer")
        entries = [entry for split in SPLITS for entry in writers[split].finish()]
        manifest = _manifest(tokenizer, options, importer, sources, entries)
        manifest.save(folder)
    return ImportResult(manifest, importer.eos_added, importer.special_inside, importer.doubts)


def _manifest(
    tokenizer: Tokenizer,
    options: ImportOptions,
    importer: _Importer,
    sources: list[_Source],
    entries: list[ShardEntry],
) -> Manifest:
    return new_manifest(
        tokenizer,
        kind=TEXT,
        options={
            **asdict(options),
            "imported": {
                "eos_added": importer.eos_added,
                "special_inside": importer.special_inside,
            },
        },
        sources=sources,
        skipped=dict(sorted(importer.skipped.items())),
        shards=entries,
    )


def _open_datasets(shards: Sequence[str | Path]) -> list[IndexedDataset]:
    """Open datasets. Raises UserError for one that is damaged or given twice."""
    datasets = [IndexedDataset(path) for path in shards]
    seen: set[str] = set()
    for dataset in datasets:
        real_path = os.path.realpath(dataset.bin_path)
        if real_path in seen:
            raise UserError(
                f"import: {dataset.bin_path} is given twice; its documents would be included twice"
            )
        seen.add(real_path)
    return datasets


class _Importer:
    """Writes the documents of datasets into the splits of a corpus.

    Args:
        tokenizer: tokenizer of the corpus.
        num_data_ids: number of ids of the tokenizer before special tokens were added, to which the
            ids of the data must belong.
        validation_fraction: share of the documents to hold out.
        writers: writer of each split.

    Attributes:
        num_documents: number of documents written.
        eos_added: see ImportResult.
        special_inside: see ImportResult.
        doubts: see ImportResult.
        skipped: number of documents left out, by reason.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_data_ids: int,
        validation_fraction: float,
        writers: dict[str, SplitWriter],
    ) -> None:
        self._tokenizer = tokenizer
        self._num_data_ids = num_data_ids
        self._validation_fraction = validation_fraction
        self._writers = writers
        self.num_documents = 0
        self.eos_added = 0
        self.special_inside = 0
        self.skipped: Counter[str] = Counter()
        self.doubts: list[str] = []

    def add_dataset(self, dataset: IndexedDataset, advance: Callable[[int], None]) -> _Source:
        """Write the documents of a dataset.

        Args:
            dataset: dataset to read.
            advance: called with the number of tokens read since the last call.

        Raises:
            UserError: an id that the tokenizer does not give, or ids of another tokenizer.
        """
        documents_before = self.num_documents
        agreement = TokenizerAgreement(self._tokenizer)
        for first, flat, lengths in dataset.runs():
            self._check_ids(dataset, first, flat, lengths)
            self._add_run(flat, lengths, agreement)
            advance(len(flat))
        # At the end, because all documents say more than the first ones.
        self.doubts += agreement.doubts(str(dataset.bin_path))
        return {
            "path": str(dataset.bin_path),
            "bytes": dataset.bin_path.stat().st_size,
            "documents": self.num_documents - documents_before,
        }

    def _add_run(self, flat: I64, lengths: I64, agreement: TokenizerAgreement) -> None:
        """Write neighboring documents; `lengths` are their numbers of ids in `flat`."""
        # Ids and bytes of text of each document, by split.
        documents: dict[str, list[tuple[I64, int]]] = {split: [] for split in SPLITS}
        ends = np.cumsum(lengths)
        texts = decode_documents(self._tokenizer, flat, lengths)
        for start, end, text in zip(ends - lengths, ends, texts, strict=True):
            raw = text.encode()
            if not raw:
                # No tokens, or special tokens alone.
                self.skipped["empty documents"] += 1
                continue
            ids = flat[start:end]
            agreement.add(ids, text)
            split = TRAIN
            if is_held_out(raw, self._validation_fraction):
                split = VALIDATION
            documents[split].append((self._with_eos(ids), len(raw)))
        for split, in_split in documents.items():
            if in_split:
                self._writers[split].append(
                    np.concatenate([ids for ids, _ in in_split]),
                    np.array([len(ids) for ids, _ in in_split]),
                    np.array([text_bytes for _, text_bytes in in_split]),
                )
            self.num_documents += len(in_split)

    def _with_eos(self, ids: I64) -> I64:
        """Append EOS if it is missing, and count documents that are unusual."""
        eos = self._tokenizer.eos_id
        bos = self._tokenizer.bos_id
        if ids[-1] != eos:
            self.eos_added += 1
            ids = np.append(ids, eos)
        body = ids[:-1]
        if (body == eos).any() or (bos is not None and (body == bos).any()):
            self.special_inside += 1
        return ids

    def _check_ids(self, dataset: IndexedDataset, first: int, flat: I64, lengths: I64) -> None:
        """Raise UserError for an id that no text is encoded to; the run begins at document
        `first`.
        """
        mask = self._tokenizer.mask_id
        wrong = (flat < 0) | (flat >= self._num_data_ids) | (flat == mask)
        if not wrong.any():
            return
        position = int(np.argmax(wrong))  # of the first wrong id
        document = first + int(np.searchsorted(np.cumsum(lengths), position, side="right"))
        if flat[position] == mask:
            problem = "the mask token"
        else:
            problem = f"not one of the tokenizer's ids 0..{self._num_data_ids - 1}"
        raise UserError(
            f"{dataset.bin_path}: document {document} contains id {flat[position]}, {problem};"
            " --tokenizer must be the one it was made with"
        )

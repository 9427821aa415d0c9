"""A prepared corpus on disk: a folder with a manifest, shards and a copy of the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llada.arrays import I64
from llada.data.manifest import CONVERSATIONS, Manifest, ShardEntry
from llada.data.open_files import OpenFiles
from llada.data.shard_format import REPLY_FIELDS, TokenDtype, damaged, size_of
from llada.data.shard_reader import ShardReader, map_replies
from llada.errors import UserError
from llada.files import checksum
from llada.tokenizer import Tokenizer

_SIZE_THREADS = 16
"""Threads that ask for file sizes: a parallel file system takes about a millisecond for each."""


class CorpusFile(NamedTuple):
    """A file of a shard, with the size and the xxh3_64 checksum that the manifest gives for it."""

    path: Path
    bytes: int
    xxh3: str

    def check_size(self) -> None:
        """Raise UserError when the file is missing or has another size."""
        size = size_of(self.path)
        if size != self.bytes:
            raise damaged(self.path, f"{size} bytes, the manifest says {self.bytes}")

    def check_hash(self) -> None:
        """Raise UserError when the file cannot be read or has another checksum."""
        try:
            actual = checksum(self.path)["xxh3"]
        except OSError as error:
            raise damaged(self.path, f"cannot be read: {error.strerror}") from None
        if actual != self.xxh3:
            raise damaged(self.path, f"its checksum is {actual}, the manifest says {self.xxh3}")


class Corpus:
    """A prepared corpus.

    Args:
        folder: folder of the corpus.
        manifest: manifest in that folder.
        open_files: cache of its open shards; several corpora may share it.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, open_files: OpenFiles | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.open_files = open_files or OpenFiles()

    @classmethod
    def open(
        cls, folder: str | Path, check_sizes: bool = True, open_files: OpenFiles | None = None
    ) -> Corpus:
        """Open the corpus of a folder.

        Args:
            folder: folder of the corpus.
            check_sizes: whether to compare the size of every file with the manifest now; otherwise
                each file is checked when it is first read.
            open_files: cache of its open shards.

        Raises:
            UserError: the manifest cannot be used, or a file has another size.
        """
        corpus = cls(Path(folder), Manifest.load(folder), open_files)
        if check_sizes:
            with ThreadPoolExecutor(_SIZE_THREADS) as threads:
                # Iterating over the results raises the first error.
                for _ in threads.map(CorpusFile.check_size, corpus.files()):
                    pass
        return corpus

    def files(self) -> Iterator[CorpusFile]:
        """Yield every file of the shards."""
        for entry in self.manifest.shards:
            yield from self.files_of(entry)

    def files_of(self, entry: ShardEntry) -> list[CorpusFile]:
        """Return the files of one shard."""
        path = self.folder / entry.name
        files = [
            CorpusFile(Path(f"{path}.bin"), entry.bin_bytes, entry.bin_xxh3),
            CorpusFile(Path(f"{path}.idx"), entry.idx_bytes, entry.idx_xxh3),
        ]
        if self.manifest.kind == CONVERSATIONS:
            replies_bytes = 8 * len(REPLY_FIELDS) * entry.replies
            files.append(CorpusFile(Path(f"{path}.replies"), replies_bytes, entry.replies_xxh3))
        return files

    def shards(self, split: str) -> list[ShardReader]:
        """Return a reader of each shard of a split, in order; each opens when it is first read."""
        return [self._reader(entry, self.open_files) for entry in self.manifest.of(split)]

    def shard(self, entry: ShardEntry) -> ShardReader:
        """Open and check one shard; its files close with the reader.

        Raises:
            UserError: it is damaged, or its counts differ from the manifest's.
        """
        # A cache of its own, so that a pass over all shards leaves none of them open.
        reader = self._reader(entry, OpenFiles(capacity=2))
        reader.check()
        return reader

    def replies(self, entry: ShardEntry) -> I64:
        """Return the rows of REPLY_FIELDS of one shard, memory-mapped int64 [replies, 5]."""
        return map_replies(self.folder / f"{entry.name}.replies")

    def _reader(self, entry: ShardEntry, open_files: OpenFiles) -> ShardReader:
        return ShardReader(f"{self.folder}/{entry.name}", entry, self.dtype, open_files)

    @property
    def dtype(self) -> TokenDtype:
        """Dtype of the token ids on disk."""
        return np.dtype(self.manifest.dtype)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the corpus.

        Raises:
            UserError: it cannot be read, or it is not the one that the manifest names.
        """
        tokenizer = Tokenizer.load(self.tokenizer_folder)
        remedy = "put the right one back, or prepare the corpus again"
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise UserError(
                f"{self.tokenizer_folder}: not the tokenizer of this corpus, its fingerprint"
                f" differs from the manifest's; {remedy}"
            )
        # Only corpora of conversations depend on a chat template.
        expected = self.manifest.options.get("chat_template_sha256")
        template = tokenizer.chat_template or ""
        if expected is not None and expected != hashlib.sha256(template.encode()).hexdigest():
            raise UserError(
                f"{self.tokenizer_folder}: not the chat template of this corpus, its checksum"
                f" differs from the manifest's; {remedy}"
            )
        return tokenizer

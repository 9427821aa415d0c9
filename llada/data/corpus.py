"""A prepared corpus on disk: its manifest, its shards, and the checks of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from llada.data.shard_files import IndexFile, damaged, map_file, size_of
from llada.data.shards import CHUNK, I64, REPLY_FIELDS, OpenFiles, Shard, ShardEntry, map_replies
from llada.errors import UserError
from llada.files import write_atomically
from llada.tokenizer import Tokenizer

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
LEFT_OUT = "left_out.jsonl"
"""What was left out of a corpus, one object a line; there is none where nothing was."""
TRAIN, VALIDATION = SPLITS = ("train", "validation")
CORPUS_FILES = (
    MANIFEST,
    "tokenizer",
    LEFT_OUT,
    *(f"{split}-*.{suffix}" for split in SPLITS for suffix in ("bin", "idx", "replies")),
)
"""Patterns of all that a corpus holds, for `llada.outputs.new_folder`."""
TEXT, CONVERSATIONS = "text", "conversations"
"""Kinds of corpora: documents of `llada data prepare`, conversations of `llada data prepare-sft`.
"""
_AT_ONCE = 16
"""Files whose size is asked at a time: a parallel file system takes about a millisecond for each.
"""


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus holds and how it was made.

    Attributes:
        format_version: FORMAT_VERSION of the tool that wrote it.
        tool_version: version of that tool.
        kind: TEXT or CONVERSATIONS.
        dtype: of the token ids, by name.
        vocab_size, rows, mask_id, eos_id, tokenizer_fingerprint: of the tokenizer.
        options: settings of the preparation.
        sources: {path, bytes, documents} of each file read.
        skipped: files, lines and documents left out, by reason.
        shards: in the order in which they are read.
        noted: documents that were counted and kept, by reason.
        encoders: what turned text into ids, and how many units of work it did.
        plan: digest of inputs and settings, by which a repeated preparation knows its own; empty if
            there is none.
    """

    format_version: int
    tool_version: str
    kind: str
    dtype: str
    vocab_size: int
    rows: int
    mask_id: int
    eos_id: int
    tokenizer_fingerprint: str
    options: dict[str, Any]
    sources: list[dict[str, Any]]
    skipped: dict[str, int]
    shards: list[ShardEntry]
    noted: dict[str, int] = field(default_factory=dict)
    encoders: dict[str, int] = field(default_factory=dict)
    plan: str = ""

    def save(self, folder: str | Path) -> None:
        """Write manifest.json with a checksum over its content; it appears complete or not
        at all.
        """
        path = Path(folder) / MANIFEST
        content = asdict(self)
        content["checksum"] = hashlib.sha256(_canonical(content)).hexdigest()
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read manifest.json. Raises UserError when it is missing, damaged, edited or of a newer
        tool.
        """
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{folder}: not a prepared corpus (no {MANIFEST}); make one with `llada data"
                " prepare`"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise damaged(path, "not JSON") from None
        if not isinstance(content, dict) or "checksum" not in content:
            raise damaged(path, "no checksum")
        checksum = content.pop("checksum")
        if checksum != hashlib.sha256(_canonical(content)).hexdigest():
            raise damaged(path, "its checksum does not match its content")
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {content.get('format_version')} is not {FORMAT_VERSION},"
                " the one this version reads"
            )
        if set(content) != {own.name for own in fields(cls)}:
            raise damaged(path, "its fields are not those of a manifest")
        try:
            content["shards"] = [ShardEntry(**entry) for entry in content["shards"]]
        except TypeError:
            raise damaged(path, "the fields of a shard are wrong") from None
        return cls(**content)

    def of(self, split: str) -> list[ShardEntry]:
        """The shards of a split, in order."""
        return [entry for entry in self.shards if entry.split == split]

    def fingerprint(self, split: str) -> str:
        """Of a split's content: token ids, document boundaries and the tokenizer's meaning of the
        ids; not of its path.
        """
        parts = [
            self.tokenizer_fingerprint,
            *(
                f"{entry.bin_xxh3} {entry.idx_xxh3} {entry.replies_xxh3}".rstrip()
                for entry in self.of(split)
            ),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def totals(self, split: str) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text of a split."""
        entries = self.of(split)
        return (
            sum(e.documents for e in entries),
            sum(e.tokens for e in entries),
            sum(e.text_bytes for e in entries),
        )


class Corpus:
    """A prepared corpus: a folder with a manifest, shards and a copy of the tokenizer.

    Args:
        folder: of the corpus.
        manifest: of that folder.
        open_files: where its shards stay open; several corpora may share it.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, open_files: OpenFiles | None = None
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.open_files = open_files or OpenFiles()

    @classmethod
    def open(
        cls, folder: str | Path, check_sizes: bool = True, open_files: OpenFiles | None = None
    ) -> Corpus:
        """Read the manifest and compare the size of every file with it. Raises UserError on the
        first difference.

        Without `check_sizes` no file but the manifest is looked at; each is checked when it is
        first read.
        """
        corpus = cls(Path(folder), Manifest.load(folder), open_files)
        if check_sizes:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for _ in pool.map(_File.check_size, corpus.files()):
                    pass
        return corpus

    def files(self) -> Iterator[_File]:
        """Every file of the shards with what the manifest says of it."""
        for entry in self.manifest.shards:
            yield from self.files_of(entry)

    def files_of(self, entry: ShardEntry) -> list[_File]:
        """The files of one shard."""
        path = self.folder / entry.name
        files = [
            _File(Path(f"{path}.bin"), entry.bin_bytes, entry.bin_xxh3),
            _File(Path(f"{path}.idx"), entry.idx_bytes, entry.idx_xxh3),
        ]
        if self.manifest.kind == CONVERSATIONS:
            files.append(
                _File(
                    Path(f"{path}.replies"),
                    8 * len(REPLY_FIELDS) * entry.replies,
                    entry.replies_xxh3,
                )
            )
        return files

    def replies(self, entry: ShardEntry) -> I64:
        """The rows of REPLY_FIELDS of one shard of conversations, memory-mapped int64
        [replies, 5].
        """
        return map_replies(self.folder / f"{entry.name}.replies")

    def shards(self, split: str) -> Shards:
        """The split's shards in the manifest's order; each is opened when it is first read."""
        return Shards(self, split)

    def shard(self, entry: ShardEntry) -> Shard:
        """Open one shard. Raises UserError when it is damaged or holds other counts than the
        manifest says.
        """
        shard = Shard(self.folder / entry.name)
        self.check_counts(entry, shard.idx_path, shard.num_documents, shard.num_tokens, shard.dtype)
        return shard

    def check_counts(
        self, entry: ShardEntry, path: Path, documents: int, tokens: int, dtype: np.dtype[Any]
    ) -> None:
        """Raises UserError, naming `path`, when a shard holds something else than the manifest
        says.
        """
        for what, found, expected in (
            ("documents", documents, entry.documents),
            ("tokens", tokens, entry.tokens),
            ("dtype", dtype.name, self.manifest.dtype),
        ):
            if found != expected:
                raise damaged(path, f"{what}: {found}, the manifest says {expected}")

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the token ids are of.

        Raises:
            UserError: it cannot be read, or it is not the one that the manifest names.
        """
        tokenizer = Tokenizer.load(self.tokenizer_folder)
        template = self.manifest.options.get("chat_template_sha256")
        remedy = "put the right one back, or prepare the corpus again"
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise UserError(
                f"{self.tokenizer_folder}: not the tokenizer of this corpus, its fingerprint"
                f" differs from the manifest's; {remedy}"
            )
        if (
            template is not None
            and template != hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()
        ):
            raise UserError(
                f"{self.tokenizer_folder}: not the chat template of this corpus, its checksum"
                f" differs from the manifest's; {remedy}"
            )
        return tokenizer


class Shards:
    """The shards of one split of a corpus, in the manifest's order. Nothing is opened before it is
    read, and of many only some stay open (OpenFiles), so ten thousand cost no more to open than the
    manifest.

    Every reading raises UserError when it meets a file that is missing, damaged or of other counts
    than the manifest says.

    Attributes:
        entries: what the manifest says of each.
    """

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.entries = corpus.manifest.of(split)
        self._corpus, self._files = corpus, corpus.open_files
        self._dtype = np.dtype(corpus.manifest.dtype)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Shard:
        entry = self.entries[i]
        shard = self._files.shard(self._path(entry))
        self._corpus.check_counts(
            entry, shard.idx_path, shard.num_documents, shard.num_tokens, shard.dtype
        )
        return shard

    def __iter__(self) -> Iterator[Shard]:
        for i in range(len(self)):
            yield self[i]

    def tokens(self, i: int, start: int, stop: int) -> I64:
        """A copy of the token ids at start..stop-1 of shard i; opens its token file only."""
        entry = self.entries[i]
        path = f"{self._path(entry)}.bin"
        file = self._files.tokens(path, self._dtype, entry.bin_bytes)
        if file.num_tokens != entry.tokens:
            self._corpus.check_counts(
                entry, Path(path), entry.documents, file.num_tokens, self._dtype
            )
        return file.tokens(start, stop)

    def document_starts(self, i: int, start: int, stop: int) -> I64:
        """Offsets (in tokens, from the start of shard i) of the documents that start strictly
        inside (start, stop); opens its index only.
        """
        return self._index(i).document_starts(start, stop)

    def document_at(self, i: int, position: int) -> int:
        """The document of shard i that holds the token at `position`; opens its index only."""
        return self._index(i).document_at(position)

    def _index(self, i: int) -> IndexFile:
        entry = self.entries[i]
        path = f"{self._path(entry)}.idx"
        index = self._files.index(path, entry.bin_bytes)
        if index.num_documents != entry.documents or index.dtype != self._dtype:
            self._corpus.check_counts(
                entry, Path(path), index.num_documents, entry.tokens, index.dtype
            )
        return index

    def _path(self, entry: ShardEntry) -> str:
        return f"{self._corpus.folder}/{entry.name}"


class _File(NamedTuple):
    path: Path
    bytes: int
    xxh3: str

    def check_size(self) -> None:
        size = size_of(self.path)
        if size != self.bytes:
            raise damaged(self.path, f"{size} bytes, the manifest says {self.bytes}")

    def check_hash(self) -> None:
        digest = xxhash.xxh3_64()
        try:
            with open(self.path, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise damaged(self.path, f"cannot be read: {error.strerror}") from None
        if digest.hexdigest() != self.xxh3:
            raise damaged(
                self.path, f"its checksum is {digest.hexdigest()}, the manifest says {self.xxh3}"
            )


def verify_corpus(
    folder: str | Path,
    hashes: bool = True,
    workers: int = 1,
    progress: Callable[[ShardEntry], object] = lambda _: None,
) -> list[str]:
    """Everything that is wrong with a prepared corpus, one line each, shards in order; empty when
    it is sound.

    Args:
        folder: of the corpus.
        hashes: compare checksums too. Without them, only what contradicts itself is found.
        workers: shards looked at at a time, by threads.
        progress: called with each shard when it is done.
    """
    try:
        corpus = Corpus(Path(folder), Manifest.load(folder))
    except UserError as error:
        return [str(error)]

    def look(entry: ShardEntry) -> list[str]:
        found = _shard_problems(corpus, entry, hashes)
        progress(entry)
        return found

    # hashing and numpy let go of the interpreter's lock
    with ThreadPoolExecutor(workers) as threads:
        return [line for found in threads.map(look, corpus.manifest.shards) for line in found]


def _shard_problems(corpus: Corpus, entry: ShardEntry, hashes: bool) -> list[str]:
    """Of the files of one shard, then of what they hold."""
    found: list[str] = []
    for file in corpus.files_of(entry):
        try:
            file.check_size()
            if hashes:
                file.check_hash()
        except UserError as error:
            found.append(str(error))
    damaged_files = bool(found)
    try:
        shard = corpus.shard(entry)
    except UserError as error:
        return found if damaged_files else [str(error)]
    found += _index_problems(shard) or _token_problems(shard, corpus.manifest, entry)
    if corpus.manifest.kind == CONVERSATIONS and not damaged_files:
        found += _reply_problems(
            shard, corpus.replies(entry), corpus.folder / f"{entry.name}.replies"
        )
    return found


def _index_problems(shard: Shard) -> list[str]:
    """Whether the documents tile the token file in order."""
    expected = 0
    for first in range(0, shard.num_documents, CHUNK):
        lengths = shard.lengths[first : first + CHUNK].astype(np.int64)
        pointers = shard.pointers[first : first + CHUNK].astype(np.int64)
        indices = shard.indices[first : first + len(lengths)].astype(np.int64)
        ends = expected + np.cumsum(lengths) * shard.dtype.itemsize
        starts = np.concatenate([[expected], ends[:-1]])
        wrong = (lengths < 1) | (pointers != starts) | (indices != first + np.arange(len(indices)))
        if wrong.any():
            return [
                f"{shard.idx_path}: document {first + int(np.argmax(wrong))} does not start where"
                " the one before it ends"
            ]
        expected = int(ends[-1])
    if int(shard.indices[-1]) != shard.num_documents:
        return [
            f"{shard.idx_path}: the last document index is {int(shard.indices[-1])}, not"
            f" {shard.num_documents}"
        ]
    return []


def _reply_problems(shard: Shard, replies: I64, path: Path) -> list[str]:
    """Whether every document has replies, in order, whose offsets lie inside it; the index is
    sound.
    """
    owner, history_end, turn_start, response_start, turn_end = replies.T
    in_order = (
        len(owner) > 0
        and (np.diff(owner, prepend=0) >= 0).all()
        and (np.unique(owner) == np.arange(shard.num_documents)).all()
    )
    if not in_order:
        return [
            f"{path}: its replies are not those of documents 0..{shard.num_documents - 1} in order"
        ]
    ends = shard.lengths[:][owner]
    prompt = history_end + response_start - turn_start
    in_place = (
        (history_end >= 0)
        & (history_end <= turn_start)
        & (turn_start <= response_start)
        & (response_start < turn_end)
    )
    wrong = ~(in_place & (prompt > 0) & (turn_end <= ends))
    return (
        [f"{path}: reply {int(np.argmax(wrong))} does not lie inside its document"]
        if wrong.any()
        else []
    )


def _token_problems(shard: Shard, manifest: Manifest, entry: ShardEntry) -> list[str]:
    """Ids outside the vocabulary, the mask token, and documents that do not end with EOS; the index
    is sound.
    """
    counts = {"past": 0, "mask": 0, "open": 0}
    firsts: dict[str, int] = {}
    highest = 0

    def note(kind: str, wrong: npt.NDArray[np.bool_], first: int) -> None:
        if wrong.any():
            counts[kind] += int(wrong.sum())
            firsts.setdefault(kind, first + int(np.argmax(wrong)))

    for start in range(0, shard.num_tokens, CHUNK):
        tokens = shard.tokens(start, min(start + CHUNK, shard.num_tokens))
        highest = max(highest, int(tokens.max()))
        note("past", (tokens < 0) | (tokens >= manifest.vocab_size), start)
        note("mask", tokens == manifest.mask_id, start)
    stored = map_file(shard.bin_path, shard.dtype)
    for first in range(0, shard.num_documents, CHUNK):
        lengths = shard.lengths[first : first + CHUNK].astype(np.int64)
        ends = (
            shard.pointers[first : first + CHUNK].astype(np.int64) // shard.dtype.itemsize + lengths
        )
        note("open", stored[ends - 1] != manifest.eos_id, first)
    found = []
    if counts["past"]:
        found.append(
            f"{shard.bin_path}: {counts['past']} ids are not in 0..{manifest.vocab_size - 1}, the"
            f" first at token {firsts['past']}"
        )
    if counts["mask"]:
        found.append(
            f"{shard.bin_path}: {counts['mask']} ids are the mask token {manifest.mask_id}, the"
            f" first at token {firsts['mask']}"
        )
    if counts["open"]:
        found.append(
            f"{shard.bin_path}: {counts['open']} documents do not end with EOS {manifest.eos_id},"
            f" the first is document {firsts['open']}"
        )
    if highest != entry.max_token_id:
        found.append(
            f"{shard.bin_path}: the highest id is {highest}, the manifest says {entry.max_token_id}"
        )
    return found

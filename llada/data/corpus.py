"""A prepared corpus on disk: its manifest, its shards, and the checks of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from llada.data.shards import CHUNK, I64, REPLY_FIELDS, Shard, ShardEntry, damaged, map_replies, size_of
from llada.errors import UserError
from llada.files import write_atomically

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TEXT, CONVERSATIONS = "text", "conversations"
"""Kinds of corpora: documents of `llada data prepare`, conversations of `llada data prepare-sft`."""


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
        skipped: documents left out, by reason.
        shards: in the order in which they are read.
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

    def save(self, folder: str | Path) -> None:
        """Write manifest.json with a checksum over its content; it appears complete or not at all."""
        path = Path(folder) / MANIFEST
        content = asdict(self)
        content["checksum"] = hashlib.sha256(_canonical(content)).hexdigest()
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read manifest.json. Raises UserError when it is missing, damaged, edited or of a newer tool."""
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{folder}: not a prepared corpus (no {MANIFEST}); make one with `llada data prepare`") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise damaged(path, "not JSON") from None
        if not isinstance(content, dict) or "checksum" not in content:
            raise damaged(path, "no checksum")
        checksum = content.pop("checksum")
        if checksum != hashlib.sha256(_canonical(content)).hexdigest():
            raise damaged(path, "its checksum does not match its content")
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: format_version {content.get('format_version')} is not {FORMAT_VERSION}, the one this version reads")
        if set(content) != {field.name for field in fields(cls)}:
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
        """Of a split's content: token ids, document boundaries and the tokenizer's meaning of the ids; not of its path."""
        parts = [
            self.tokenizer_fingerprint,
            *(f"{entry.bin_xxh3} {entry.idx_xxh3} {entry.replies_xxh3}".rstrip() for entry in self.of(split)),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def totals(self, split: str) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text of a split."""
        entries = self.of(split)
        return sum(e.documents for e in entries), sum(e.tokens for e in entries), sum(e.text_bytes for e in entries)


class Corpus:
    """A prepared corpus: a folder with a manifest, shards and a copy of the tokenizer."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Read the manifest and compare the size of every file with it. Raises UserError on the first difference."""
        corpus = cls(Path(folder), Manifest.load(folder))
        for file in corpus.files():
            file.check_size()
        return corpus

    def files(self) -> Iterator[_File]:
        """Every file of the shards with what the manifest says of it."""
        for entry in self.manifest.shards:
            yield from self.files_of(entry)

    def files_of(self, entry: ShardEntry) -> list[_File]:
        """The files of one shard."""
        path = self.folder / entry.name
        files = [_File(Path(f"{path}.bin"), entry.bin_bytes, entry.bin_xxh3), _File(Path(f"{path}.idx"), entry.idx_bytes, entry.idx_xxh3)]
        if self.manifest.kind == CONVERSATIONS:
            files.append(_File(Path(f"{path}.replies"), 8 * len(REPLY_FIELDS) * entry.replies, entry.replies_xxh3))
        return files

    def replies(self, entry: ShardEntry) -> I64:
        """The rows of REPLY_FIELDS of one shard of conversations, memory-mapped int64 [replies, 5]."""
        return map_replies(self.folder / f"{entry.name}.replies")

    def shards(self, split: str) -> list[Shard]:
        """The split's shards, opened, in the manifest's order."""
        return [self.shard(entry) for entry in self.manifest.of(split)]

    def shard(self, entry: ShardEntry) -> Shard:
        """Open one shard. Raises UserError when it is damaged or holds other counts than the manifest says."""
        shard = Shard(self.folder / entry.name)
        for what, found, expected in (
            ("documents", shard.num_documents, entry.documents),
            ("tokens", shard.num_tokens, entry.tokens),
            ("dtype", shard.dtype.name, self.manifest.dtype),
        ):
            if found != expected:
                raise damaged(shard.idx_path, f"{what}: {found}, the manifest says {expected}")
        return shard

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"


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
            raise damaged(self.path, f"its checksum is {digest.hexdigest()}, the manifest says {self.xxh3}")


def problems(folder: str | Path, hashes: bool = True) -> list[str]:
    """Everything that is wrong with a prepared corpus, one line each; empty when it is sound.

    Args:
        folder: of the corpus.
        hashes: compare checksums too. Without them, only what contradicts itself is found.
    """
    try:
        corpus = Corpus(Path(folder), Manifest.load(folder))
    except UserError as error:
        return [str(error)]
    found: list[str] = []
    for entry in corpus.manifest.shards:
        damaged_files: list[str] = []
        for file in corpus.files_of(entry):
            try:
                file.check_size()
                if hashes:
                    file.check_hash()
            except UserError as error:
                damaged_files.append(str(error))
        found += damaged_files
        try:
            shard = corpus.shard(entry)
        except UserError as error:
            found += [] if damaged_files else [str(error)]
            continue
        found += _index_problems(shard) or _token_problems(shard, corpus.manifest, entry)
        if corpus.manifest.kind == CONVERSATIONS and not damaged_files:
            found += _reply_problems(shard, corpus.replies(entry), corpus.folder / f"{entry.name}.replies")
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
            return [f"{shard.idx_path}: document {first + int(np.argmax(wrong))} does not start where the one before it ends"]
        expected = int(ends[-1])
    if int(shard.indices[-1]) != shard.num_documents:
        return [f"{shard.idx_path}: the last document index is {int(shard.indices[-1])}, not {shard.num_documents}"]
    return []


def _reply_problems(shard: Shard, replies: I64, path: Path) -> list[str]:
    """Whether every document has replies, in order, whose offsets lie inside it; the index is sound."""
    owner, history_end, turn_start, response_start, turn_end = replies.T
    in_order = len(owner) > 0 and (np.diff(owner, prepend=0) >= 0).all() and (np.unique(owner) == np.arange(shard.num_documents)).all()
    if not in_order:
        return [f"{path}: its replies are not those of documents 0..{shard.num_documents - 1} in order"]
    ends = shard.lengths[:][owner]
    wrong = ~(
        (history_end > 0) & (history_end <= turn_start) & (turn_start <= response_start) & (response_start < turn_end) & (turn_end <= ends)
    )
    return [f"{path}: reply {int(np.argmax(wrong))} does not lie inside its document"] if wrong.any() else []


def _token_problems(shard: Shard, manifest: Manifest, entry: ShardEntry) -> list[str]:
    """Ids outside the vocabulary, the mask token, and documents that do not end with EOS; the index is sound."""
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
    for first in range(0, shard.num_documents, CHUNK):
        lengths = shard.lengths[first : first + CHUNK].astype(np.int64)
        ends = shard.pointers[first : first + CHUNK].astype(np.int64) // shard.dtype.itemsize + lengths
        note("open", shard._tokens[ends - 1] != manifest.eos_id, first)
    found = []
    if counts["past"]:
        found.append(f"{shard.bin_path}: {counts['past']} ids are not in 0..{manifest.vocab_size - 1}, the first at token {firsts['past']}")
    if counts["mask"]:
        found.append(f"{shard.bin_path}: {counts['mask']} ids are the mask token {manifest.mask_id}, the first at token {firsts['mask']}")
    if counts["open"]:
        found.append(
            f"{shard.bin_path}: {counts['open']} documents do not end with EOS {manifest.eos_id}, the first is document {firsts['open']}"
        )
    if highest != entry.max_token_id:
        found.append(f"{shard.bin_path}: the highest id is {highest}, the manifest says {entry.max_token_id}")
    return found

"""A prepared corpus on disk: Megatron's indexed dataset (.bin/.idx) shards, their manifest, and the checks of both.

A shard is two files. NAME.bin holds the token ids, one document after the other, each document its tokens and one EOS.
NAME.idx, little-endian: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code (4 int32, 8 uint16), u64 sequences, u64 document
indices (sequences + 1), then int32 lengths, int64 byte offsets and int64 document indices. A sequence is one document.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from llada.errors import UserError

I64 = npt.NDArray[np.int64]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 1 << 22
"""Tokens or documents handled at a time, and bytes hashed at a time: bounds the memory of writing an index and of checks."""


def token_dtype(rows: int) -> np.dtype[Any]:
    """The dtype of token ids for a vocabulary of `rows` rows: uint16 below 65500, else int32 (Megatron's rule)."""
    return _DTYPES[8] if rows < 65500 else _DTYPES[4]


class _HashedFile:
    """A file under a temporary name whose checksum and size are known when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.bytes = 0
        self._published = False
        self._hash = xxhash.xxh3_64()
        self._file: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 (outlives this method; closed by finish or discard)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def finish(self) -> str:
        """Everything is on the disk, still under the temporary name; returns the checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def publish(self) -> None:
        os.replace(self.partial, self.path)
        self._published = True

    def discard(self) -> None:
        """Leave nothing of this file, published or not; a file that had the name before is left alone."""
        self._file.close()
        self.partial.unlink(missing_ok=True)
        if self._published:
            self.path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; checksums are xxh3_64 in hexadecimal."""

    name: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3: str
    idx_xxh3: str


class ShardWriter:
    """Writes one shard. The files appear under their names when it closes; an exception before that leaves nothing.

    Args:
        folder: existing folder of the corpus.
        name: of the shard, unique in the folder.
        dtype: from `token_dtype`.
        split: recorded in the entry.

    Attributes:
        tokens, documents: written so far.
    """

    def __init__(self, folder: str | Path, name: str, dtype: npt.DTypeLike, split: str) -> None:
        self.folder, self.name, self.dtype, self.split = Path(folder), name, np.dtype(dtype), split
        if self.dtype not in _CODES:
            raise ValueError(f"token dtype {self.dtype} is not one of {', '.join(map(str, _CODES))}")
        self.tokens = self.documents = 0
        self._text_bytes, self._max_token_id = 0, 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._entry: ShardEntry | None = None
        self._bin = _HashedFile(self.folder / f"{name}.bin")
        self._idx: _HashedFile | None = None

    def append(self, flat_tokens: npt.ArrayLike, lengths: npt.ArrayLike, text_bytes: int) -> None:
        """Add documents.

        Args:
            flat_tokens: their token ids one after the other, each document's EOS in place.
            lengths: tokens of each document, EOS included, all >= 1.
            text_bytes: UTF-8 bytes of their text.

        Raises:
            ValueError: lengths that do not add up, an id that the dtype cannot hold.
        """
        flat, counts = np.asarray(flat_tokens), np.asarray(lengths)
        if self._entry is not None:
            raise ValueError(f"shard {self.name} is closed")
        if counts.sum() != flat.size or (counts.size and not 1 <= counts.min() <= counts.max() <= np.iinfo(np.int32).max):
            raise ValueError(f"shard {self.name}: document lengths must be >= 1 and add up to the {flat.size} tokens")
        if not flat.size:
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise ValueError(f"shard {self.name}: token ids {low}..{high} do not fit {self.dtype}")
        self._bin.write(flat.astype(self.dtype).tobytes())
        self._lengths.append(counts.astype("<i4"))
        self.tokens += flat.size
        self.documents += counts.size
        self._text_bytes += text_bytes
        self._max_token_id = max(self._max_token_id, high)

    def close(self) -> ShardEntry:
        """Write the index, put both files in place and return the manifest's entry; a second call returns it again."""
        if self._entry is not None:
            return self._entry
        try:
            bin_xxh3 = self._bin.finish()
            self._idx = _HashedFile(self.folder / f"{self.name}.idx")
            for part in self._index():
                self._idx.write(part)
            idx_xxh3 = self._idx.finish()
            self._bin.publish()
            self._idx.publish()
            _sync_folder(self.folder)
        except BaseException:
            self.abort()
            raise
        self._lengths.clear()
        self._entry = ShardEntry(
            name=self.name,
            split=self.split,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            max_token_id=self._max_token_id,
            bin_bytes=self._bin.bytes,
            idx_bytes=self._idx.bytes,
            bin_xxh3=bin_xxh3,
            idx_xxh3=idx_xxh3,
        )
        return self._entry

    def abort(self) -> None:
        """Remove what was written."""
        self._bin.discard()
        if self._idx is not None:
            self._idx.discard()

    def _index(self) -> Iterator[bytes]:
        yield _HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1)
        for lengths in self._lengths:
            yield lengths.tobytes()
        offset = 0
        for lengths in self._lengths:
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes()
            offset = int(ends[-1])
        for first in range(0, self.documents + 1, _CHUNK):
            yield np.arange(first, min(first + _CHUNK, self.documents + 1), dtype="<i8").tobytes()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._entry is None:
            if kind is None:
                self.close()
            else:
                self.abort()


class Shard:
    """A shard, memory-mapped.

    Args:
        path: of both files, without .bin and .idx.

    Attributes:
        num_tokens, num_documents: its size.
        lengths, pointers, indices: the index's three arrays as stored; its odd header leaves them unaligned in memory, and
            numpy copies an unaligned array whole before it searches or computes. Slice them.

    Raises:
        UserError: a missing file, a header or a size that cannot be right.
    """

    def __init__(self, path: str | Path) -> None:
        self.bin_path, self.idx_path = Path(f"{path}.bin"), Path(f"{path}.idx")
        index = _map(self.idx_path, np.dtype(np.uint8))
        if index.size < _HEADER.size:
            raise _damaged(self.idx_path, f"{index.size} bytes, shorter than its header")
        magic, version, code, n, entries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _DTYPES or entries != n + 1:
            raise _damaged(self.idx_path, "its header is not that of an index with one sequence a document")
        expected = _HEADER.size + 4 * n + 8 * n + 8 * (n + 1)
        if index.size != expected:
            raise _damaged(self.idx_path, f"{index.size} bytes, {n} documents need {expected}")
        self.dtype = _DTYPES[code]
        self.num_documents = int(n)
        self.lengths = np.frombuffer(index, "<i4", n, _HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", n, _HEADER.size + 4 * n)
        self.indices = np.frombuffer(index, "<i8", n + 1, _HEADER.size + 12 * n)
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if n else 0
        size = _size(self.bin_path)
        if size != end:
            raise _damaged(self.bin_path, f"{size} bytes, its index ends at {end}")
        self._tokens = _map(self.bin_path, self.dtype)
        self.num_tokens = int(self._tokens.size)

    def tokens(self, start: int, stop: int) -> I64:
        """A copy of the token ids at start..stop-1."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self.bin_path}: tokens {start}..{stop} of {self.num_tokens}")
        return self._tokens[start:stop].astype(np.int64)

    def document_starts(self, start: int, stop: int) -> I64:
        """Offsets (in tokens, from the shard's start) of the documents that start strictly inside (start, stop)."""
        item = self.dtype.itemsize
        first = bisect.bisect_right(self.pointers, start * item)  # a search that copies nothing, see `pointers`
        last = bisect.bisect_left(self.pointers, stop * item, lo=first)
        return self.pointers[first:last].astype(np.int64) // item


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: truncated or altered ({why}); prepare the corpus again")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: truncated or altered, cannot be read ({error.strerror}); prepare the corpus again") from None


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if _size(path) == 0:
        return np.empty(0, dtype)
    try:
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise UserError(f"{path}: truncated or altered, cannot be read ({error.strerror}); prepare the corpus again") from None


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus holds and how it was made.

    Attributes:
        format_version: FORMAT_VERSION of the tool that wrote it.
        tool_version: version of that tool.
        dtype: of the token ids, by name.
        vocab_size, rows, mask_id, eos_id, tokenizer_fingerprint: of the tokenizer.
        options: settings of the preparation.
        sources: {path, bytes, documents} of each file read.
        skipped: documents left out, by reason.
        shards: in the order in which they are read.
    """

    format_version: int
    tool_version: str
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
        partial = path.with_name(f"{MANIFEST}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

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
            raise _damaged(path, "not JSON") from None
        if not isinstance(content, dict) or "checksum" not in content:
            raise _damaged(path, "no checksum")
        checksum = content.pop("checksum")
        if checksum != hashlib.sha256(_canonical(content)).hexdigest():
            raise _damaged(path, "its checksum does not match its content")
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: format_version {content.get('format_version')} is not {FORMAT_VERSION}, the one this version reads")
        if set(content) != {field.name for field in fields(cls)}:
            raise _damaged(path, "its fields are not those of a manifest")
        try:
            content["shards"] = [ShardEntry(**entry) for entry in content["shards"]]
        except TypeError:
            raise _damaged(path, "the fields of a shard are wrong") from None
        return cls(**content)

    def of(self, split: str) -> list[ShardEntry]:
        """The shards of a split, in order."""
        return [entry for entry in self.shards if entry.split == split]

    def fingerprint(self, split: str) -> str:
        """Of a split's content: token ids, document boundaries and the tokenizer's meaning of the ids; not of its path."""
        parts = [self.tokenizer_fingerprint, *(f"{entry.bin_xxh3} {entry.idx_xxh3}" for entry in self.of(split))]
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
        """The two files of one shard."""
        path = self.folder / entry.name
        return [_File(Path(f"{path}.bin"), entry.bin_bytes, entry.bin_xxh3), _File(Path(f"{path}.idx"), entry.idx_bytes, entry.idx_xxh3)]

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
                raise _damaged(shard.idx_path, f"{what}: {found}, the manifest says {expected}")
        return shard

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"


class _File(NamedTuple):
    path: Path
    bytes: int
    xxh3: str

    def check_size(self) -> None:
        size = _size(self.path)
        if size != self.bytes:
            raise _damaged(self.path, f"{size} bytes, the manifest says {self.bytes}")

    def check_hash(self) -> None:
        digest = xxhash.xxh3_64()
        try:
            with open(self.path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise _damaged(self.path, f"cannot be read: {error.strerror}") from None
        if digest.hexdigest() != self.xxh3:
            raise _damaged(self.path, f"its checksum is {digest.hexdigest()}, the manifest says {self.xxh3}")


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
        damaged: list[str] = []
        for file in corpus.files_of(entry):
            try:
                file.check_size()
                if hashes:
                    file.check_hash()
            except UserError as error:
                damaged.append(str(error))
        found += damaged
        try:
            shard = corpus.shard(entry)
        except UserError as error:
            found += [] if damaged else [str(error)]
            continue
        found += _index_problems(shard) or _token_problems(shard, corpus.manifest, entry)
    return found


def _index_problems(shard: Shard) -> list[str]:
    """Whether the documents tile the token file in order."""
    expected = 0
    for first in range(0, shard.num_documents, _CHUNK):
        lengths = shard.lengths[first : first + _CHUNK].astype(np.int64)
        pointers = shard.pointers[first : first + _CHUNK].astype(np.int64)
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


def _token_problems(shard: Shard, manifest: Manifest, entry: ShardEntry) -> list[str]:
    """Ids outside the vocabulary, the mask token, and documents that do not end with EOS; the index is sound."""
    counts = {"past": 0, "mask": 0, "open": 0}
    firsts: dict[str, int] = {}
    highest = 0

    def note(kind: str, wrong: npt.NDArray[np.bool_], first: int) -> None:
        if wrong.any():
            counts[kind] += int(wrong.sum())
            firsts.setdefault(kind, first + int(np.argmax(wrong)))

    for start in range(0, shard.num_tokens, _CHUNK):
        tokens = shard.tokens(start, min(start + _CHUNK, shard.num_tokens))
        highest = max(highest, int(tokens.max()))
        note("past", (tokens < 0) | (tokens >= manifest.vocab_size), start)
        note("mask", tokens == manifest.mask_id, start)
    for first in range(0, shard.num_documents, _CHUNK):
        lengths = shard.lengths[first : first + _CHUNK].astype(np.int64)
        ends = shard.pointers[first : first + _CHUNK].astype(np.int64) // shard.dtype.itemsize + lengths
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

"""A small corpus for tests of the format, and ways to damage it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from llada.data.manifest import FORMAT_VERSION, TEXT, Manifest, ShardEntry
from llada.data.shard_writer import ShardWriter

EOS = 9
MASK = 10
VOCABULARY = 11
UINT16 = np.dtype("<u2")
INT32 = np.dtype("<i4")

TRAIN = [[1, 2, 3, EOS], [EOS], [4, EOS], [5, 6, 7, 8, EOS]]
VALIDATION = [[8, EOS], [1, 1, EOS]]


def join(documents: list[list[int]]) -> list[int]:
    """The token ids of documents one after the other."""
    return list(chain.from_iterable(documents))


def write_shard(
    folder: Path,
    documents: list[list[int]],
    name: str = "train_00000",
    dtype: npt.DTypeLike = UINT16,
    split: str = "train",
    parts: int = 1,
) -> ShardEntry:
    """Write documents in `parts` calls and return the manifest's entry."""
    with ShardWriter(folder, name, dtype, split) as writer:
        for part in range(parts):
            start = part * len(documents) // parts
            stop = (part + 1) * len(documents) // parts
            chosen = documents[start:stop]
            writer.append(
                np.array(join(chosen), dtype=np.int64),
                [len(document) for document in chosen],
                5 * len(chosen),
            )
        return writer.close()


def make_manifest(shards: Iterable[ShardEntry]) -> Manifest:
    """A manifest of shards of the vocabulary above."""
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version="0",
        kind=TEXT,
        dtype="uint16",
        vocab_size=VOCABULARY,
        padded_vocab_size=128,
        mask_id=MASK,
        eos_id=EOS,
        tokenizer_fingerprint="f" * 64,
        options={"validation_fraction": 0.005},
        sources=[{"path": "a.txt", "bytes": 10, "documents": 2}],
        skipped={"empty": 1},
        shards=list(shards),
    )


def write_corpus(folder: Path) -> None:
    """Write a sound corpus: two training shards and one of validation."""
    entries = [
        write_shard(folder, TRAIN),
        write_shard(folder, VALIDATION, "validation_00000", split="validation"),
        write_shard(folder, TRAIN[::-1], "train_00001"),
    ]
    make_manifest(entries).save(folder)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Replace bytes of a file from `offset` on."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte of a file."""
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def reseal(folder: Path, name: str) -> None:
    """Write the present sizes and checksums of a shard's files into the manifest, as a tool with a
    defect would have.
    """
    manifest = Manifest.load(folder)
    changes: dict[str, int | str] = {}
    for suffix in ("bin", "idx"):
        content = (folder / f"{name}.{suffix}").read_bytes()
        changes[f"{suffix}_bytes"] = len(content)
        changes[f"{suffix}_xxh3"] = xxhash.xxh3_64_hexdigest(content)
    shards = [
        replace(entry, **changes) if entry.name == name else entry for entry in manifest.shards
    ]
    replace(manifest, shards=shards).save(folder)

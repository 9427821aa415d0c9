"""The manifest of a prepared corpus: what is in the folder, how it was made, and its checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llada.data.shard_format import DTYPES, damaged
from llada.errors import UserError
from llada.files import write_atomically

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
LEFT_OUT = "left_out.jsonl"
"""List of what was left out of a corpus, one JSON object per line; missing if nothing was."""

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)

CORPUS_FILES = (
    MANIFEST,
    "tokenizer",
    LEFT_OUT,
    *(f"{split}-*.{suffix}" for split in SPLITS for suffix in ("bin", "idx", "replies")),
)
"""Patterns of all files of a corpus, for `llada.outputs.new_folder`."""

TEXT = "text"
"""Kind of the corpora of `llada data prepare`, whose documents are text."""
CONVERSATIONS = "conversations"
"""Kind of the corpora of `llada data prepare-sft`, whose documents are conversations."""

_KEYS = {"padded_vocab_size": "rows"}
"""Keys of manifest.json that differ from the attribute's name."""


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard.

    Attributes:
        name: name of its files, without suffix.
        split: TRAIN or VALIDATION.
        documents: number of documents.
        tokens: number of tokens, EOS included.
        text_bytes: UTF-8 bytes of its text; of conversations, of their replies.
        max_token_id: highest token id.
        bin_bytes, idx_bytes: sizes of its files.
        bin_xxh3, idx_xxh3: xxh3_64 checksums of its files, in hexadecimal.
        replies, replies_xxh3: rows and checksum of its .replies file, which only conversations
            have.
    """

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
    replies: int = 0
    replies_xxh3: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus contains and how it was made.

    Attributes:
        format_version: FORMAT_VERSION of the tool that wrote it.
        tool_version: version of that tool.
        kind: TEXT or CONVERSATIONS.
        dtype: name of the dtype of the token ids.
        vocab_size, mask_id, eos_id, tokenizer_fingerprint: attributes of the tokenizer.
        padded_vocab_size: rows of an embedding for the tokenizer ("rows" in manifest.json).
        options: settings of the preparation.
        sources: {path, bytes, documents} of each source that gave a document.
        skipped: number of files, lines and documents left out, by reason.
        shards: entries of all shards, in the order in which they are read.
        noted: number of documents that were counted and kept, by reason.
        encoders: number of units of work that each encoder did, by its name.
        plan: digest of inputs and settings, by which a repeated preparation recognizes its corpus;
            "" if there is none.
    """

    format_version: int
    tool_version: str
    kind: str
    dtype: str
    vocab_size: int
    padded_vocab_size: int
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
        """Write manifest.json with a checksum over its content.

        The file appears complete or not at all.
        """
        path = Path(folder) / MANIFEST
        content = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        content["checksum"] = _checksum(content)
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read manifest.json.

        Raises:
            UserError: it is missing, damaged, edited or of another version of the format.
        """
        path = Path(folder) / MANIFEST
        content = _read(path, folder)
        if content.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {content.get('format_version')} is not {FORMAT_VERSION},"
                " the one this version reads"
            )
        names = {_KEYS.get(own.name, own.name): own.name for own in fields(cls)}
        if set(content) != set(names):
            raise damaged(path, "its fields are not those of a manifest")
        try:
            content["shards"] = [ShardEntry(**entry) for entry in content["shards"]]
        except TypeError:
            raise damaged(path, "the fields of a shard are wrong") from None
        if content["dtype"] not in [dtype.name for dtype in DTYPES.values()]:
            raise damaged(path, f"dtype {content['dtype']!r} is not a token dtype")
        return cls(**{names[key]: value for key, value in content.items()})

    def of(self, split: str) -> list[ShardEntry]:
        """Return the shards of a split, in order."""
        return [entry for entry in self.shards if entry.split == split]

    def fingerprint(self, split: str) -> str:
        """Return a digest of a split's content.

        It covers token ids, document boundaries and the tokenizer's meaning of the ids, but neither
        the path of the corpus nor the names of its shards.
        """
        lines = [self.tokenizer_fingerprint]
        for entry in self.of(split):
            # Shards of text have no replies, and no blank at the end of their line.
            lines.append(f"{entry.bin_xxh3} {entry.idx_xxh3} {entry.replies_xxh3}".rstrip())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def totals(self, split: str) -> tuple[int, int, int]:
        """Return documents, tokens and bytes of text of a split."""
        entries = self.of(split)
        documents = sum(entry.documents for entry in entries)
        tokens = sum(entry.tokens for entry in entries)
        text_bytes = sum(entry.text_bytes for entry in entries)
        return documents, tokens, text_bytes


def _read(path: Path, folder: str | Path) -> dict[str, Any]:
    """Read the content of a folder's manifest and compare it with its checksum."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a prepared corpus (no {MANIFEST}); make one with `llada data prepare`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise damaged(path, "not JSON") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise damaged(path, "no checksum")
    # Before anything in it is used: an edited manifest is reported as such, not by what it breaks.
    checksum = content.pop("checksum")
    if checksum != _checksum(content):
        raise damaged(path, "its checksum does not match its content")
    return content


def _checksum(content: Mapping[str, object]) -> str:
    # Canonical JSON, so that the checksum does not depend on the layout of the file.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()

"""What a tokenizer wraps: a tokenizer.json or a SentencePiece model, with added special tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from llada.arrays import I64
from llada.errors import UserError
from llada.types import JsonObject

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Fast

Roles = dict[str, str]
"""Role (bos, eos, pad, mask) -> token. A role without a token is left out."""

ROLES = ("bos", "eos", "pad", "mask")
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
DEFINITION = "tokenizer.json"
MODEL = "tokenizer.model"
SIDECAR = "added_special_tokens.json"
"""Beside a SentencePiece model: special tokens that the model does not know, and the roles."""


class TextBetween(NamedTuple):
    """A text within a longer one, with the special tokens beside it (None at either end of all)."""

    before: int | None
    text: str
    after: int | None


class Backend(Protocol):
    """What the library behind a tokenizer does; `Tokenizer` describes most of it.

    Attributes:
        size: last id + 1, added tokens included.
    """

    size: int

    @property
    def definition(self) -> str | bytes: ...
    def id_of(self, token: str) -> int | None: ...
    def token(self, token_id: int) -> str | None: ...
    def roles(self) -> Roles:
        """Roles that the definition itself assigns."""
        ...

    def special_ids(self) -> dict[str, int]: ...
    def encode(self, texts: list[str], one_thread: bool) -> tuple[I64, I64]: ...
    def encode_between(self, texts: Sequence[TextBetween]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def with_special(self, tokens: Iterable[str]) -> Backend:
        """This tokenizer with `tokens` as special tokens; new ones take the next ids."""
        ...

    def canonical(self) -> bytes:
        """The definition in one form for all files that mean the same, for the fingerprint."""
        ...

    def save(self, folder: Path, roles: Roles) -> None: ...


class StandIns(NamedTuple):
    """A copy of a tokenizer that reads other names as its special tokens.

    Attributes:
        tokenizer: the copy.
        names: special id -> the name that stands for it, which sound text does not contain.
        ids: special id -> the id of that name in the copy.
    """

    tokenizer: Fast
    names: dict[int, str]
    ids: dict[int, int | None]

    def name_of(self, special: int | None) -> str:
        """The name that stands for a special id; "" for None."""
        if special is None:
            return ""
        return self.names[special]


class HuggingFace:
    """A tokenizer.json.

    The text of the file is what is kept, hashed and saved, not what the library would write, so
    another version of the library changes no fingerprint.
    """

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer as Fast

        self.definition = text
        self._fast = Fast.from_str(text)
        # Text is never read as special tokens. The switch is not part of the definition, and a
        # pickled copy loses it: hence __reduce__.
        self._fast.encode_special_tokens = True
        self._encode = getattr(self._fast, "encode_batch_fast", self._fast.encode_batch)
        self.size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __reduce__(self) -> tuple[type[HuggingFace], tuple[str]]:
        return HuggingFace, (self.definition,)

    @classmethod
    def read(cls, path: Path) -> HuggingFace:
        definition = read_json(path)
        # Some files keep the truncation and padding of a past run. Documents are encoded whole.
        definition.update(truncation=None, padding=None)
        try:
            return cls(json.dumps(definition, ensure_ascii=False))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None

    def id_of(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        return self._fast.id_to_token(token_id)

    def roles(self) -> Roles:
        return {}

    def special_ids(self) -> dict[str, int]:
        return {entry["content"]: entry["id"] for entry in self._special_entries}

    @cached_property
    def _special_entries(self) -> list[JsonObject]:
        """The special ones among the added tokens, as they stand in the definition."""
        added = json.loads(self.definition).get("added_tokens") or []
        return [entry for entry in added if entry.get("special")]

    def encode(self, texts: list[str], one_thread: bool) -> tuple[I64, I64]:
        with _threads(one_thread):
            rows = [encoding.ids for encoding in self._encode(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return (
            np.fromiter(
                itertools.chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())
            ),
            lengths,
        )

    @cached_property
    def _stand_ins(self) -> StandIns:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(self.definition)
        fast.encode_special_tokens = True  # the special tokens' own names stay text
        names: dict[int, str] = {}
        tokens = []
        for entry in self._special_entries:
            names[entry["id"]] = f"\ufdd0{entry['id']}\ufdd1"
            # Not special, since encode_special_tokens makes text of the names of special tokens.
            # The flags decide which spaces beside it belong to the token.
            flags = {flag: bool(entry.get(flag)) for flag in _ADDED_TOKEN_FLAGS}
            tokens.append(AddedToken(names[entry["id"]], special=False, **flags))
        fast.add_tokens(tokens)
        return StandIns(fast, names, {i: fast.token_to_id(name) for i, name in names.items()})

    def encode_between(self, texts: Sequence[TextBetween]) -> list[list[int]]:
        stand_ins = self._stand_ins
        spelled_out = [
            stand_ins.name_of(text.before) + text.text + stand_ins.name_of(text.after)
            for text in texts
        ]
        encode = getattr(stand_ins.tokenizer, "encode_batch_fast", stand_ins.tokenizer.encode_batch)
        encodings = encode(spelled_out, add_special_tokens=False)
        return [
            self._without_neighbors(text, encoding)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _without_neighbors(self, text: TextBetween, encoding: Encoding) -> list[int]:
        """The ids of a text without those of the special tokens beside it, which must be there."""
        ids = encoding.ids
        before: list[int | None] = []
        after: list[int | None] = []
        if text.before is not None:
            before = [self._stand_ins.ids[text.before]]
        if text.after is not None:
            after = [self._stand_ins.ids[text.after]]
        start = len(before)
        stop = len(ids) - len(after)
        if ids[:start] != before or ids[stop:] != after:
            neighbors = [text.before, text.after]
            tokens = " and ".join(str(self.token(i)) for i in neighbors if i is not None)
            raise UserError(
                f"the tokenizer does not read {tokens} as special beside the text"
                f" {text.text[:40]!r}"
            )
        return ids[start:stop]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def with_special(self, tokens: Iterable[str]) -> HuggingFace:
        definition = json.loads(self.definition)
        added: dict[str, JsonObject] = {
            entry["content"]: entry for entry in definition.get("added_tokens") or []
        }
        next_id = self.size
        changed = False
        for token in tokens:
            if token in added and added[token].get("special"):
                continue
            changed = True
            if token not in added:
                # A word of the model's own vocabulary keeps its id.
                token_id = self.id_of(token)
                if token_id is None:
                    token_id = next_id
                    next_id += 1
                flags = dict.fromkeys(_ADDED_TOKEN_FLAGS, False)
                added[token] = {"id": token_id, "content": token, **flags}
            added[token]["special"] = True
        if not changed:
            return self
        definition["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
        result = HuggingFace(json.dumps(definition, ensure_ascii=False))

        # The library numbers new tokens itself, from the size of the vocabulary on. In a vocabulary
        # with unused ids that is less than the last id, and the tokens get other ids than ours.
        for token in added:
            if result.id_of(token) != added[token]["id"]:
                raise UserError(
                    f"tokenizer: {token} would get id {result.id_of(token)}, not"
                    f" {added[token]['id']}: its ids have holes"
                )
        return result

    def canonical(self) -> bytes:
        return canonical_json(json.loads(self.definition))

    def save(self, folder: Path, roles: Roles) -> None:
        write_text(folder / DEFINITION, self.definition)


class SentencePiece:
    """A SentencePiece model, and special tokens added after its last id.

    The model does not know the added tokens, so no text can spell them.
    """

    def __init__(self, model: bytes, extra: Mapping[str, int]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.definition = model
        self.extra = dict(extra)
        self._processor = SentencePieceProcessor(model_proto=model)
        self._num_pieces = self._processor.get_piece_size()
        self.size = self._num_pieces + len(self.extra)
        if not self._num_pieces:
            raise ValueError("an empty model")
        if sorted(self.extra.values()) != list(range(self._num_pieces, self.size)):
            raise ValueError("the ids of its added tokens do not follow its own")

        # Special are the added tokens and the model's control symbols (such as <s> and </s>).
        self._special = {token_id: token for token, token_id in self.extra.items()}
        for token_id in range(self._num_pieces):
            if self._processor.is_control(token_id):
                self._special[token_id] = self._processor.id_to_piece(token_id)

    def __reduce__(self) -> tuple[type[SentencePiece], tuple[bytes, dict[str, int]]]:
        return SentencePiece, (self.definition, self.extra)

    @classmethod
    def read(cls, path: Path, sidecar: Path | None) -> tuple[SentencePiece, Roles]:
        """Read a model, and the added tokens and roles beside it if that file exists."""
        content: JsonObject = {"added_tokens": {}, "roles": {}}
        if sidecar is not None and sidecar.is_file():
            content = read_json(sidecar)
        try:
            backend = cls(read_bytes(path), content["added_tokens"])
            roles = {role: str(token) for role, token in content["roles"].items()}
        except UserError:
            raise
        except Exception as error:
            # The library raises RuntimeError, OSError or TypeError, depending on what is wrong.
            raise UserError(
                f"{path}: not a SentencePiece model with sound added tokens ({error})"
            ) from None
        for role, token in roles.items():
            if role not in ROLES or backend.id_of(token) is None:
                raise UserError(
                    f"{sidecar}: {role} {token!r} is not a role with a token of the vocabulary"
                )
        return backend, roles

    def id_of(self, token: str) -> int | None:
        if token in self.extra:
            return self.extra[token]
        # A name that the model does not know gets the id of its unknown piece.
        token_id = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(token_id) != token:
            return None
        return token_id

    def token(self, token_id: int) -> str | None:
        if token_id in self._special:
            return self._special[token_id]
        if not 0 <= token_id < self._num_pieces:
            return None
        return self._processor.id_to_piece(token_id)

    def roles(self) -> Roles:
        ids = {
            "bos": self._processor.bos_id(),
            "eos": self._processor.eos_id(),
            "pad": self._processor.pad_id(),
        }
        return {
            role: self._processor.id_to_piece(token_id)
            for role, token_id in ids.items()
            if token_id >= 0  # -1: the model has no such token
        }

    def special_ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in self._special.items()}

    def encode_between(self, texts: Sequence[TextBetween]) -> list[list[int]]:
        # The model knows no special tokens in text, so neighbors change nothing.
        rows: list[list[int]] = self._processor.encode([text.text for text in texts])
        return rows

    def encode(self, texts: list[str], one_thread: bool) -> tuple[I64, I64]:
        rows = []
        if texts:
            num_threads = -1  # all cores
            if one_thread:
                num_threads = 1
            rows = self._processor.encode(texts, out_type="numpy", num_threads=num_threads)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        # The empty array gives an empty result its type.
        return np.concatenate([np.empty(0, np.int64), *rows], dtype=np.int64), lengths

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        # The processor knows no added tokens and drops control symbols. So it decodes the runs of
        # ordinary ids, and the special tokens are put between them.
        text = ""
        has_words = False
        for is_ordinary, run in itertools.groupby(ids, self._is_ordinary):
            if is_ordinary:
                text += self._decode_run(list(run), keep_first_space=has_words)
                has_words = True
            elif not skip_special_tokens:
                text += "".join(self._special.get(token_id, "") for token_id in run)
        return text

    def _is_ordinary(self, token_id: int) -> bool:
        return 0 <= token_id < self._num_pieces and token_id not in self._special

    def _decode_run(self, ids: list[int], keep_first_space: bool) -> str:
        """Decode ordinary ids; the processor drops a space at their start, which may be kept."""
        part = self._processor.decode(ids)
        starts_with_space = self._processor.id_to_piece(ids[0]).startswith("▁")
        if keep_first_space and starts_with_space and not part.startswith(" "):
            part = f" {part}"
        return part

    def with_special(self, tokens: Iterable[str]) -> SentencePiece:
        missing = [token for token in tokens if self.id_of(token) is None]
        extra = dict(self.extra)
        for i, token in enumerate(missing):
            extra[token] = self.size + i
        return SentencePiece(self.definition, extra)

    def canonical(self) -> bytes:
        return canonical_json(
            {"model": hashlib.sha256(self.definition).hexdigest(), "added_tokens": self.extra}
        )

    def save(self, folder: Path, roles: Roles) -> None:
        (folder / MODEL).write_bytes(self.definition)
        write_text(
            folder / SIDECAR, json.dumps({"added_tokens": self.extra, "roles": roles}, indent=2)
        )


# -- helpers ---------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises UserError if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> JsonObject:
    """Read a file with one JSON object. Raises UserError if that fails."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file that ends with a newline."""
    path.write_text(text + "\n", encoding="utf-8")


def canonical_json(content: JsonObject) -> bytes:
    """JSON that is the same for all files that mean the same: sorted keys, no white space."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@contextmanager
def _threads(one: bool) -> Iterator[None]:
    """Limit the tokenizers library to the calling thread within the block, if `one` is true.

    The library reads the environment variable at each call.
    """
    if not one:
        yield
        return
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

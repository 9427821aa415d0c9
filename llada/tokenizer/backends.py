"""What a tokenizer is made of: a tokenizer.json or a SentencePiece model, with the special tokens
added to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llada.errors import UserError

I64 = npt.NDArray[np.int64]
Roles = dict[str, str]
"""Role (bos, eos, pad, mask) -> token; a role without a token is left out."""
Unit = tuple[int | None, str, int | None]
"""A text and the special tokens before and after it, None at the start and at the end of all."""

ROLES = ("bos", "eos", "pad", "mask")
DEFINITION, MODEL, SIDECAR = "tokenizer.json", "tokenizer.model", "added_special_tokens.json"


class Backend(Protocol):
    size: int

    @property
    def definition(self) -> str | bytes: ...
    def id_of(self, token: str) -> int | None: ...
    def token(self, token_id: int) -> str | None: ...
    def roles(self) -> Roles: ...
    def special(self) -> dict[str, int]: ...
    def encode(self, texts: list[str], one_thread: bool) -> tuple[I64, I64]: ...
    def encode_between(self, units: Sequence[Unit]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def with_special(self, tokens: Iterable[str]) -> Backend: ...
    def canonical(self) -> bytes: ...
    def save(self, folder: Path, roles: Roles) -> None: ...


class HuggingFace:
    """A tokenizer.json. What is kept, hashed and saved is its own text, so another version of the
    library changes no fingerprint.
    """

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer as Fast

        self.definition = text
        self._fast = Fast.from_str(text)
        # not part of the definition: text is never read as special tokens
        self._fast.encode_special_tokens = True
        self._encode = getattr(self._fast, "encode_batch_fast", self._fast.encode_batch)
        self.size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFace, (self.definition,)

    @classmethod
    def read(cls, path: Path) -> HuggingFace:
        definition = read_json(path)
        # of a run of another model; documents are encoded whole
        definition.update(truncation=None, padding=None)
        try:
            return cls(json.dumps(definition, ensure_ascii=False))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None

    def id_of(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        return self._fast.id_to_token(token_id)

    def roles(self) -> Roles:
        return {}

    def special(self) -> dict[str, int]:
        return {entry["content"]: entry["id"] for entry in self._special_entries}

    @cached_property
    def _special_entries(self) -> list[dict[str, Any]]:
        return [
            entry
            for entry in json.loads(self.definition).get("added_tokens") or []
            if entry.get("special")
        ]

    def encode(self, texts: list[str], one_thread: bool) -> tuple[I64, I64]:
        with _threads(one_thread):
            rows = [encoding.ids for encoding in self._encode(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return (
            np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())),
            lengths,
        )

    @cached_property
    def _stand_ins(self) -> tuple[Any, dict[int, str]]:
        """A copy that reads other names, which no sound text holds, as special tokens; and special
        id -> that name.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(self.definition)
        fast.encode_special_tokens = True  # the special tokens' own names stay text
        entries = self._special_entries
        names = {entry["id"]: f"\ufdd0{entry['id']}\ufdd1" for entry in entries}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        fast.add_tokens(
            [
                AddedToken(
                    names[e["id"]], special=False, **{flag: bool(e.get(flag)) for flag in flags}
                )
                for e in entries
            ]
        )
        return fast, names

    def encode_between(self, units: Sequence[Unit]) -> list[list[int]]:
        fast, names = self._stand_ins
        ends = [
            [None if end is None else fast.token_to_id(names[end]) for end in (before, after)]
            for before, _, after in units
        ]
        texts = [
            "".join(("" if b is None else names[b], text, "" if a is None else names[a]))
            for b, text, a in units
        ]
        rows = []
        encode = getattr(fast, "encode_batch_fast", fast.encode_batch)
        for unit, (before, after), encoding in zip(
            units, ends, encode(texts, add_special_tokens=False), strict=True
        ):
            ids = encoding.ids
            first, last = int(before is not None), len(ids) - int(after is not None)
            if ids[:first] != [before] * first or ids[last:] != [after] * (len(ids) - last):
                beside = " and ".join(
                    str(self.token(end)) for end in (unit[0], unit[2]) if end is not None
                )
                raise UserError(
                    f"the tokenizer does not read {beside} as special beside the text"
                    f" {unit[1][:40]!r}"
                )
            rows.append(ids[first:last])
        return rows

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def with_special(self, tokens: Iterable[str]) -> HuggingFace:
        definition = json.loads(self.definition)
        added: dict[str, dict[str, Any]] = {
            entry["content"]: entry for entry in definition.get("added_tokens") or []
        }
        size, changed = self.size, False
        for token in tokens:
            token_id = self.id_of(token)
            if token not in added:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                added[token] = {
                    "id": size if token_id is None else token_id,
                    "content": token,
                    **flags,
                    "special": True,
                }
                size += token_id is None
            elif added[token].get("special"):
                continue
            added[token]["special"] = changed = True
        if not changed:
            return self
        definition["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
        result = HuggingFace(json.dumps(definition, ensure_ascii=False))
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
    """A SentencePiece model, and special tokens after its last id that the model does not know: no
    text can spell them.
    """

    def __init__(self, model: bytes, extra: Mapping[str, int]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.definition, self.extra = model, dict(extra)
        self._processor = SentencePieceProcessor(model_proto=model)
        self._pieces = self._processor.get_piece_size()
        if not self._pieces:
            raise ValueError("an empty model")
        if sorted(self.extra.values()) != list(range(self._pieces, self._pieces + len(self.extra))):
            raise ValueError("the ids of its added tokens do not follow its own")
        self.size = self._pieces + len(self.extra)
        self._special = {token_id: token for token, token_id in self.extra.items()}
        self._special.update(
            {
                i: self._processor.id_to_piece(i)
                for i in range(self._pieces)
                if self._processor.is_control(i)
            }
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self.definition, self.extra)

    @classmethod
    def read(cls, path: Path, sidecar: Path | None) -> tuple[SentencePiece, Roles]:
        """The model with what the file of added tokens says, where there is one."""
        content = (
            read_json(sidecar)
            if sidecar is not None and sidecar.is_file()
            else {"added_tokens": {}, "roles": {}}
        )
        try:
            backend = cls(read_bytes(path), content["added_tokens"])
            roles = {role: str(token) for role, token in content["roles"].items()}
        except UserError:
            raise
        except Exception as error:
            # the library raises RuntimeError, OSError or TypeError by what is wrong
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
        token_id = self._processor.piece_to_id(token)  # the unknown piece's id when there is none
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def token(self, token_id: int) -> str | None:
        if token_id in self._special:
            return self._special[token_id]
        return self._processor.id_to_piece(token_id) if 0 <= token_id < self._pieces else None

    def roles(self) -> Roles:
        ids = {
            "bos": self._processor.bos_id(),
            "eos": self._processor.eos_id(),
            "pad": self._processor.pad_id(),
        }
        return {
            role: self._processor.id_to_piece(token_id)
            for role, token_id in ids.items()
            if token_id >= 0
        }

    def special(self) -> dict[str, int]:
        return {token: token_id for token_id, token in self._special.items()}

    def encode_between(self, units: Sequence[Unit]) -> list[list[int]]:
        rows: list[list[int]] = self._processor.encode([text for _, text, _ in units])
        return rows

    def encode(self, texts: list[str], one_thread: bool) -> tuple[I64, I64]:
        rows = (
            self._processor.encode(texts, out_type="numpy", num_threads=1 if one_thread else -1)
            if texts
            else []
        )
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.concatenate([np.empty(0, np.int64), *rows], dtype=np.int64), lengths

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text, run, spoken = "", [], False
        for token_id in [*ids, None]:
            if (
                token_id is not None
                and 0 <= token_id < self._pieces
                and token_id not in self._special
            ):
                run.append(token_id)
                continue
            if run:
                part = self._processor.decode(run)
                # The processor drops the space at a text's start; after other words it is one.
                if (
                    spoken
                    and self._processor.id_to_piece(run[0]).startswith("▁")
                    and not part.startswith(" ")
                ):
                    part = f" {part}"
                text, run, spoken = text + part, [], True
            if token_id in self._special and not skip_special_tokens:
                text += self._special[token_id]
        return text

    def with_special(self, tokens: Iterable[str]) -> SentencePiece:
        missing = [token for token in tokens if self.id_of(token) is None]
        return SentencePiece(
            self.definition,
            {**self.extra, **{token: self.size + i for i, token in enumerate(missing)}},
        )

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
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def canonical_json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@contextmanager
def _threads(one: bool) -> Iterator[None]:
    """Keep the tokenizers library, which asks the environment at each call, to the
    calling thread.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if one:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if one and before is None:
            del os.environ[name]
        elif one and before is not None:
            os.environ[name] = before

"""The tokenizer: text <-> ids, whatever the backend, and the roles of its special tokens.

Text is never read as special tokens: a literal "<|mdm_mask|>" in a document is encoded like any other characters. A tokenizer
that cannot promise this for its special tokens is refused when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llada.errors import UserError

I64 = npt.NDArray[np.int64]

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
"""LLaDA's, in the order in which missing ones are appended."""
_NEW_ROLES = {"bos": BOS, "eos": EOS, "pad": EOS, "mask": MASK}
_KNOWN = {
    "bos": (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"),
    "eos": (EOS, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "mask": (MASK, "[MASK]", "<mask>", "<|mask|>"),
}
"""Names by which a role is found when the tokenizer's files do not assign it."""
_DEFINITION, _MODEL, _CONFIG, _MAP = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"
_SIDECAR = "added_special_tokens.json"
_REMEDY = "add LLaDA's special tokens with `--add-special-tokens`"

Roles = dict[str, str]
"""Role (bos, eos, pad, mask) -> token; a role without a token is left out."""


class _Backend(Protocol):
    size: int

    def id_of(self, token: str) -> int | None: ...
    def token(self, token_id: int) -> str | None: ...
    def roles(self) -> Roles: ...
    def encode(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def with_special(self, tokens: Iterable[str]) -> _Backend: ...
    def canonical(self) -> bytes: ...
    def save(self, folder: Path, roles: Roles) -> None: ...


class Tokenizer:
    """Text <-> ids. Made by `Tokenizer.load` or `train_byte_level_bpe`; can be sent to other processes.

    Attributes:
        name: for messages.
        vocab_size: last id + 1, special tokens included.
        rows: vocab_size rounded up to a multiple of 128, the rows of a model's embedding.
        mask_id, eos_id: -1 when there is none, which `load` allows only with require_mask=False.
        bos_id, pad_id: None when there is none.
    """

    def __init__(self, backend: _Backend, roles: Roles, name: str) -> None:
        self._backend, self._roles, self.name = backend, roles, name
        self.vocab_size = backend.size
        self.rows = -(-backend.size // 128) * 128
        ids = {role: backend.id_of(token) for role, token in roles.items()}
        mask, eos = ids.get("mask"), ids.get("eos")
        self.mask_id = -1 if mask is None else mask
        self.eos_id = -1 if eos is None else eos
        self.bos_id, self.pad_id = ids.get("bos"), ids.get("pad")
        self._refuse_readable_specials()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._backend, self._roles, self.name)

    @classmethod
    def load(cls, path: str | Path, require_mask: bool = True) -> Tokenizer:
        """Read a Hugging Face folder (tokenizer.json or tokenizer.model), a tokenizer.json or a SentencePiece .model.

        Args:
            path: a file called tokenizer.json or tokenizer.model is read with the files beside it, any other alone.
            require_mask: refuse a tokenizer without a mask token or an EOS. Without, `with_special_tokens` can add them.

        Raises:
            UserError: no such file, one that cannot be read, a missing mask or EOS, special tokens that text can spell.
        """
        path = Path(path)
        file = _tokenizer_file(path)
        folder = file.parent if file.name in (_DEFINITION, _MODEL) else None
        roles: Mapping[str, str] = {}
        backend: _Backend
        if file.suffix == ".json":
            backend = _HuggingFace.read(file)
        else:
            backend, roles = _SentencePiece.read(file, None if folder is None else folder / _SIDECAR)
        roles = {**backend.roles(), **_assigned_roles(folder, backend), **roles}
        for role, names in _KNOWN.items():
            known = next((name for name in names if backend.id_of(name) is not None), None)
            if role not in roles and known is not None:
                roles[role] = known
        if require_mask:
            for role, what in (("mask", "mask token"), ("eos", "EOS (end of document) token")):
                if role not in roles:
                    raise UserError(f"{path}: the tokenizer has no {what} (none of {', '.join(_KNOWN[role])}); {_REMEDY}")
        marked = [token for token in (*roles.values(), *SPECIAL_TOKENS) if backend.id_of(token) is not None]
        return cls(backend.with_special(marked), dict(roles), str(path))

    def with_special_tokens(self) -> Tokenizer:
        """This tokenizer with those of LLaDA's special tokens that it lacks after its last id; roles it has are kept."""
        return Tokenizer(self._backend.with_special(SPECIAL_TOKENS), {**_NEW_ROLES, **self._roles}, self.name)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the definition and the roles: equal for tokenizers that give every text the same ids."""
        digest = hashlib.sha256(self._backend.canonical())
        digest.update(_canonical({"roles": self._roles}))
        return digest.hexdigest()

    def encode(self, text: str) -> I64:
        """The ids of a text; no token is added and none is a special token."""
        return np.array(self._backend.encode([text])[0], dtype=np.int64)

    def encode_batch(self, texts: list[str]) -> tuple[I64, I64]:
        """The ids of many texts one after the other, and how many ids each has [len(texts)]."""
        rows = self._backend.encode(texts)
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        return np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], skip_special_tokens: bool = False) -> str:
        """The text of ids. An id without a token gives nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)

    def token(self, token_id: int) -> str:
        """One token for people: printable, with its leading space where the vocabulary marks one."""
        raw = self._backend.token(int(token_id))
        if raw is None:
            return f"<{token_id}>"
        if "▁" in raw:
            text = raw.replace("▁", " ")
        else:
            text = self.decode([token_id])
            if not text or "\ufffd" in text:
                text = raw  # part of a character: the vocabulary's own spelling of its bytes
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact name, a special token's among them; None when there is none."""
        return self._backend.id_of(token)

    def special_tokens(self) -> dict[str, tuple[str, int]]:
        """The token and id of every role (bos, eos, pad, mask) that has one."""
        return {role: (token, token_id) for role, token in self._roles.items() if (token_id := self.id_of(token)) is not None}

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads back with the same fingerprint, and AutoTokenizer too if it has a tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {f"{role}_token": token for role, token in sorted(self._roles.items())}
        self._backend.save(folder, self._roles)
        config: dict[str, Any] = {**names, "clean_up_tokenization_spaces": False}
        if isinstance(self._backend, _HuggingFace):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write(folder / _CONFIG, json.dumps(config, indent=2))
        _write(folder / _MAP, json.dumps(names, indent=2))

    def _refuse_readable_specials(self) -> None:
        names = sorted({*self._roles.values(), *(name for name in SPECIAL_TOKENS if self.id_of(name) is not None)})
        for name in names:
            for ids in self._backend.encode([name, f"a {name} b", f"a{name}b"]):
                if self.id_of(name) in ids:
                    raise UserError(
                        f"{self.name}: the text {name!r} is encoded as the special token {name} (id {self.id_of(name)}); special tokens "
                        "must be ones that text cannot spell: control symbols, or added tokens outside the model's vocabulary"
                    )


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with LLaDA's special tokens, which take the last ids. The same texts give the same one.

    Args:
        texts: read once.
        vocab_size: ids in all: 256 bytes, 6 special tokens, the rest merges. The result has fewer when the texts have no more pairs.

    Raises:
        UserError: a vocab_size without room for bytes and special tokens.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size: {vocab_size} is less than {smallest}, the bytes and the special tokens")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(_HuggingFace(fast.to_str()), {}, "trained tokenizer").with_special_tokens()


# -- files ------------------------------------------------------------------------------------------------------------


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in (_DEFINITION, _MODEL):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no tokenizer in this folder (neither {_DEFINITION} nor {_MODEL})")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer folder or file")
    if path.suffix not in (".json", ".model"):
        raise UserError(f"{path}: not a tokenizer (a folder, a tokenizer.json or a SentencePiece .model)")
    return path


def _assigned_roles(folder: Path | None, backend: _Backend) -> Roles:
    """The roles that tokenizer_config.json, then special_tokens_map.json assign."""
    roles: Roles = {}
    for path in () if folder is None else (folder / _CONFIG, folder / _MAP):
        content = _read_json(path) if path.is_file() else {}
        for role in _KNOWN:
            value = content.get(f"{role}_token")
            token = value.get("content") if isinstance(value, dict) else value
            if role in roles or not isinstance(token, str):
                continue
            if backend.id_of(token) is not None:
                roles[role] = token
            elif role in ("mask", "eos"):
                raise UserError(f"{path}: {role}_token {token!r} is not in the vocabulary")
    return roles


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


# -- backends ---------------------------------------------------------------------------------------------------------


class _HuggingFace:
    """A tokenizer.json. What is kept, hashed and saved is its own text, so another version of the library changes no fingerprint."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer as Fast

        self.text = text
        self._fast = Fast.from_str(text)
        self._fast.encode_special_tokens = True  # not part of the definition: text is never read as special tokens
        self._encode = getattr(self._fast, "encode_batch_fast", self._fast.encode_batch)
        self.size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _HuggingFace, (self.text,)

    @classmethod
    def read(cls, path: Path) -> _HuggingFace:
        definition = _read_json(path)
        definition.update(truncation=None, padding=None)  # of a run of another model; documents are encoded whole
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

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def with_special(self, tokens: Iterable[str]) -> _HuggingFace:
        definition = json.loads(self.text)
        added: dict[str, dict[str, Any]] = {entry["content"]: entry for entry in definition.get("added_tokens") or []}
        size, changed = self.size, False
        for token in tokens:
            token_id = self.id_of(token)
            if token not in added:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                added[token] = {"id": size if token_id is None else token_id, "content": token, **flags, "special": True}
                size += token_id is None
            elif added[token].get("special"):
                continue
            added[token]["special"] = changed = True
        if not changed:
            return self
        definition["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
        result = _HuggingFace(json.dumps(definition, ensure_ascii=False))
        for token in added:
            if result.id_of(token) != added[token]["id"]:
                raise UserError(f"tokenizer: {token} would get id {result.id_of(token)}, not {added[token]['id']}: its ids have holes")
        return result

    def canonical(self) -> bytes:
        return _canonical(json.loads(self.text))

    def save(self, folder: Path, roles: Roles) -> None:
        _write(folder / _DEFINITION, self.text)


class _SentencePiece:
    """A SentencePiece model, and special tokens after its last id that the model does not know: no text can spell them."""

    def __init__(self, model: bytes, extra: Mapping[str, int]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model, self.extra = model, dict(extra)
        self._processor = SentencePieceProcessor(model_proto=model)
        self._pieces = self._processor.get_piece_size()
        if not self._pieces:
            raise ValueError("an empty model")
        if sorted(self.extra.values()) != list(range(self._pieces, self._pieces + len(self.extra))):
            raise ValueError("the ids of its added tokens do not follow its own")
        self.size = self._pieces + len(self.extra)
        self._special = {token_id: token for token, token_id in self.extra.items()}
        self._special.update({i: self._processor.id_to_piece(i) for i in range(self._pieces) if self._processor.is_control(i)})

    def __reduce__(self) -> tuple[Any, ...]:
        return _SentencePiece, (self.model, self.extra)

    @classmethod
    def read(cls, path: Path, sidecar: Path | None) -> tuple[_SentencePiece, Roles]:
        """The model with what the file of added tokens says, where there is one."""
        content = _read_json(sidecar) if sidecar is not None and sidecar.is_file() else {"added_tokens": {}, "roles": {}}
        try:
            backend = cls(_read(path), content["added_tokens"])
            roles = {role: str(token) for role, token in content["roles"].items()}
        except UserError:
            raise
        except Exception as error:  # the library raises RuntimeError, OSError or TypeError by what is wrong
            raise UserError(f"{path}: not a SentencePiece model with sound added tokens ({error})") from None
        for role, token in roles.items():
            if role not in _KNOWN or backend.id_of(token) is None:
                raise UserError(f"{sidecar}: {role} {token!r} is not a role with a token of the vocabulary")
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
        ids = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id(), "pad": self._processor.pad_id()}
        return {role: self._processor.id_to_piece(token_id) for role, token_id in ids.items() if token_id >= 0}

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, out_type=int)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text, run, spoken = "", [], False
        for token_id in [*ids, None]:
            if token_id is not None and 0 <= token_id < self._pieces and token_id not in self._special:
                run.append(token_id)
                continue
            if run:
                part = self._processor.decode(run)
                # The processor drops the space at a text's start; after other words it is one.
                if spoken and self._processor.id_to_piece(run[0]).startswith("▁") and not part.startswith(" "):
                    part = f" {part}"
                text, run, spoken = text + part, [], True
            if token_id in self._special and not skip_special_tokens:
                text += self._special[token_id]
        return text

    def with_special(self, tokens: Iterable[str]) -> _SentencePiece:
        missing = [token for token in tokens if self.id_of(token) is None]
        return _SentencePiece(self.model, {**self.extra, **{token: self.size + i for i, token in enumerate(missing)}})

    def canonical(self) -> bytes:
        return _canonical({"model": hashlib.sha256(self.model).hexdigest(), "added_tokens": self.extra})

    def save(self, folder: Path, roles: Roles) -> None:
        (folder / _MODEL).write_bytes(self.model)
        _write(folder / _SIDECAR, json.dumps({"added_tokens": self.extra, "roles": roles}, indent=2))

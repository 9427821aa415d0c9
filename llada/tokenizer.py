"""The one tokenizer module: Hugging Face folders, tokenizer.json, SentencePiece; special tokens; fingerprint.

Text is never read as special tokens: a literal "<|mdm_mask|>" in a document is encoded as the characters it consists of.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llada.errors import UserError

I64 = npt.NDArray[np.int64]

LLADA_TOKENS = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "mask": "<|mdm_mask|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "eot": "<|eot_id|>",
}
"""LLaDA's special tokens by role, in the order in which missing ones are appended."""
ROW_MULTIPLE = 128
_ROLES = ("bos", "eos", "pad", "mask")
_KNOWN = {
    "mask": ("<|mdm_mask|>", "[MASK]", "<mask>", "<|mask|>"),
    "eos": ("<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "[EOS]"),
    "bos": ("<|startoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "pad": ("<|endoftext|>", "<pad>", "[PAD]"),
}
_SIDECAR = "llada_tokens.json"


class _Backend(Protocol):
    """What a tokenizer library must do."""

    size: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def token(self, token_id: int) -> str: ...

    def find(self, content: str) -> int | None: ...

    def append(self, contents: Sequence[str]) -> _Backend: ...

    def definition(self) -> str: ...

    def save(self, folder: Path) -> None: ...


class _Fast:
    """A tokenizer.json, through the tokenizers library."""

    def __init__(self, definition: str) -> None:
        from tokenizers import Tokenizer as Fast

        self._definition = definition
        self._fast = Fast.from_str(definition)
        self._fast.encode_special_tokens = True  # literal special tokens are text
        self._fast.no_padding()
        self._fast.no_truncation()
        ids = self._fast.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        return self._fast.id_to_token(token_id) or ""

    def find(self, content: str) -> int | None:
        return self._fast.token_to_id(content)

    def append(self, contents: Sequence[str]) -> _Fast:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        grown = Fast.from_str(self._definition)
        grown.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in contents])
        return _Fast(grown.to_str())

    def definition(self) -> str:
        return json.dumps(json.loads(self._definition), sort_keys=True, ensure_ascii=False)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._definition, encoding="utf-8")


class _SentencePiece:
    """A SentencePiece model; further special tokens have ids past it and live in a file of their own."""

    def __init__(self, model: bytes, extra: Sequence[str] = ()) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model, self._extra = model, list(extra)
        self._pieces = SentencePieceProcessor(model_proto=model)
        self._base = self._pieces.vocab_size()
        self.size = self._base + len(self._extra)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._pieces.encode(list(texts))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text, run = "", []
        for token_id in [*ids, None]:
            if token_id is not None and token_id < self._base:
                run.append(token_id)
                continue
            text += self._pieces.decode(run) if run else ""
            run = []
            if token_id is not None and not skip_special_tokens:
                text += self._extra[token_id - self._base]
        return text

    def token(self, token_id: int) -> str:
        return self._pieces.id_to_piece(token_id) if token_id < self._base else self._extra[token_id - self._base]

    def find(self, content: str) -> int | None:
        if content in self._extra:
            return self._base + self._extra.index(content)
        token_id = self._pieces.piece_to_id(content)
        return token_id if self._pieces.id_to_piece(token_id) == content else None

    def append(self, contents: Sequence[str]) -> _SentencePiece:
        return _SentencePiece(self._model, [*self._extra, *contents])

    def definition(self) -> str:
        return hashlib.sha256(self._model).hexdigest() + json.dumps(self._extra)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._model)
        (folder / _SIDECAR).write_text(json.dumps(self._extra), encoding="utf-8")


class Tokenizer:
    """Text to ids and back, and which ids are special.

    Attributes:
        name: for messages.
        vocab_size: last id + 1, special tokens included.
        rows: vocab_size rounded up to a multiple of 128, the rows of embedding and head.
        mask_id, eos_id: always there; bos_id, pad_id: None where the tokenizer has none.
        fingerprint: sha256 of definition and roles; the same after saving and loading.
    """

    def __init__(self, name: str, backend: _Backend, roles: dict[str, str], require_mask: bool = True) -> None:
        """Use `Tokenizer.load`. `roles` maps bos, eos, pad, mask to the text of their token."""
        self.name, self.backend = name, backend
        self._roles = {role: content for role, content in roles.items() if backend.find(content) is not None}
        ids = {role: backend.find(content) for role, content in self._roles.items()}
        if require_mask:
            for role, what in (("mask", "mask"), ("eos", "end-of-text")):
                if role not in ids:
                    raise UserError(f"tokenizer {name} has no {what} token; --add-special-tokens appends LLaDA's after the last id")
        self.mask_id, self.eos_id = ids.get("mask", -1), ids.get("eos", -1)
        self.bos_id, self.pad_id = ids.get("bos"), ids.get("pad")
        self.vocab_size = backend.size
        self.rows = -(-self.vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE
        self.fingerprint = hashlib.sha256(f"{backend.definition()}\n{json.dumps(self._roles, sort_keys=True)}".encode()).hexdigest()
        self._check_literals()

    def _check_literals(self) -> None:
        for role in ("mask", "eos"):
            content = self._roles.get(role)
            if content is not None and self.backend.find(content) in self.backend.encode_batch([content])[0]:
                raise UserError(
                    f"tokenizer {self.name}: the text '{content}' becomes the {role} token itself, "
                    "so a document could forge it; remove it from the model"
                )

    @classmethod
    def load(cls, path: str | Path, require_mask: bool = True) -> Tokenizer:
        """Load a Hugging Face folder, a tokenizer.json, or a SentencePiece model.

        Args:
            path: folder or file.
            require_mask: refuse a tokenizer without mask or end-of-text token.

        Raises:
            UserError: nothing there, not a tokenizer, or no mask token.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"tokenizer: no file or folder '{path}'")
        folder = path if path.is_dir() else None
        file = path
        if folder:
            found = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
            if not found:
                raise UserError(f"tokenizer: '{path}' holds neither tokenizer.json nor tokenizer.model")
            file = found[0]
        try:
            backend: _Backend
            if file.suffix == ".json":
                backend = _Fast(file.read_text(encoding="utf-8"))
            else:
                sidecar = folder / _SIDECAR if folder else None
                backend = _SentencePiece(file.read_bytes(), json.loads(sidecar.read_text()) if sidecar and sidecar.is_file() else ())
        except Exception as error:  # the libraries raise bare Exceptions and RuntimeErrors for a broken file
            raise UserError(
                f"tokenizer: {file} is not a tokenizer.json or SentencePiece model ({' '.join(str(error).split())[:200]})"
            ) from None
        return cls(str(path), backend, _find_roles(folder, backend), require_mask)

    def with_special_tokens(self) -> Tokenizer:
        """The same tokenizer with those of LLaDA's special tokens that are missing appended after the last id. End-of-text and
        beginning-of-text tokens that it already has are kept."""
        contents = [content for role, content in LLADA_TOKENS.items() if role not in self._roles and self.backend.find(content) is None]
        roles = {role: LLADA_TOKENS[role] for role in ("bos", "eos", "mask")} | self._roles
        roles.setdefault("pad", roles["eos"])
        return Tokenizer(self.name, self.backend.append(contents) if contents else copy.copy(self.backend), roles)

    def encode_batch(self, texts: Sequence[str]) -> tuple[I64, I64]:
        """Encode many texts: their ids back to back, and how many each has; int64. No special token is added or read."""
        ids = self.backend.encode_batch(texts)
        lengths = np.fromiter((len(one) for one in ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter((token for one in ids for token in one), dtype=np.int64, count=int(lengths.sum()))
        return flat, lengths

    def encode(self, text: str) -> I64:
        """Ids of one text, int64 [n]."""
        return self.encode_batch([text])[0]

    def decode(self, ids: npt.ArrayLike, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        return self.backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id."""
        return self.backend.token(token_id)

    def special_tokens(self) -> dict[str, tuple[str, int]]:
        """Text and id of every special token that is there, by role."""
        contents = {**LLADA_TOKENS, **self._roles}
        found = {role: (content, self.backend.find(content)) for role, content in contents.items()}
        return {role: (content, token_id) for role, (content, token_id) in found.items() if token_id is not None}

    def save(self, folder: str | Path) -> None:
        """Write a self-contained folder that `load` and, for tokenizer.json kinds, transformers.AutoTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(folder)
        named = {f"{role}_token": self._roles[role] for role in _ROLES if role in self._roles}
        further = [content for role, (content, _) in self.special_tokens().items() if role not in _ROLES]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **named,
            "additional_special_tokens": further,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=1, ensure_ascii=False), encoding="utf-8")


def _find_roles(folder: Path | None, backend: _Backend) -> dict[str, str]:
    """Roles as the folder's files name them, else by well-known names."""
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if folder and (folder / name).is_file():
            try:
                content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"tokenizer: {folder / name} is not JSON ({error})") from None
            for role in _ROLES:
                value = content.get(f"{role}_token")
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    roles.setdefault(role, value)
    for role, names in _KNOWN.items():
        known = next((name for name in names if backend.find(name) is not None), None)
        if role not in roles and known is not None and not (role == "pad" and known != "<|endoftext|>" and folder):
            roles[role] = known
    return roles


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with LLaDA's special tokens as its last ids.

    Args:
        texts: the training text, read once.
        vocab_size: ids in all, special tokens included; fewer when the text has too few distinct pairs.

    Raises:
        UserError: a vocabulary too small for 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = 256 + len(LLADA_TOKENS)
    if vocab_size < least:
        raise UserError(f"--vocab-size: {vocab_size} is too small, 256 bytes and {len(LLADA_TOKENS)} special tokens need {least}")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LLADA_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    return Tokenizer("trained", _Fast(fast.to_str()), {}, require_mask=False).with_special_tokens()

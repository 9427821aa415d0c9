"""The tokenizer: text <-> ids, whatever the backend, and the roles of its special tokens.

Text is never read as special tokens: a literal "<|mdm_mask|>" in a document is encoded like any
other characters. A tokenizer that cannot promise this for its special tokens is refused when it is
loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llada.errors import UserError
from llada.tokenizer.backends import (
    DEFINITION,
    I64,
    MODEL,
    SIDECAR,
    Backend,
    HuggingFace,
    Roles,
    SentencePiece,
    Unit,
    canonical_json,
    read_bytes,
    read_json,
    write_text,
)

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
_CONFIG, _MAP, _TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
_REMEDY = "add LLaDA's special tokens with `--add-special-tokens`"


class Tokenizer:
    """Text <-> ids. Made by `Tokenizer.load` or `train_byte_level_bpe`; can be sent to other
    processes.

    Attributes:
        name: for messages.
        vocab_size: last id + 1, special tokens included.
        rows: vocab_size rounded up to a multiple of 128, the rows of a model's embedding.
        mask_id, eos_id: -1 when there is none, which `load` allows only with require_mask=False.
        bos_id, pad_id: None when there is none.
        chat_template: Hugging Face chat template (Jinja) that is saved with it, None when there is
            none; no part of the fingerprint.
    """

    def __init__(
        self, backend: Backend, roles: Roles, name: str, chat_template: str | None = None
    ) -> None:
        self._backend, self._roles, self.name, self.chat_template = (
            backend,
            roles,
            name,
            chat_template,
        )
        self.vocab_size = backend.size
        self.rows = -(-backend.size // 128) * 128
        ids = {role: backend.id_of(token) for role, token in roles.items()}
        mask, eos = ids.get("mask"), ids.get("eos")
        self.mask_id = -1 if mask is None else mask
        self.eos_id = -1 if eos is None else eos
        self.bos_id, self.pad_id = ids.get("bos"), ids.get("pad")
        self._refuse_readable_specials()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._backend, self._roles, self.name, self.chat_template)

    @classmethod
    def load(cls, path: str | Path, require_mask: bool = True) -> Tokenizer:
        """Read a Hugging Face folder (tokenizer.json or tokenizer.model), a tokenizer.json or a
        SentencePiece .model.

        Args:
            path: a file called tokenizer.json or tokenizer.model is read with the files beside it,
                any other alone.
            require_mask: refuse a tokenizer without a mask token or an EOS. Without,
                `with_special_tokens` can add them.

        Raises:
            UserError: no such file, one that cannot be read, a missing mask or EOS, special tokens
                that text can spell.
        """
        path = Path(path)
        file = _tokenizer_file(path)
        folder = file.parent if file.name in (DEFINITION, MODEL) else None
        roles: Mapping[str, str] = {}
        backend: Backend
        if file.suffix == ".json":
            backend = HuggingFace.read(file)
        else:
            backend, roles = SentencePiece.read(file, None if folder is None else folder / SIDECAR)
        roles = {**backend.roles(), **_assigned_roles(folder, backend), **roles}
        for role, names in _KNOWN.items():
            known = next((name for name in names if backend.id_of(name) is not None), None)
            if role not in roles and known is not None:
                roles[role] = known
        if require_mask:
            for role, what in (("mask", "mask token"), ("eos", "EOS (end of document) token")):
                if role not in roles:
                    raise UserError(
                        f"{path}: the tokenizer has no {what} (none of {', '.join(_KNOWN[role])});"
                        f" {_REMEDY}"
                    )
        marked = [
            token
            for token in (*roles.values(), *SPECIAL_TOKENS)
            if backend.id_of(token) is not None
        ]
        return cls(
            backend.with_special(marked),
            dict(roles),
            str(path),
            None if folder is None else _stored_template(folder),
        )

    def with_special_tokens(self, tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
        """This tokenizer with those of LLaDA's special tokens that it lacks after its last id;
        roles it has are kept.

        Args:
            tokens: which of SPECIAL_TOKENS.
        """
        roles = {role: token for role, token in _NEW_ROLES.items() if token in tokens}
        return Tokenizer(
            self._backend.with_special(tokens),
            {**roles, **self._roles},
            self.name,
            self.chat_template,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the definition and the roles: equal for tokenizers that give every text the
        same ids.
        """
        digest = hashlib.sha256(self._backend.canonical())
        digest.update(canonical_json({"roles": self._roles}))
        return digest.hexdigest()

    def encode(self, text: str) -> I64:
        """The ids of a text; no token is added and none is a special token."""
        return self._backend.encode([text], one_thread=True)[0]

    def encode_batch(self, texts: list[str], one_thread: bool = False) -> tuple[I64, I64]:
        """The ids of many texts one after the other, and how many ids each has [len(texts)].

        Args:
            texts: any number of them.
            one_thread: leave the other cores alone; the ids are the same.
        """
        return self._backend.encode(texts, one_thread)

    def encode_between(self, units: Sequence[Unit]) -> list[list[int]]:
        """The ids of texts that stand between special tokens in a longer text; those tokens are not
        among them.

        Most tokenizers give a text the same ids wherever it stands. Some do not: spaces beside a
        token may belong to it, and a space may be put before the first text alone.

        Raises:
            UserError: a special token that the tokenizer does not read beside that text.
        """
        return self._backend.encode_between(units)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Every special token -> its id."""
        return self._backend.special()

    @property
    def template_variables(self) -> dict[str, str]:
        """What a chat template may ask for: `bos_token`, `eos_token` ..., as far as the tokenizer
        has them.
        """
        return {f"{role}_token": token for role, token in sorted(self._roles.items())}

    def decode(
        self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], skip_special_tokens: bool = False
    ) -> str:
        """The text of ids. An id without a token gives nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)

    def token(self, token_id: int) -> str:
        """One token for people: printable, with its leading space where the vocabulary
        marks one.
        """
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
        """The id of a token by its exact name, a special token's among them; None when there is
        none.
        """
        return self._backend.id_of(token)

    @property
    def definition(self) -> str | bytes:
        """The text of its tokenizer.json, or the bytes of its SentencePiece model (which does not
        know tokens added to it).
        """
        return self._backend.definition

    def special_tokens(self) -> dict[str, tuple[str, int]]:
        """The token and id of every role (bos, eos, pad, mask) that has one."""
        return {
            role: (token, token_id)
            for role, token in self._roles.items()
            if (token_id := self.id_of(token)) is not None
        }

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads back with the same fingerprint, and AutoTokenizer too if
        it has a tokenizer.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = self.template_variables
        self._backend.save(folder, self._roles)
        config: dict[str, Any] = {**names, "clean_up_tokenization_spaces": False}
        if isinstance(self._backend, HuggingFace):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (folder / _TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        write_text(folder / _CONFIG, json.dumps(config, indent=2))
        write_text(folder / _MAP, json.dumps(names, indent=2))

    def _refuse_readable_specials(self) -> None:
        names = sorted(
            {
                *self._roles.values(),
                *(name for name in SPECIAL_TOKENS if self.id_of(name) is not None),
            }
        )
        for name in names:
            if (
                self.id_of(name)
                in self._backend.encode([name, f"a {name} b", f"a{name}b"], one_thread=True)[0]
            ):
                raise UserError(
                    f"{self.name}: the text {name!r} is encoded as the special token {name} (id"
                    f" {self.id_of(name)}); special tokens must be ones that text cannot spell:"
                    " control symbols, or added tokens outside the model's vocabulary"
                )


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with LLaDA's special tokens, which take the last ids. The
    same texts give the same one.

    Args:
        texts: read once.
        vocab_size: ids in all: 256 bytes, 6 special tokens, the rest merges. The result has fewer
            when the texts have no more pairs.

    Raises:
        UserError: a vocab_size without room for bytes and special tokens.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size: {vocab_size} is less than {smallest}, the bytes and the special tokens"
        )
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(HuggingFace(fast.to_str()), {}, "trained tokenizer").with_special_tokens()


# -- files -----------------------------------------------------------------------------------------


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in (DEFINITION, MODEL):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no tokenizer in this folder (neither {DEFINITION} nor {MODEL})")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer folder or file")
    # tokenizer.model.v3 is a name in use
    if path.suffix != ".json" and ".model" not in path.suffixes:
        raise UserError(
            f"{path}: not a tokenizer (a folder, a tokenizer.json or a SentencePiece .model)"
        )
    return path


def _assigned_roles(folder: Path | None, backend: Backend) -> Roles:
    """The roles that tokenizer_config.json, then special_tokens_map.json assign."""
    roles: Roles = {}
    for path in () if folder is None else (folder / _CONFIG, folder / _MAP):
        content = read_json(path) if path.is_file() else {}
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


def _stored_template(folder: Path) -> str | None:
    """The chat template beside a tokenizer: a file of its own goes before tokenizer_config.json, as
    for transformers.
    """
    if (folder / _TEMPLATE).is_file():
        try:
            return read_bytes(folder / _TEMPLATE).decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise UserError(f"{folder / _TEMPLATE}: not UTF-8") from None
    found = (
        read_json(folder / _CONFIG).get("chat_template") if (folder / _CONFIG).is_file() else None
    )
    if isinstance(found, list):  # several with names
        named = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
        found = named.get("default")
    return found if isinstance(found, str) else None

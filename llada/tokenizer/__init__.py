"""The tokenizer: text <-> ids with any backend, and the roles of its special tokens.

Text is never read as special tokens: a literal "<|mdm_mask|>" in a document is encoded like any
other characters. A tokenizer that cannot guarantee this is refused when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from llada.arithmetic import ceil_div
from llada.arrays import I64
from llada.errors import UserError
from llada.tokenizer.backends import (
    DEFINITION,
    MODEL,
    SIDECAR,
    Backend,
    HuggingFace,
    Roles,
    SentencePiece,
    TextBetween,
    canonical_json,
    read_bytes,
    read_json,
    write_text,
)
from llada.types import JsonObject

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MASK = "<|mdm_mask|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
"""LLaDA's special tokens, in the order in which missing ones are added."""
_NEW_ROLES = {"bos": BOS, "eos": EOS, "pad": EOS, "mask": MASK}
_KNOWN = {
    "bos": (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"),
    "eos": (EOS, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "mask": (MASK, "[MASK]", "<mask>", "<|mask|>"),
}
"""Usual names of a role's token, the first match wins, for files that do not assign the role."""
_VOCAB_MULTIPLE = 128
"""An embedding of such a size splits evenly over tensor-parallel ranks and suits GPU kernels."""
_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_REMEDY = "add LLaDA's special tokens with `--add-special-tokens`"


class Tokenizer:
    """Text <-> ids. Made by `Tokenizer.load` or `train_byte_level_bpe`; can be pickled.

    Attributes:
        name: for messages.
        vocab_size: last id + 1, special tokens included.
        padded_vocab_size: vocab_size rounded up to a multiple of 128; the rows of the embedding of
            a model made for this tokenizer.
        mask_id, eos_id: -1 if there is none, which `load` allows only with require_mask=False.
        bos_id, pad_id: None if there is none.
        chat_template: Hugging Face chat template (Jinja) that is saved with the tokenizer, None if
            there is none; not part of the fingerprint.
    """

    def __init__(
        self, backend: Backend, roles: Roles, name: str, chat_template: str | None = None
    ) -> None:
        self._backend = backend
        self._roles = roles
        self.name = name
        self.chat_template = chat_template
        self.vocab_size = backend.size
        # Rounded up: 126,349 ids need 988 x 128 = 126,464 rows.
        self.padded_vocab_size = ceil_div(backend.size, _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

        ids = {role: backend.id_of(token) for role, token in roles.items()}
        mask_id = ids.get("mask")
        eos_id = ids.get("eos")
        # -1 rather than None: almost every user of the class has both, and compares arrays of ids
        # with them.
        self.mask_id = -1 if mask_id is None else mask_id
        self.eos_id = -1 if eos_id is None else eos_id
        self.bos_id = ids.get("bos")
        self.pad_id = ids.get("pad")
        self._refuse_readable_specials()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Backend, Roles, str, str | None]]:
        return Tokenizer, (self._backend, self._roles, self.name, self.chat_template)

    @classmethod
    def load(cls, path: str | Path, require_mask: bool = True) -> Tokenizer:
        """Read a Hugging Face folder, a tokenizer.json or a SentencePiece .model.

        Args:
            path: a file called tokenizer.json or tokenizer.model is read with the files beside it,
                any other file alone.
            require_mask: refuse a tokenizer without a mask token or an EOS. If false,
                `with_special_tokens` can add them.

        Raises:
            UserError: no such file, one that cannot be read, a missing mask or EOS, special tokens
                that text can spell.
        """
        path = Path(path)
        file = _tokenizer_file(path)
        folder = None
        if file.name in (DEFINITION, MODEL):
            folder = file.parent

        backend: Backend
        sidecar_roles: Roles = {}
        if file.suffix == ".json":
            backend = HuggingFace.read(file)
        else:
            sidecar = None
            if folder is not None:
                sidecar = folder / SIDECAR
            backend, sidecar_roles = SentencePiece.read(file, sidecar)

        # Of several files that assign a role, the most specific wins; usual names come last.
        roles = {**backend.roles(), **_assigned_roles(folder, backend), **sidecar_roles}
        for role, names in _KNOWN.items():
            if role not in roles:
                known = [name for name in names if backend.id_of(name) is not None]
                if known:
                    roles[role] = known[0]
        if require_mask:
            _require(roles, "mask", "mask token", path)
            _require(roles, "eos", "EOS (end of document) token", path)

        # A token with a role is special even if its file has it as an ordinary added token.
        special = [
            token
            for token in (*roles.values(), *SPECIAL_TOKENS)
            if backend.id_of(token) is not None
        ]
        template = None
        if folder is not None:
            template = _stored_template(folder)
        return cls(backend.with_special(special), roles, str(path), template)

    def with_special_tokens(self, tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
        """A copy with those of LLaDA's special tokens that this tokenizer lacks.

        They get the ids after its last one. Roles that are assigned already stay as they are.

        Args:
            tokens: subset of SPECIAL_TOKENS.
        """
        new_roles = {role: token for role, token in _NEW_ROLES.items() if token in tokens}
        return Tokenizer(
            self._backend.with_special(tokens),
            {**new_roles, **self._roles},
            self.name,
            self.chat_template,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the definition and the roles, hexadecimal.

        Equal for tokenizers that give every text the same ids.
        """
        digest = hashlib.sha256(self._backend.canonical())
        digest.update(canonical_json({"roles": self._roles}))
        return digest.hexdigest()

    def encode(self, text: str) -> I64:
        """The ids of a text, int64 [n]. No token is added, and none is a special token."""
        return self._backend.encode([text], one_thread=True)[0]

    def encode_batch(self, texts: list[str], one_thread: bool = False) -> tuple[I64, I64]:
        """Encode many texts at once.

        Args:
            texts: may be empty.
            one_thread: use only the calling thread; the ids are the same.

        Returns:
            The ids of all texts one after the other, int64 [n], and the number of ids of each,
            int64 [len(texts)].
        """
        return self._backend.encode(texts, one_thread)

    def encode_between(self, texts: Sequence[TextBetween]) -> list[list[int]]:
        """The ids of texts that stand between special tokens, without the ids of those tokens.

        Most tokenizers give a text the same ids wherever it stands. Some do not: a token may absorb
        the spaces beside it, and some tokenizers put a space before the first text only.

        Raises:
            UserError: the tokenizer does not read a special token beside a text as special.
        """
        return self._backend.encode_between(texts)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Every special token -> its id."""
        return self._backend.special_ids()

    @property
    def template_variables(self) -> dict[str, str]:
        """Variables of chat templates: `bos_token`, `eos_token` ... of the assigned roles."""
        return {f"{role}_token": token for role, token in sorted(self._roles.items())}

    def decode(self, ids: Sequence[int] | I64, skip_special_tokens: bool = False) -> str:
        """The text of ids. An id without a token adds nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)

    def token(self, token_id: int) -> str:
        """A token for display: printable, with its leading space if the vocabulary marks one."""
        raw = self._backend.token(int(token_id))
        if raw is None:
            return f"<{token_id}>"
        if "▁" in raw:
            text = raw.replace("▁", " ")
        else:
            text = self.decode([token_id])
            if not text or "\ufffd" in text:
                text = raw  # part of a character: show the vocabulary's spelling of the bytes
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def id_of(self, token: str) -> int | None:
        """The id of the token with this exact name, special or not; None if there is none."""
        return self._backend.id_of(token)

    @property
    def definition(self) -> str | bytes:
        """The text of a tokenizer.json, or a SentencePiece model (which lacks the added tokens)."""
        return self._backend.definition

    def special_tokens(self) -> dict[str, tuple[str, int]]:
        """The token and id of every role (bos, eos, pad, mask) that has one."""
        return {
            role: (token, token_id)
            for role, token in self._roles.items()
            if (token_id := self.id_of(token)) is not None
        }

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` reads back with the same fingerprint.

        AutoTokenizer of transformers reads it too, if it has a tokenizer.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = self.template_variables
        self._backend.save(folder, self._roles)
        config: JsonObject = {**names, "clean_up_tokenization_spaces": False}
        if isinstance(self._backend, HuggingFace):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (folder / _TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        write_text(folder / _CONFIG, json.dumps(config, indent=2))
        write_text(folder / _MAP, json.dumps(names, indent=2))

    def _refuse_readable_specials(self) -> None:
        """Raise UserError if some text is encoded as a special token."""
        known = {name for name in SPECIAL_TOKENS if self.id_of(name) is not None}
        for name in sorted(known.union(self._roles.values())):
            # Alone, as a word of its own, and inside a word: tokenizers differ in what they match.
            texts = [name, f"a {name} b", f"a{name}b"]
            ids, _ = self._backend.encode(texts, one_thread=True)
            if self.id_of(name) in ids:
                raise UserError(
                    f"{self.name}: the text {name!r} is encoded as the special token {name} (id"
                    f" {self.id_of(name)}); special tokens must be ones that text cannot spell:"
                    " control symbols, or added tokens outside the model's vocabulary"
                )


def train_byte_level_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with LLaDA's special tokens, which get the last ids.

    The same texts give the same tokenizer.

    Args:
        texts: read once.
        vocab_size: number of ids: 256 bytes, 6 special tokens, the rest merges. The result has
            fewer if the texts have no more pairs to merge.

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
    """The file that defines the tokenizer at `path`. Raises UserError if there is none."""
    if path.is_dir():
        for name in (DEFINITION, MODEL):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no tokenizer in this folder (neither {DEFINITION} nor {MODEL})")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer folder or file")
    # Any suffix may be ".model": names such as tokenizer.model.v3 are in use.
    if path.suffix != ".json" and ".model" not in path.suffixes:
        raise UserError(
            f"{path}: not a tokenizer (a folder, a tokenizer.json or a SentencePiece .model)"
        )
    return path


def _assigned_roles(folder: Path | None, backend: Backend) -> Roles:
    """The roles that tokenizer_config.json assigns, else special_tokens_map.json."""
    roles: Roles = {}
    if folder is None:
        return roles
    for path in (folder / _CONFIG, folder / _MAP):
        if not path.is_file():
            continue
        content = read_json(path)
        for role in _KNOWN:
            # Either the token itself or a description of an added token.
            token = content.get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if role in roles or not isinstance(token, str):
                continue
            if backend.id_of(token) is not None:
                roles[role] = token
            elif role in ("mask", "eos"):
                raise UserError(f"{path}: {role}_token {token!r} is not in the vocabulary")
    return roles


def _require(roles: Roles, role: str, name: str, path: Path) -> None:
    """Raise UserError if no token has `role`, which messages call `name`."""
    if role not in roles:
        raise UserError(
            f"{path}: the tokenizer has no {name} (none of {', '.join(_KNOWN[role])}); {_REMEDY}"
        )


def _stored_template(folder: Path) -> str | None:
    """The chat template beside a tokenizer, None if there is none.

    As in transformers, a file of its own takes precedence over tokenizer_config.json.
    """
    if (folder / _TEMPLATE).is_file():
        try:
            return read_bytes(folder / _TEMPLATE).decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise UserError(f"{folder / _TEMPLATE}: not UTF-8") from None
    if not (folder / _CONFIG).is_file():
        return None
    template = read_json(folder / _CONFIG).get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        by_name = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = by_name.get("default")
    if not isinstance(template, str):
        return None
    return template

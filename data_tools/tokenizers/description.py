"""`llada data tokenizer info`: describe a tokenizer, and how it cuts a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import sample_texts
from data_tools.tokenizers.encoders import choose_encoder
from data_tools.tokenizers.fit import MEASURED_BYTES, measure_fit
from data_tools.tokenizers.sentencepiece import describe_model_type
from llada.errors import UserError
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer

_MAX_NAMES = 8
"""Most names of special tokens that are listed."""


def describe_tokenizer(
    path: str | Path, inputs: Sequence[str | Path] = (), options: ReadOptions | None = None
) -> str:
    """Describe a tokenizer in a few lines; with inputs, also how it cuts a sample of them.

    Args:
        path: Hugging Face folder, tokenizer.json or SentencePiece model; need not have mask or EOS.
        inputs: files and folders to take a sample from.
        options: how inputs are read.

    Raises:
        UserError: no such tokenizer or input.
    """
    tokenizer = Tokenizer.load(path, require_mask=False)
    lines = [
        (
            f"{path}: {tokenizer.vocab_size:,} ids, {tokenizer.padded_vocab_size:,} rows,"
            f" fingerprint {tokenizer.fingerprint}"
        ),
        f"kind: {_kind(tokenizer)}",
        *_special_token_lines(tokenizer),
    ]
    texts = []
    if inputs:
        texts = _sample(inputs, options or ReadOptions())
    encoder, reason = choose_encoder(tokenizer, texts)
    if reason:
        lines.append(f"encoder: {encoder.name} ({reason})")
    else:
        lines.append(f"encoder: {encoder.name}")
    if texts:
        lines.append(f"{measure_fit(tokenizer, texts)}, a sample of the input")
    return "\n".join(lines)


def _special_token_lines(tokenizer: Tokenizer) -> list[str]:
    """List the special tokens by role, those without a role, and LLaDA's that are missing."""
    lines = []
    roles = tokenizer.special_tokens()
    for role in ("bos", "eos", "pad", "mask"):
        if role in roles:
            name, token_id = roles[role]
            lines.append(f"{role:>4}: {token_id} {name}")
        else:
            lines.append(f"{role:>4}: none")
    further = _further_special_tokens(tokenizer)
    if further:
        listed = ", ".join(f"{tokenizer.id_of(name)} {name}" for name in further[:_MAX_NAMES])
        if len(further) > _MAX_NAMES:
            listed += f" and {len(further) - _MAX_NAMES:,} more"
        lines.append(f"further special tokens: {listed}")
    missing = [name for name in SPECIAL_TOKENS if tokenizer.id_of(name) is None]
    if missing:
        lines.append(
            f"without {' '.join(missing)}; `llada data prepare --add-special-tokens` appends them"
        )
    return lines


def _sample(inputs: Sequence[str | Path], options: ReadOptions) -> list[str]:
    # A single document may be much longer than the sample should be.
    texts = [text[:MEASURED_BYTES] for text in sample_texts(inputs, MEASURED_BYTES, options)]
    if not texts:
        raise UserError(f"--input: no text in {', '.join(map(str, inputs))}")
    return texts


def _kind(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer.definition, bytes):
        return describe_model_type(tokenizer.definition)
    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    pre_tokenizer = definition.get("pre_tokenizer") or {}
    # One step, or a sequence of them.
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    name = model.get("type", "BPE")
    if any(step.get("type") == "ByteLevel" for step in steps):
        name = f"byte-level {name}"
    if model.get("byte_fallback"):
        name += " with byte fallback"
    return f"tokenizer.json, {name}"


def _further_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens without a role, by id."""
    names = {name for name in SPECIAL_TOKENS if tokenizer.id_of(name) is not None}
    if isinstance(tokenizer.definition, str):
        for entry in json.loads(tokenizer.definition).get("added_tokens") or []:
            if entry.get("special"):
                names.add(entry["content"])
    names -= {name for name, _ in tokenizer.special_tokens().values()}
    return sorted(names, key=lambda name: tokenizer.id_of(name) or 0)

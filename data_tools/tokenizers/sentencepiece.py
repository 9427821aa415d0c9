"""Inside a SentencePiece model: what kind it is, its symbols, and the same tokenizer as a
tokenizer.json.
"""

from __future__ import annotations

import json
from typing import Any

ESCAPES = (("\uf8ff", "\uf8ffB"), ("\u2581", "\uf8ffA"))
"""SentencePiece writes a space as U+2581 and reads a U+2581 of the text as a space. Models trained
here spell that character as two others, and the first of these, from the private use area, too; so
every text comes back. In the order in which they are applied.
"""
LOSSLESS = "llada_lossless"
"""Name of a normalizer that does ESCAPES and nothing else."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2


def parse(model: bytes) -> Any:
    """The model's protocol buffer.

    Raises:
        ImportError: protobuf is not installed.
        google.protobuf.message.DecodeError: not a model.
    """
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2  # generated at run time: its classes are not in its types
    proto = module.ModelProto()
    proto.ParseFromString(model)
    return proto


def kind(model: bytes) -> str:
    """What kind of model, for people."""
    trainer = parse(model).trainer_spec
    name = {_UNIGRAM: "unigram", _BPE: "BPE"}.get(trainer.model_type, "word or character model")
    return f"SentencePiece {name}{' with byte fallback' if trainer.byte_fallback else ''}"


def symbols(model: bytes) -> list[str]:
    """The pieces that are no ordinary pieces of text: unknown, control, user-defined, bytes."""
    return [piece.piece for piece in parse(model).pieces if piece.type != _NORMAL]


def to_tokenizer_json(model: bytes) -> tuple[str, str]:
    """A tokenizer.json that is meant to give every text the ids of a model, for libraries that read
    only that; whoever uses it compares.

    Control symbols are ordinary pieces in it that no merge reaches, so text cannot spell them.

    Returns:
        The definition, and what must be put before every text that is not empty. (A normalizer that
        does it would put it behind
        every user-defined symbol, too.)

    Raises:
        ValueError: a kind of model that a tokenizer.json cannot express.
    """
    proto = parse(model)
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f"a {kind(model)} model, not BPE")
    if not normalizer.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("a SentencePiece model with its own way of writing spaces")
    if normalizer.remove_extra_whitespaces or (
        normalizer.precompiled_charsmap and normalizer.name != LOSSLESS
    ):
        raise ValueError("a SentencePiece model that normalises text")
    steps = [*(ESCAPES if normalizer.name == LOSSLESS else ()), (" ", "▁")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.piece, **flags}
            for i, piece in enumerate(proto.pieces)
            if piece.type == _USER_DEFINED
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replace(old, new) for old, new in steps],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": _bpe(proto),
    }
    return json.dumps(definition, ensure_ascii=False), " " if normalizer.add_dummy_prefix else ""


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _bpe(proto: Any) -> dict[str, Any]:
    """SentencePiece joins the neighbours whose joint piece has the best score: a merge for every
    way to cut a piece in two.
    """
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    parts = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (-piece.score, piece.piece[:cut], piece.piece[cut:])
        for piece in proto.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in parts and piece.piece[cut:] in parts
    ]
    merges.sort(key=lambda merge: merge[0])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[left, right] for _, left, right in merges],
    }

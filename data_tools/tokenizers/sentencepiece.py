"""What is in a SentencePiece model: its type, its special pieces, and its conversion to a
tokenizer.json.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from llada.types import JsonObject

# The classes of the model's protocol buffers are generated at run time, so they have no types.
ModelProto: TypeAlias = Any

ESCAPES = (("\uf8ff", "\uf8ffB"), ("\u2581", "\uf8ffA"))
"""Replacements (old, new) that make a model lossless, in the order in which they are applied.

SentencePiece writes a space as U+2581, and decodes a U+2581 of the text as a space. Models trained
here write that character as two others. The first of these, U+F8FF from the private use area, is
written as two characters as well, so that every text is decoded as it was.
"""
LOSSLESS = "llada_lossless"
"""Name of a normalizer that applies ESCAPES and nothing else."""

# `ModelProto.SentencePiece.Type` and `TrainerSpec.ModelType`.
_NORMAL = 1
_UNKNOWN = 2
_USER_DEFINED = 4
_UNIGRAM = 1
_BPE = 2


def parse(model: bytes) -> ModelProto:
    """Return the model's protocol buffer.

    Raises:
        ImportError: protobuf is not installed.
        google.protobuf.message.DecodeError: not a model.
    """
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2
    proto = module.ModelProto()
    proto.ParseFromString(model)
    return proto


def describe_model_type(model: bytes) -> str:
    """Describe the type of a model for people."""
    trainer = parse(model).trainer_spec
    names = {_UNIGRAM: "unigram", _BPE: "BPE"}
    name = names.get(trainer.model_type, "word or character model")
    if trainer.byte_fallback:
        name += " with byte fallback"
    return f"SentencePiece {name}"


def special_pieces(model: bytes) -> list[str]:
    """Return the pieces that are not text: unknown, control, user-defined and byte pieces."""
    return [piece.piece for piece in parse(model).pieces if piece.type != _NORMAL]


def to_tokenizer_json(model: bytes) -> tuple[str, str]:
    """Convert a model to a tokenizer.json that should give the same ids, for libraries that read
    only this format. The caller has to compare the ids.

    Control pieces become ordinary tokens that no merge produces, so no text is encoded to them.

    Returns:
        The definition, and the prefix to put before every text that is not empty. (A normalizer
        that adds the prefix would also add it after every user-defined piece.)

    Raises:
        ValueError: a tokenizer.json cannot express the model.
    """
    proto = parse(model)
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f"a {describe_model_type(model)} model, not BPE")
    if not normalizer.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("a SentencePiece model with its own way of writing spaces")
    is_lossless = normalizer.name == LOSSLESS
    if normalizer.remove_extra_whitespaces or (normalizer.precompiled_charsmap and not is_lossless):
        raise ValueError("a SentencePiece model that normalizes text")
    replacements = [(" ", "\u2581")]
    if is_lossless:
        # First: a U+2581 of the text must not be taken for a space.
        replacements = [*ESCAPES, *replacements]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replacement(old, new) for old, new in replacements],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": _bpe_model(proto),
    }
    prefix = " " if normalizer.add_dummy_prefix else ""
    return json.dumps(definition, ensure_ascii=False), prefix


def _added_tokens(proto: ModelProto) -> list[JsonObject]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokens = []
    for token_id, piece in enumerate(proto.pieces):
        if piece.type == _USER_DEFINED:
            tokens.append({"id": token_id, "content": piece.piece, **flags})
    return tokens


def _replacement(old: str, new: str) -> JsonObject:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _bpe_model(proto: ModelProto) -> JsonObject:
    """Return the model with merges instead of scores.

    SentencePiece joins the two neighbors that form the piece with the best score. So a piece gets
    a merge for every way to cut it into two pieces: "abc" gets ("a", "bc") and ("ab", "c"), if
    these pieces exist.
    """
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    normal = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    merges: list[tuple[float, str, str]] = []
    for piece in proto.pieces:
        if piece.type != _NORMAL:
            continue
        text = piece.piece
        for cut in range(1, len(text)):
            left = text[:cut]
            right = text[cut:]
            if left in normal and right in normal:
                merges.append((piece.score, left, right))
    # The best score comes first. The sort is stable: equal scores stay in the order of ids.
    merges.sort(key=lambda merge: -merge[0])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)},
        "merges": [[left, right] for _, left, right in merges],
    }

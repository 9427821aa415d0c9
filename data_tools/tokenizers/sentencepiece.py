"""Inside a SentencePiece model: what kind it is, its special pieces, and the same tokenizer as a
tokenizer.json.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from data_tools.types import JsonObject

# The classes of the model's protocol buffers are generated at run time, so they have no types.
ModelProto: TypeAlias = Any

ESCAPES = (("\uf8ff", "\uf8ffB"), ("\u2581", "\uf8ffA"))
"""(old, new), in the order in which they are applied.

SentencePiece writes a space as U+2581 and reads a U+2581 of the text as a space. Models trained
here spell that character as two others. The first of these, U+F8FF from the private use area, is
spelled as two characters as well, so every text comes back.
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
    """Return what type of model it is, for people."""
    trainer = parse(model).trainer_spec
    names = {_UNIGRAM: "unigram", _BPE: "BPE"}
    name = names.get(trainer.model_type, "word or character model")
    fallback = " with byte fallback" if trainer.byte_fallback else ""
    return f"SentencePiece {name}{fallback}"


def special_pieces(model: bytes) -> list[str]:
    """Return the pieces that are not text: unknown, control, user-defined and byte pieces."""
    return [piece.piece for piece in parse(model).pieces if piece.type != _NORMAL]


def to_tokenizer_json(model: bytes) -> tuple[str, str]:
    """Return a tokenizer.json that is meant to give every text the ids of a model, for libraries
    that read only that. The caller has to compare the ids.

    Control pieces are ordinary tokens in it that no merge reaches, so text cannot spell them.

    Returns:
        The definition, and what must be put before every text that is not empty. (A normalizer
        that adds it would also add it behind every user-defined piece.)

    Raises:
        ValueError: a model that a tokenizer.json cannot express.
    """
    proto = parse(model)
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != _BPE:
        raise ValueError(f"a {describe_model_type(model)} model, not BPE")
    if not normalizer.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("a SentencePiece model with its own way of writing spaces")
    is_lossless = normalizer.name == LOSSLESS
    if normalizer.remove_extra_whitespaces or (normalizer.precompiled_charsmap and not is_lossless):
        raise ValueError("a SentencePiece model that normalises text")
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
    """Return the model with a list of merges in place of scores.

    SentencePiece joins the neighbours whose joint piece has the best score, whatever its parts are.
    So a piece gets a merge for every way to cut it into two pieces: "abc" with ("a", "bc") and
    ("ab", "c"), if these exist.
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
    # The best score first; the sort is stable, so equal scores stay in order of their ids.
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

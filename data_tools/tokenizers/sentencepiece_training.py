"""Train SentencePiece models that decode every text as it was."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_tools.tokenizers.passages import PASSAGE_CHARACTERS, cut_passages
from data_tools.tokenizers.sentencepiece import ESCAPES, LOSSLESS, parse
from llada.errors import UserError, one_line
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer

_NUM_THREADS = 8
"""Threads of the trainer. The number is fixed because the sums of unigram training depend on it:
every machine trains the same model.
"""
_LARGE_CORPUS = 1 << 30
"""Number of characters from which SentencePiece needs 64-bit positions."""
_NUM_BYTES = 256
_SPACE = "\u2581"
"""How SentencePiece writes a space."""


def train_sentencepiece(passages: Sequence[str], vocab_size: int, kind: str) -> Tokenizer:
    """Train a SentencePiece model, with LLaDA's special tokens after its last id.

    All spaces are kept, and none is added in front. Every digit is a token, and characters without
    a piece become UTF-8 bytes.

    Args:
        passages: texts, on whose lines the model is trained.
        vocab_size: number of ids: the unknown token, 256 bytes, 6 special tokens, and pieces.
        kind: "unigram" or "bpe".

    Raises:
        UserError: the text cannot fill the vocabulary, or has more characters than fit into it.
    """
    # The unknown token, the bytes, the space and the special tokens.
    smallest = 1 + _NUM_BYTES + 1 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size: {vocab_size} is less than {smallest}, the unknown token, the bytes, the"
            " space and the special tokens"
        )
    model = _train_model(passages, vocab_size, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        path.write_bytes(_without_temporary_names(model))
        tokenizer = Tokenizer.load(path, require_mask=False).with_special_tokens()
    tokenizer.name = "trained tokenizer"
    return tokenizer


def _train_model(passages: Sequence[str], vocab_size: int, kind: str) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder, "rules.tsv")
        inverse_rules = Path(folder, "inverse.tsv")
        rules.write_text("".join(_rule(old, new) for old, new in ESCAPES))
        inverse_rules.write_text("".join(_rule(new, old) for old, new in ESCAPES))
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_sentences(passages),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size - len(SPECIAL_TOKENS),
                normalization_rule_tsv=str(rules),
                denormalization_rule_tsv=str(inverse_rules),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                # As bytes, a space would come back as the character U+2581.
                required_chars=_SPACE,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                # In bytes, of which a character has at most 4, so no line is too long.
                max_sentence_length=8 * PASSAGE_CHARACTERS,
                train_extremely_large_corpus=sum(map(len, passages)) >= _LARGE_CORPUS,
                num_threads=_NUM_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(_training_error(vocab_size, str(error))) from None
    return model.getvalue()


def _rule(old: str, new: str) -> str:
    """Return a line of a file of normalization rules."""
    return f"{_code_points(old)}\t{_code_points(new)}\n"


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


def _sentences(passages: Iterable[str]) -> Iterator[str]:
    """Yield the lines of passages that are not blank."""
    for text in passages:
        for passage in cut_passages(text):
            for line in passage.split("\n"):
                if line and not line.isspace():
                    # SentencePiece ends a line at a NUL, and skips lines with U+2585, which it uses
                    # for the unknown token.
                    yield line.replace("\0", " ").replace("\u2585", " ")


def _without_temporary_names(model: bytes) -> bytes:
    """Remove the names of temporary files from a model, so that it is the same every time."""
    proto = parse(model)
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.name = LOSSLESS
        spec.ClearField("normalization_rule_tsv")
    return bytes(proto.SerializeToString(deterministic=True))


def _training_error(vocab_size: int, message: str) -> str:
    """Explain an error of SentencePiece, whose numbers do not count special tokens."""
    num_special = len(SPECIAL_TOKENS)
    too_high = re.search(r"Vocabulary size too high.*<= (\d+)", message, re.DOTALL)
    if too_high:
        most = int(too_high[1]) + num_special
        return (
            f"vocab_size: {vocab_size} is more than the text can fill; at most {most} with this"
            " sample"
        )
    too_small = re.search(r"smaller than required_chars. (\d+) vs (\d+)", message, re.DOTALL)
    if too_small:
        least = int(too_small[2]) + num_special
        return (
            f"vocab_size: {vocab_size} has no room for the characters of the text; at least"
            f" {least} with this sample"
        )
    if "sentences_.empty()" in message:
        return "--input: no text to train on, only spaces and line ends"
    reason = one_line(message)
    return f"vocab_size: {vocab_size}: SentencePiece cannot train on this text ({reason[-200:]})"

"""How well a tokenizer fits a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada.tokenizer import Tokenizer

MEASURED_BYTES = 1 << 20
"""Approximate bytes of text to measure."""


@dataclass(frozen=True)
class Fit:
    """How a tokenizer cuts a text.

    Attributes:
        text_bytes: UTF-8 bytes of the text.
        words: number of words, separated by white space.
        tokens: number of tokens, without EOS.
    """

    text_bytes: int
    words: int
    tokens: int

    def __str__(self) -> str:
        bytes_per_token = self.text_bytes / max(1, self.tokens)
        tokens_per_byte = self.tokens / max(1, self.text_bytes)
        tokens_per_word = self.tokens / max(1, self.words)
        return (
            f"{bytes_per_token:.2f} bytes per token, {tokens_per_byte:.3f} tokens per byte,"
            f" {tokens_per_word:.2f} tokens per word on {self.text_bytes:,} bytes"
        )


def measure_fit(tokenizer: Tokenizer, texts: Sequence[str]) -> Fit:
    """Count the tokens, bytes and words of texts."""
    ids, _ = tokenizer.encode_batch(list(texts))
    return Fit(
        text_bytes=sum(len(text.encode()) for text in texts),
        words=sum(len(text.split()) for text in texts),
        tokens=len(ids),
    )

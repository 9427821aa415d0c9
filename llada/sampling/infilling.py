"""Text with gaps: `[MASK]` is a gap of one token, `[MASK*8]` one of eight."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from llada.errors import UserError
from llada.sampling.diffusion import LONGEST
from llada.tokenizer import Tokenizer

_GAP = re.compile(r"\[MASK(?:\*(\d+))?\]")
# What looks like a misspelled gap, such as [mask] or [MASK 8].
_MISSPELLED_GAP = re.compile(r"\[\s*mask[^\]]*\]", re.IGNORECASE)


@dataclass(frozen=True)
class TextWithGaps:
    """A tokenized text with gaps.

    Attributes:
        tokens: int64 [1, s], [MASK] in the gaps.
        spans: First and past-the-last position of each gap.
    """

    tokens: torch.Tensor
    spans: tuple[tuple[int, int], ...]


def parse(text: str, tokenizer: Tokenizer) -> TextWithGaps:
    """Tokenize a text with gaps.

    The stretches between the gaps are tokenized separately, so no token spans a gap's border.
    Example: "a[MASK*2]b" becomes the ids of "a", [MASK], [MASK], and the ids of "b".

    Raises:
        UserError: No gap, a gap of no tokens or of too many, or a misspelled one.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    last = 0
    for match in _GAP.finditer(text):
        ids += _encode(text[last : match.start()], tokenizer)
        count = _gap_length(match)
        spans.append((len(ids), len(ids) + count))
        ids += [tokenizer.mask_id] * count
        last = match.end()
    if not spans:
        raise UserError("TEXT: no gap; write [MASK] for one token or [MASK*8] for eight")
    ids += _encode(text[last:], tokenizer)
    return TextWithGaps(torch.tensor([ids]), tuple(spans))


def _gap_length(match: re.Match[str]) -> int:
    """Length of a gap, in tokens."""
    digits = (match[1] or "1").lstrip("0") or "0"
    # Compare the number of digits first: Python refuses to convert very long ones.
    too_long = len(digits) > len(str(LONGEST)) or int(digits) > LONGEST
    if digits == "0" or too_long:
        raise UserError(f"TEXT: {match[0]} is a gap of {digits} tokens; allowed are 1 to {LONGEST}")
    return int(digits)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    misspelled = _MISSPELLED_GAP.search(text)
    if misspelled:
        raise UserError(
            f"TEXT: '{misspelled[0]}' is not a gap; write [MASK] for one token or [MASK*8] for"
            " eight"
        )
    return tokenizer.encode(text).tolist()

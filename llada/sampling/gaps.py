"""Text with gaps: `[MASK]` is a gap of one token, `[MASK*8]` one of eight."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from llada.errors import UserError
from llada.sampling.diffusion import LONGEST
from llada.tokenizer import Tokenizer

_GAP = re.compile(r"\[MASK(?:\*(\d+))?\]")
_LIKELY = re.compile(r"\[\s*mask[^\]]*\]", re.IGNORECASE)


@dataclass(frozen=True)
class Gapped:
    """A text with gaps as ids.

    Attributes:
        tokens: int64 [1, s], [MASK] in the gaps.
        spans: first and past-the-last position of each gap.
    """

    tokens: torch.Tensor
    spans: tuple[tuple[int, int], ...]


def parse(text: str, tokenizer: Tokenizer) -> Gapped:
    """Encode the text between the gaps, each piece alone.

    Raises:
        UserError: no gap, an empty gap, or something that looks like a misspelt one.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    last = 0
    for match in _GAP.finditer(text):
        ids += _text(text[last : match.start()], tokenizer)
        digits = (match[1] or "1").lstrip("0") or "0"
        if digits == "0" or len(digits) > len(str(LONGEST)) or int(digits) > LONGEST:
            raise UserError(
                f"TEXT: {match[0]} is a gap of {digits} tokens; allowed are 1 to {LONGEST}"
            )
        count = int(digits)
        spans.append((len(ids), len(ids) + count))
        ids += [tokenizer.mask_id] * count
        last = match.end()
    if not spans:
        raise UserError("TEXT: no gap; write [MASK] for one token or [MASK*8] for eight")
    ids += _text(text[last:], tokenizer)
    return Gapped(torch.tensor([ids]), tuple(spans))


def _text(text: str, tokenizer: Tokenizer) -> list[int]:
    found = _LIKELY.search(text)
    if found:
        raise UserError(
            f"TEXT: '{found[0]}' is no gap; write [MASK] for one token or [MASK*8] for eight"
        )
    return tokenizer.encode(text).tolist()

"""Check whether token ids that another tool wrote are those of a tokenizer.

Two signs show this: whether encoding the text of the ids gives them again, and whether documents
end with EOS.
"""

from __future__ import annotations

from collections import Counter

from llada.arrays import I64
from llada.errors import UserError
from llada.tokenizer import Tokenizer

_SAMPLE_TOKENS = 20_000
"""Number of tokens of a dataset whose text is encoded again."""
_FEWEST_TOKENS = 200
"""Number of tokens below which the share of equal ids means nothing."""

# Shares of the ids that encoding their text gives again. The right tokenizer gives all of them,
# except for a few if documents were encoded in pieces. Others gave 73 to 95 % (byte-level BPE of
# 300 to 8,192 ids and SentencePiece of 1,000 ids, trained on Python and on prose).
_RIGHT_SHARE = 0.97
"""Share below which there is doubt about the tokenizer."""
_WRONG_SHARE = 0.5
"""Share below which the tokenizer is refused, even if documents end with its EOS."""
_REMEDY = "--tokenizer must be the one they were made with"


class TokenizerAgreement:
    """How well a tokenizer fits the documents of one dataset.

    Args:
        tokenizer: tokenizer that is said to have made the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_documents = 0
        self._num_with_eos = 0
        self._num_tokens = 0  # of the sample
        self._num_equal = 0  # tokens of the sample that encoding its text gives again
        self._is_text: dict[int, bool] = {}  # by id

    def add(self, ids: I64, text: str) -> None:
        """Observe a document.

        Args:
            ids: ids of the document, not empty.
            text: text that the ids decode to.
        """
        self._num_documents += 1
        self._num_with_eos += int(ids[-1]) == self._tokenizer.eos_id
        if self._num_tokens < _SAMPLE_TOKENS:
            # Compared as multisets, because ids shift if a document was encoded in pieces.
            original = Counter(filter(self._stands_for_text, ids.tolist()))
            encoded_again = Counter(self._tokenizer.encode(text).tolist())
            self._num_tokens += sum(original.values())
            self._num_equal += sum((original & encoded_again).values())

    def _stands_for_text(self, token_id: int) -> bool:
        """Return whether an id is not that of a special token, to which no text is encoded."""
        if token_id not in self._is_text:
            text = self._tokenizer.decode([token_id], skip_special_tokens=True)
            self._is_text[token_id] = bool(text)
        return self._is_text[token_id]

    def doubts(self, path: str) -> list[str]:
        """Return a line that says why the tokenizer may be a wrong one; empty if nothing does.

        Args:
            path: path of the dataset, for the message.

        Raises:
            UserError: the data was made with another tokenizer.
        """
        share = 1.0
        if self._num_tokens >= _FEWEST_TOKENS:
            share = self._num_equal / self._num_tokens
        no_eos = self._num_documents > 0 and not self._num_with_eos
        reasons = []
        if share < _RIGHT_SHARE:
            reasons.append(
                f"encoding the text of its ids gives {share:.1%} of them again, where the right"
                " tokenizer gives all"
            )
        if no_eos:
            reasons.append(
                f"none of its {self._num_documents:,} documents ends with this tokenizer's EOS, id"
                f" {self._tokenizer.eos_id}"
            )
        if not reasons:
            return []
        # Without EOS, a small doubt about the ids is enough.
        refused_below = _RIGHT_SHARE if no_eos else _WRONG_SHARE
        if share < refused_below:
            raise UserError(
                f"import: {path} was made with another tokenizer: {'; '.join(reasons)}; {_REMEDY}"
            )
        return [f"{path}: {'; '.join(reasons)}; {_REMEDY}"]

"""Whether token ids that another tool wrote are those of a tokenizer: what their text is encoded
to, and the EOS that ends documents.
"""

from __future__ import annotations

from collections import Counter

from llada.data.shard_format import I64
from llada.errors import UserError
from llada.tokenizer import Tokenizer

_SAMPLE = 20_000
"""Tokens of a dataset whose text is encoded again."""
_ENOUGH = 200
"""Tokens from which on a share says something."""
_RIGHT, _HOPELESS = 0.97, 0.5
"""Shares of the tokens that come back. The right tokenizer gives all, but for a few where documents
were encoded in parts. Others gave 73 to 95 % (byte-level BPE of 300 to 8,192 ids and SentencePiece
of 1,000 ids, trained on Python and on prose).
"""
_REMEDY = "--tokenizer must be the one they were made with"


class Agreement:
    """Of a tokenizer with the documents of one dataset.

    Args:
        tokenizer: under which the ids are read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._documents = self._with_eos = self._tokens = self._same = 0
        self._is_text: dict[int, bool] = {}

    def add(self, ids: I64, text: str) -> None:
        """Look at a document that is not empty.

        Args:
            ids: as they were read.
            text: that they stand for.
        """
        self._documents += 1
        self._with_eos += int(ids[-1]) == self._tokenizer.eos_id
        if self._tokens < _SAMPLE:
            given = Counter(filter(self._stands_for_text, ids.tolist()))
            again = Counter(self._tokenizer.encode(text).tolist())
            self._tokens += sum(given.values())
            self._same += sum((given & again).values())

    def _stands_for_text(self, token_id: int) -> bool:
        """False for special tokens, which no text is encoded to."""
        if token_id not in self._is_text:
            self._is_text[token_id] = bool(
                self._tokenizer.decode([token_id], skip_special_tokens=True)
            )
        return self._is_text[token_id]

    def doubts(self, path: str) -> list[str]:
        """What speaks against this tokenizer, one line.

        Args:
            path: of the dataset, for messages.

        Raises:
            UserError: too much does.
        """
        share = self._same / self._tokens if self._tokens >= _ENOUGH else 1.0
        no_eos = self._documents > 0 and not self._with_eos
        found = []
        if share < _RIGHT:
            found.append(
                f"encoding the text of its ids gives {share:.1%} of them again, where the right"
                " tokenizer gives all"
            )
        if no_eos:
            found.append(
                f"none of its {self._documents:,} documents ends with this tokenizer's EOS, id"
                f" {self._tokenizer.eos_id}"
            )
        if share < (_RIGHT if no_eos else _HOPELESS):
            raise UserError(
                f"import: {path} was made with another tokenizer: {'; '.join(found)}; {_REMEDY}"
            )
        return [f"{path}: {'; '.join(found)}; {_REMEDY}"] if found else []

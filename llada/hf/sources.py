"""Weights made from other weights, a few rows at a time (see `llada.model.weights.Weights`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llada.hf.tensor_files import TensorFiles
from llada.model.weights import BLOCK_ELEMENTS, EMBEDDING, HEAD, Weights, row_blocks


class Renamed:
    """Weights under other names.

    Args:
        source: The weights, such as those of a folder.
        names: New name -> name in the source, in the order in which they are written.
    """

    def __init__(self, source: Weights, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = dict(names)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: source.shapes[old] for name, old in names.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        """The dtype as stored."""
        return self._source.dtype(self._names[name])

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor."""
        return self._source.rows(self._names[name], first, last)


class Mean:
    """The mean of several models' weights, summed in fp64, as fp32.

    Args:
        sources: At least one, all of the same shapes.
    """

    def __init__(self, sources: Sequence[Weights]) -> None:
        self._sources = sources
        self.shapes = sources[0].shapes

    def dtype(self, name: str) -> torch.dtype:
        """fp32."""
        return torch.float32

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor."""
        total = self._sources[0].rows(name, first, last).double()
        for source in self._sources[1:]:
            total += source.rows(name, first, last)
        return (total / len(self._sources)).float()


class GrownVocabulary:
    """Weights whose embedding and head have rows for new tokens.

    A new row is the mean of the old tokens' rows: the best guess of a model that knows nothing of
    the new token. With 500 tokens in 512 rows, 3 new tokens and 512 rows in all, rows 0 to 499 and
    503 to 511 are kept and rows 500 to 502 are new.

    Args:
        source: The weights to extend.
        num_tokens: Number of old tokens; their rows are the first ones.
        num_new_tokens: Number of new tokens; their rows follow.
        num_rows: Rows in all. Rows beyond the source's are the mean too.
    """

    def __init__(
        self, source: Weights, num_tokens: int, num_new_tokens: int, num_rows: int
    ) -> None:
        self._source = source
        self._num_tokens = num_tokens
        self._num_tokens_after = num_tokens + num_new_tokens
        self._num_rows_before = source.shapes[EMBEDDING][0]
        self._means: dict[str, torch.Tensor] = {}
        shapes = dict(source.shapes)
        for name in (EMBEDDING, HEAD):
            if name in shapes:  # a tied model has no head
                shapes[name] = (num_rows, shapes[name][1])
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the source."""
        return self._source.dtype(name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor."""
        if name not in (EMBEDDING, HEAD):
            return self._source.rows(name, first, last)
        out = self._mean(name).repeat(last - first, 1)
        # Copy the rows that are kept: those of the old tokens, and padding behind the new tokens.
        kept = ((0, self._num_tokens), (self._num_tokens_after, self._num_rows_before))
        for start, stop in kept:
            low = max(first, start)
            high = min(last, stop)
            if low < high:
                out[low - first : high - first] = self._source.rows(name, low, high)
        return out

    def _mean(self, name: str) -> torch.Tensor:
        """The mean of the old tokens' rows, [width], summed in fp64."""
        if name not in self._means:
            width = self._source.shapes[name][1]
            total = torch.zeros(width, dtype=torch.float64)
            for first, last in row_blocks((self._num_tokens, width), BLOCK_ELEMENTS):
                total = total + self._source.rows(name, first, last).double().sum(0)
            self._means[name] = (total / self._num_tokens).to(self.dtype(name))
        return self._means[name]


def equal(files: TensorFiles, one: str, other: str) -> bool:
    """Whether two tensors of a folder are the same, bit for bit."""
    if files.shapes[one] != files.shapes[other] or files.dtype(one) != files.dtype(other):
        return False
    for first, last in row_blocks(files.shapes[one], BLOCK_ELEMENTS):
        if not torch.equal(files.rows(one, first, last), files.rows(other, first, last)):
            return False
    return True

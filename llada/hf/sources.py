"""Weights made of other weights, some rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llada.hf.tensor_files import TensorFiles
from llada.model.weights import BLOCK_ELEMENTS, EMBEDDING, HEAD, Weights, row_blocks


class Renamed:
    """The tensors of a folder under canonical names.

    Args:
        files: of the folder.
        names: canonical name -> name in the folder, in the order of the published files.
    """

    def __init__(self, files: TensorFiles, names: Mapping[str, str]) -> None:
        self._files, self._names = files, dict(names)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            canonical: files.shapes[own] for canonical, own in names.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._files.dtypes[self._names[name]]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of a tensor."""
        return self._files.rows(self._names[name], first, last)


class Mean:
    """The mean of several models' weights, summed in fp64, as fp32.

    Args:
        sources: at least one, of the same shapes.
    """

    def __init__(self, sources: Sequence[Weights]) -> None:
        self._sources = sources
        self.shapes = sources[0].shapes

    def dtype(self, name: str) -> torch.dtype:
        """fp32."""
        return torch.float32

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of a tensor."""
        total = self._sources[0].rows(name, first, last).double()
        for source in self._sources[1:]:
            total += source.rows(name, first, last)
        return (total / len(self._sources)).float()


class GrownVocabulary:
    """Weights with new rows in embedding and head: each is the mean of the rows that stand for
    tokens, which is what a model that knows nothing of a new token would guess.

    Args:
        source: whose other rows stay as they are.
        tokens: rows that stand for tokens, the first ones; new tokens take the rows after them.
        new_tokens: how many come after them.
        size: rows in all.
    """

    def __init__(self, source: Weights, tokens: int, new_tokens: int, size: int) -> None:
        self._source, self._tokens, self._taken = source, tokens, tokens + new_tokens
        self._before = source.shapes[EMBEDDING][0]
        self._means: dict[str, torch.Tensor] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (size, shape[1]) if name in (EMBEDDING, HEAD) else shape
            for name, shape in source.shapes.items()
        }

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self._source.dtype(name)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` of a tensor."""
        if name not in (EMBEDDING, HEAD):
            return self._source.rows(name, first, last)
        out = self._mean(name).repeat(last - first, 1)
        for start, stop in ((0, self._tokens), (self._taken, self._before)):  # what is kept
            low, high = max(first, start), min(last, stop)
            if low < high:
                out[low - first : high - first] = self._source.rows(name, low, high)
        return out

    def _mean(self, name: str) -> torch.Tensor:
        if name not in self._means:
            width = self._source.shapes[name][1]
            blocks = row_blocks((self._tokens, width), BLOCK_ELEMENTS)
            total = sum(
                (self._source.rows(name, *block).double().sum(0) for block in blocks),
                torch.zeros(width, dtype=torch.float64),
            )
            self._means[name] = (total / self._tokens).to(self.dtype(name))
        return self._means[name]


def equal(files: TensorFiles, one: str, other: str) -> bool:
    """Whether two tensors of a folder are the same, bit for bit."""
    if files.shapes[one] != files.shapes[other] or files.dtypes[one] != files.dtypes[other]:
        return False
    blocks = row_blocks(files.shapes[one], BLOCK_ELEMENTS)
    return all(torch.equal(files.rows(one, *block), files.rows(other, *block)) for block in blocks)

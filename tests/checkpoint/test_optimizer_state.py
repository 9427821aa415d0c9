"""The rectangles that a rank's flat part of a tensor consists of, against the elements themselves."""

from __future__ import annotations

import pytest
import torch

from llada.checkpoint.optimizer_state import _rectangles


@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), (3, 4), (4, 3)])
def test_every_range_is_covered_once_and_in_its_place(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel())
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            target = torch.full(shape, -1)
            for low, high, size, corner in _rectangles(start, stop, shape):
                area = tuple(
                    slice(first, first + length) for first, length in zip(corner, size, strict=True)
                )
                assert (target[area] == -1).all(), "an element lies in two rectangles"
                target[area] = whole[low:high].view(size)
            inside = (whole >= start) & (whole < stop)
            assert torch.equal(target.view(-1), torch.where(inside, whole, -1)), (start, stop)

"""What the engine leaves out in a world of one process."""

from __future__ import annotations

import pytest
import torch

from llada.engine import cpu
from llada.engine.megatron import MegatronEngine
from tests.engine.support import small_config, step_batches

COPIED = "collective was called"


class Group:
    """As much of a process group as is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def collective(output: torch.Tensor, source: torch.Tensor, op: str, *, group: Group) -> str:
    return f"{COPIED} with {op}"


@pytest.mark.parametrize(
    ("size", "first", "result"),
    [
        (1, 0, None),
        # Another rank's values, or a part that is stored elsewhere
        (2, 0, f"{COPIED} with sum"),
        (1, 2, f"{COPIED} with sum"),
    ],
)
def test_a_group_of_one_rank_does_not_exchange_a_buffer_with_itself(
    size: int, first: int, result: str | None
) -> None:
    source = torch.arange(4.0)
    exchange = cpu._among_several(collective)
    assert exchange(source[first:], source, "sum", group=Group(size)) == result


def test_a_step_of_one_process_exchanges_numbers_only() -> None:
    engine = MegatronEngine(small_config())
    try:
        batches = step_batches(engine.config, 0)
        with torch.profiler.profile() as profiler:
            assert engine.train_step(batches, 1e-3).applied
    finally:
        engine.close()
    exchanges = {
        event.key.removeprefix("gloo:")
        for event in profiler.key_averages()
        if event.key.startswith("gloo:")
    }
    assert exchanges == {"all_reduce"}, exchanges

"""Where these tests compute: on the CPU at a toy size in every test run, and with `pytest -m gpu`
on a GPU at a size that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from llada.config import RunConfig
from tests.engine.support import small_config


class Hardware(NamedTuple):
    """The device of a test, and runs of a size that suits it."""

    device: str

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def config(self, **sections: Any) -> RunConfig:
        """Grouped queries, four layers, documents; on a GPU with heads of 128, as in the published
        models.
        """
        if not self.is_gpu:
            return small_config(**sections)
        model = {
            "hidden_size": 512,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 1024,
            "vocab_size": 8192,
            **sections.pop("model", {}),
        }
        data = {"sequence_length": 512, "mixture": [{"path": "unused"}], "document_mask": True}
        return small_config(model=model, data=data, **sections)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def hardware(request: pytest.FixtureRequest) -> Hardware:
    return Hardware(request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What run.deterministic does to this process."""
    from llada.engine.determinism import use_deterministic_algorithms

    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)

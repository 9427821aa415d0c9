"""One pool of ranks for all distributed tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    made = RankPool(8, tmp_path_factory.mktemp("pool"))
    yield made
    made.close()

"""One Slurm cluster, one corpus and one uninterrupted run for all tests of this folder.

A test marked with @scenario runs beside the others on an island of nodes of its own; it needs more
patience than processor time.
"""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs
from data_tools.readers.report import Report
from llada.tokenizer import train_byte_level_bpe
from tests.preparation import prepare
from tests.slurm.cluster import Cluster, missing
from tests.slurm.island import Island, commands_talk_to
from tests.slurm.scenarios import Scenarios

ISLANDS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(str(item.fspath)).is_relative_to(Path(__file__).parent)]
    reason = missing(accounting=True) if own else None
    # Scenarios come first, since the other tests change what belongs to the whole process; first of
    # all those that have to wait for the clock.
    beside = sorted(
        (item for item in own if hasattr(getattr(item, "obj", None), "body")),
        key=lambda item: "time_limit" not in item.name,
    )
    items[:] = [*beside, *(item for item in items if item not in beside)]
    for item in own:
        item.add_marker(pytest.mark.slurm)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"slurm: {reason}"))


@pytest.fixture(scope="session")
def disk() -> Iterator[Path]:
    """A folder that every node sees.

    Pytest's own may lie in /dev/shm, and every node has its own /dev/shm.
    """
    with tempfile.TemporaryDirectory(prefix="llada-slurm-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def corpus(disk: Path) -> Path:
    """A folder with a tokenizer and a corpus."""
    folder = disk / "runs"
    folder.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = train_byte_level_bpe(read_inputs([library / "json"], ReadOptions(), Report()), 512)
    tokenizer.save(folder / "tokenizer")
    prepare(
        [library / "json", library / "email"],
        folder / "tokenizer",
        folder / "corpus",
        validation_fraction=0.15,
    )
    return folder


@pytest.fixture(scope="session")
def cluster(disk: Path) -> Iterator[Cluster]:
    """Islands of three nodes of eight cores and four GPUs, without accounting."""
    cluster = Cluster(disk / "cluster", islands=ISLANDS)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def island(cluster: Cluster, corpus: Path) -> Iterator[Island]:
    """The corpus's folder and the first island, for tests that run alone.

    Every node is idle, and no job is left of earlier tests.
    """
    with commands_talk_to(cluster, corpus):
        island = Island(corpus, cluster)
        yield island
        island.clear()


@pytest.fixture(scope="session")
def scenarios(
    request: pytest.FixtureRequest, cluster: Cluster, corpus: Path
) -> Iterator[Scenarios]:
    """All selected scenarios, once their bodies have ended."""
    bodies = [
        item.obj.body
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item.obj, "body")
    ]
    with commands_talk_to(cluster, corpus):
        running = Scenarios(cluster, corpus, bodies)
        try:
            running.wait()
            yield running
        finally:
            running.close()

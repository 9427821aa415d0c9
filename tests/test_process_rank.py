"""The rank in the environment: complete, or refused in one line."""

from __future__ import annotations

import pytest

from llada.errors import UserError
from llada.process_rank import ProcessRank, world_from_environment

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def _no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN, "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)


def world(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> ProcessRank:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return world_from_environment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, (1, 2, 1, 1)),
        (TORCHRUN, (1, 2, 1, 2)),
        (SRUN, (3, 4, 1, 4)),
        (SRUN | {"SLURM_STEP_NUM_NODES": "2"}, (3, 4, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_NODES": "2"}, (0, 1, 0, 1)),
    ],
    ids=["alone", "torchrun", "one machine", "srun", "two nodes", "a world of one"],
)
def test_a_complete_environment(
    variables: dict[str, str], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world(monkeypatch, variables) == ProcessRank(*expected)


@pytest.mark.parametrize(
    ("variables", "without", "message"),
    [
        (TORCHRUN, "WORLD_SIZE", "RANK=1 is set and WORLD_SIZE is not; set both"),
        (
            TORCHRUN,
            "RANK",
            "RANK/WORLD_SIZE/LOCAL_RANK must be integers, set by torchrun or srun; RANK is not set",
        ),
        (TORCHRUN, "MASTER_ADDR", "WORLD_SIZE=2, but MASTER_ADDR is not set"),
        (TORCHRUN, "MASTER_PORT", "WORLD_SIZE=2, but MASTER_PORT is not set"),
        (SRUN, "MASTER_PORT", "SLURM_NTASKS=4, but MASTER_PORT is not set"),
        (SRUN, "MASTER_ADDR", "srun started 4 tasks, but MASTER_ADDR"),
    ],
)
def test_an_incomplete_environment(
    variables: dict[str, str], without: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"^environment: {message}"):
        world(monkeypatch, {name: value for name, value in variables.items() if name != without})

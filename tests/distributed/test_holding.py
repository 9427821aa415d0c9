"""The folder of a run of several ranks: one holds it, all learn why it cannot be held."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.holding import hold_and_release
from tests.distributed.pool import RankPool


def test_rank_0_holds_the_folder_and_all_are_refused_together(
    pool: RankPool, tmp_path: Path
) -> None:
    assert pool.run(hold_and_release, tmp_path / "run") == [
        (rank == 0, "") for rank in range(pool.size)
    ]
    (tmp_path / "run").write_text("a file")
    outcomes = pool.run(hold_and_release, tmp_path / "run")
    assert outcomes == [(False, outcomes[0][1])] * pool.size
    assert outcomes[0][1].startswith(f"run.dir: '{tmp_path}/run' cannot be created (File exists)")

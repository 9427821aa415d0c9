"""What clusters do to a run, on a real Slurm.

After each of them the curve of the run equals that of a run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.slurm.cluster import until
from tests.slurm.island import STEPS, Island
from tests.slurm.scenarios import scenario


@scenario
def test_time_limit_saves_requeues_and_goes_on_also_when_a_rank_hangs(island: Island) -> None:
    """One run stops cleanly; of the other, a rank never does.

    Without the launcher's own limit, Slurm would end that supervisor with the ranks, and nobody
    would requeue the job. Both run at once, since the minutes have to pass.
    """
    profile = island.profile("minutes", time="3", signal_seconds=6)
    job = island.launch("limit", profile=profile)
    island.launch("late", profile=profile)
    island.wait_step("limit", 7)
    with island.paused("limit"):
        island.wait_step("late", 7)
        os.kill(island.ranks("late")[1], signal.SIGSTOP)
        # Slurm looks at time limits every half minute.
        until(
            lambda: all(_pending(pid, signal.SIGUSR1) for pid in island.ranks("limit").values()),
            200,
            "the warning before the time limit",
        )
    requeued = island.wait_event("limit", "requeued")
    assert "failure" not in requeued and requeued["reason"] == "SIGUSR1: stopped with a checkpoint"
    assert requeued["step"] == island.events("limit", "signal")[0]["step"] >= 7
    assert island.wait_event("late", "requeued", seconds=60)["step"] >= 5
    status = island.wait_state("limit", "FINISHED", seconds=150)
    assert (
        status.jobs == [f"{job} COMPLETED"] and status.restarts is not None and status.restarts >= 1
    )
    island.wait_state("late", "FINISHED", seconds=150)
    assert island.lines("limit") == island.lines("late") == island.uninterrupted.result()


@scenario
def test_a_signal_before_the_handlers_stand_is_neither_lost_nor_deadly(island: Island) -> None:
    job = island.launch("early")
    until(
        lambda: any(island.folder.glob("early/logs/attempt-0001/rank_*.start.json")),
        30,
        "the first rank",
    )
    island.cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert "failure" not in island.wait_event("early", "requeued")
    assert island.events("early", "signal")[0]["step"] == 1  # at the first step boundary
    island.wait_state("early", "FINISHED")
    assert island.lines("early") == island.uninterrupted.result()


@scenario
def test_preemption_by_a_higher_priority(island: Island) -> None:
    island.launch("preempted", profile=island.profile("scavenge", partition=island.scavenge))
    island.wait_step("preempted", 6)
    with island.paused("preempted"):
        urgent = island.cluster.run(
            "sbatch",
            "--parsable",
            f"--partition={island.main}",
            "--nodes=3",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 4",
        )
        until(
            lambda: all(
                _pending(pid, signal.SIGUSR1) for pid in island.ranks("preempted").values()
            ),
            30,
            "the preemption",
        )
    requeued = island.wait_event("preempted", "requeued")
    assert "failure" not in requeued and requeued["step"] >= 6
    until(
        lambda: "COMPLETED" in island.cluster.run("scontrol", "show", "job", urgent),
        60,
        "the other job",
    )
    island.wait_state("preempted", "FINISHED")
    assert island.lines("preempted") == island.uninterrupted.result()


@scenario
def test_plain_scontrol_requeue(island: Island) -> None:
    job = island.launch("administered")
    island.wait_step("administered", 6)
    island.cluster.run("scontrol", "requeue", job)
    requeued = island.wait_event("administered", "requeued")
    assert requeued["reason"] == "Slurm requeues the job", requeued
    assert "failure" not in requeued
    assert requeued["step"] >= 6  # stopped cleanly, although nobody asked the run itself
    island.wait_state("administered", "FINISHED")
    assert island.status("administered").restarts == 1
    assert island.lines("administered") == island.uninterrupted.result()


@scenario
def test_a_node_is_lost_while_running(island: Island) -> None:
    island.launch("lost")
    island.wait_step("lost", 6)
    island.kill_node(1)
    requeued = island.wait_event("lost", "requeued", seconds=90)
    assert requeued["failure"]
    status = island.wait_state("lost", "FINISHED", seconds=120)
    nodes = island.events("lost", "started")[-1]["nodes"]
    assert nodes == [island.node(0), island.node(2)] and status.restarts == 1
    assert island.lines("lost") == island.uninterrupted.result()


@scenario
def test_the_node_of_the_batch_script_is_lost(island: Island) -> None:
    job = island.launch("beheaded")
    island.wait_step("beheaded", 6)
    island.kill_node(0)  # and with it rank 0 and the supervisor, who cannot say a word
    island.wait_event("beheaded", "started", 2, seconds=90)
    status = island.wait_state("beheaded", "FINISHED", seconds=90)
    assert status.jobs == [f"{job} COMPLETED"]
    assert island.events("beheaded", "started")[-1]["nodes"] == [island.node(1), island.node(2)]
    assert island.lines("beheaded") == island.uninterrupted.result()


@scenario
def test_a_node_is_dead_at_launch(island: Island) -> None:
    # Slurm takes a node for idle for six seconds after its death: the job starts within them,
    # however long submitting it takes.
    job = island.launch("stillborn", profile=island.profile("held", sbatch={"hold": True}))
    island.kill_node(1)
    island.cluster.run("scontrol", "release", job)
    requeued = island.wait_event("stillborn", "requeued", seconds=90)
    assert requeued["reason"].startswith(f"no rank started on {island.node(1)}") and requeued[
        "excluded"
    ] == [island.node(1)]
    island.wait_state("stillborn", "FINISHED", seconds=120)
    assert f"ExcNodeList={island.node(1)}" in island.cluster.run("scontrol", "show", "job", job)
    assert island.lines("stillborn") == island.uninterrupted.result()


@scenario
def test_one_rank_exits(island: Island) -> None:
    island.launch("crashed")
    island.wait_step("crashed", 7)
    os.kill(island.ranks("crashed")[1], signal.SIGKILL)
    requeued = island.wait_event("crashed", "requeued")
    assert (
        requeued["failure"]
        and requeued["reason"] == f"rank 1 on {island.node(1)}: killed by SIGKILL"
        and requeued["delay"] == 1.0
    )
    # And once more with its parent, as when the kernel kills a group for its memory: nobody is left
    # there to say so.
    island.wait_event("crashed", "started", 2)
    island.wait_step("crashed", 12)
    rank = island.ranks("crashed")[1]
    os.kill(parent_of(rank), signal.SIGKILL)
    requeued = island.wait_event("crashed", "requeued", 2)
    status = island.wait_state("crashed", "FINISHED")
    assert requeued["reason"] == status.last_error
    assert requeued["reason"] == (
        f"rank 1 on {island.node(1)}: killed together with its parent process (srun: Killed);"
        " running out of memory can cause this"
    )
    assert requeued["failure_kind"] == "killed"
    assert status.restarts == 2
    assert island.lines("crashed") == island.uninterrupted.result()


@scenario
def test_a_rank_hangs(island: Island) -> None:
    profile = island.profile("impatient", requeue={"grace": 3.0})
    island.launch("hung", profile=profile, run={"dir": "hung", "threads": 1, "hang_timeout": 20.0})
    island.wait_step("hung", 7)
    os.kill(island.ranks("hung")[1], signal.SIGSTOP)
    requeued = island.wait_event("hung", "requeued")
    assert requeued["failure"] and "hang: no step finished for 20 s" in requeued["reason"]
    assert f"rank 1 on host {island.node(1)}" in requeued["reason"]
    island.wait_state("hung", "FINISHED")
    assert island.lines("hung") == island.uninterrupted.result()


@scenario
def test_scancel_is_final(island: Island) -> None:
    job = island.launch("cancelled")
    island.wait_step("cancelled", 6)
    island.cluster.run("scancel", job)
    assert (
        island.wait_event("cancelled", "cancelled")["step"] >= 6
    )  # with a checkpoint all the same
    status = island.wait_state("cancelled", "CANCELLED")
    assert status.jobs == [f"{job} CANCELLED"] and status.restarts == 0
    assert island.events("cancelled", "requeued") == []


@scenario
def test_stop_ends_with_a_checkpoint_and_the_next_launch_goes_on(island: Island) -> None:
    job = island.launch("stopped")
    island.wait_step("stopped", 6)
    # The command may have to wait for another island's, and the run would finish meanwhile.
    with island.paused("stopped"):
        assert f"job {job} stops with a checkpoint" in island.llada("stop", "stopped")
    status = island.wait_state("stopped", "STOPPED")
    assert (
        status.checkpoint is not None
        and status.checkpoint >= 6
        and island.events("stopped", "requeued") == []
    )
    until(lambda: not island.queue(), 30, "the job's end")
    assert "nothing runs" in island.llada("stop", "stopped")
    island.launch("stopped")
    island.wait_state("stopped", "FINISHED")
    assert island.lines("stopped") == island.uninterrupted.result()


@scenario
def test_the_cap_ends_a_run_that_gets_nowhere(island: Island) -> None:
    profile = island.profile(
        "broken",
        requeue={"limit": 1},
        environment={"variables": {"OMP_NUM_THREADS": "1", "PYTHONHOME": "/nowhere"}},
    )
    job = island.launch("hopeless", profile=profile, nodes=2)
    status = island.wait_state("hopeless", "FAILED")
    assert status.reason is not None
    assert status.reason.startswith(
        "2 failures in a row without a new checkpoint, and requeue.limit is 1; the last: "
    )
    assert [line["event"] for line in island.events("hopeless")] == [
        "submitted",
        "started",
        "requeued",
        "started",
        "failed",
    ]
    until(
        lambda: "JobState=FAILED" in island.cluster.run("scontrol", "show", "job", job),
        20,
        "Slurm's own word",
    )


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _pending(pid: int, number: int) -> bool:
    """Whether a process that is stopped has a signal waiting for it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


assert STEPS > 7, "the tests interrupt runs after step 7"

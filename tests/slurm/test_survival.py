"""What clusters do to a run, done to one on a real Slurm: afterwards its curve is that of a run
that nothing happened to.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.slurm.cluster import until
from tests.slurm.conftest import STEPS, Place, scenario


@scenario
def test_time_limit_saves_requeues_and_goes_on_also_when_a_rank_hangs(place: Place) -> None:
    """Two runs at once, since the minutes have to pass: one stops in order, of the other a rank
    never does. There Slurm would end the supervisor with the ranks, and nobody would put the job
    back into the queue.
    """
    profile = place.profile("minutes", time="3", signal_seconds=6)
    job = place.launch("limit", profile=profile)
    place.launch("late", profile=profile)
    place.wait_step("limit", 7)
    with place.paused("limit"):
        place.wait_step("late", 7)
        os.kill(place.ranks("late")[1], signal.SIGSTOP)
        # Slurm looks at time limits every half minute.
        until(
            lambda: all(_pending(pid, signal.SIGUSR1) for pid in place.ranks("limit").values()),
            200,
            "the warning before the time limit",
        )
    requeued = place.wait_event("limit", "requeued")
    assert "failure" not in requeued and requeued["reason"] == "SIGUSR1: stopped with a checkpoint"
    assert requeued["step"] == place.events("limit", "signal")[0]["step"] >= 7
    assert place.wait_event("late", "requeued", seconds=60)["step"] >= 5
    status = place.wait_state("limit", "FINISHED", seconds=150)
    assert (
        status.jobs == [f"{job} COMPLETED"] and status.restarts is not None and status.restarts >= 1
    )
    place.wait_state("late", "FINISHED", seconds=150)
    assert place.lines("limit") == place.lines("late") == place.whole.result()


@scenario
def test_a_signal_before_the_handlers_stand_is_neither_lost_nor_deadly(place: Place) -> None:
    job = place.launch("early")
    until(
        lambda: any(place.folder.glob("early/logs/attempt-0001/rank_*.start.json")),
        30,
        "the first rank",
    )
    place.cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert "failure" not in place.wait_event("early", "requeued")
    assert place.events("early", "signal")[0]["step"] == 1  # at the first step boundary
    place.wait_state("early", "FINISHED")
    assert place.lines("early") == place.whole.result()


@scenario
def test_preemption_by_a_higher_priority(place: Place) -> None:
    place.launch("preempted", profile=place.profile("scavenge", partition=place.scavenge))
    place.wait_step("preempted", 6)
    with place.paused("preempted"):
        urgent = place.cluster.run(
            "sbatch",
            "--parsable",
            f"--partition={place.main}",
            "--nodes=3",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 4",
        )
        until(
            lambda: all(_pending(pid, signal.SIGUSR1) for pid in place.ranks("preempted").values()),
            30,
            "the preemption",
        )
    requeued = place.wait_event("preempted", "requeued")
    assert "failure" not in requeued and requeued["step"] >= 6
    until(
        lambda: "COMPLETED" in place.cluster.run("scontrol", "show", "job", urgent),
        60,
        "the other job",
    )
    place.wait_state("preempted", "FINISHED")
    assert place.lines("preempted") == place.whole.result()


@scenario
def test_plain_scontrol_requeue(place: Place) -> None:
    job = place.launch("administered")
    place.wait_step("administered", 6)
    place.cluster.run("scontrol", "requeue", job)
    requeued = place.wait_event("administered", "requeued")
    assert (
        "failure" not in requeued and requeued["reason"] == "Slurm puts the job back into the queue"
    )
    assert requeued["step"] >= 6  # stopped in order, although nobody asked the run itself
    place.wait_state("administered", "FINISHED")
    assert place.status("administered").restarts == 1
    assert place.lines("administered") == place.whole.result()


@scenario
def test_a_node_is_lost_while_running(place: Place) -> None:
    place.launch("lost")
    place.wait_step("lost", 6)
    place.kill_node(1)
    requeued = place.wait_event("lost", "requeued", seconds=90)
    assert requeued["failure"]
    status = place.wait_state("lost", "FINISHED", seconds=120)
    nodes = place.events("lost", "started")[-1]["nodes"]
    assert nodes == [place.node(0), place.node(2)] and status.restarts == 1
    assert place.lines("lost") == place.whole.result()


@scenario
def test_the_node_of_the_batch_script_is_lost(place: Place) -> None:
    job = place.launch("beheaded")
    place.wait_step("beheaded", 6)
    place.kill_node(0)  # and with it rank 0 and the supervisor, who cannot say a word
    place.wait_event("beheaded", "started", 2, seconds=90)
    status = place.wait_state("beheaded", "FINISHED", seconds=90)
    assert status.jobs == [f"{job} COMPLETED"]
    assert place.events("beheaded", "started")[-1]["nodes"] == [place.node(1), place.node(2)]
    assert place.lines("beheaded") == place.whole.result()


@scenario
def test_a_node_is_dead_at_launch(place: Place) -> None:
    # Slurm takes a node for idle for six seconds after its death: the job starts within them,
    # however long submitting it takes.
    job = place.launch("stillborn", profile=place.profile("held", sbatch={"hold": True}))
    place.kill_node(1)
    place.cluster.run("scontrol", "release", job)
    requeued = place.wait_event("stillborn", "requeued", seconds=90)
    assert requeued["reason"].startswith(f"no rank started on {place.node(1)}") and requeued[
        "excluded"
    ] == [place.node(1)]
    place.wait_state("stillborn", "FINISHED", seconds=120)
    assert f"ExcNodeList={place.node(1)}" in place.cluster.run("scontrol", "show", "job", job)
    assert place.lines("stillborn") == place.whole.result()


@scenario
def test_one_rank_exits(place: Place) -> None:
    place.launch("crashed")
    place.wait_step("crashed", 7)
    os.kill(place.ranks("crashed")[1], signal.SIGKILL)
    requeued = place.wait_event("crashed", "requeued")
    assert (
        requeued["failure"]
        and requeued["reason"] == f"rank 1 on {place.node(1)}: killed by SIGKILL"
        and requeued["delay"] == 1.0
    )
    # And once more with its parent, as when the kernel kills a group for its memory: nobody is left
    # there to say so.
    place.wait_event("crashed", "started", 2)
    place.wait_step("crashed", 12)
    rank = place.ranks("crashed")[1]
    os.kill(parent_of(rank), signal.SIGKILL)
    requeued = place.wait_event("crashed", "requeued", 2)
    status = place.wait_state("crashed", "FINISHED")
    assert requeued["reason"] == status.last_error
    assert (
        requeued["reason"]
        == f"rank 1 on {place.node(1)}: gone together with its parent process (srun: Killed); a"
        " lack of memory does this"
    )
    assert status.restarts == 2
    assert place.lines("crashed") == place.whole.result()


@scenario
def test_a_rank_hangs(place: Place) -> None:
    profile = place.profile("impatient", requeue={"grace": 3.0})
    place.launch("hung", profile=profile, run={"dir": "hung", "threads": 1, "hang_timeout": 20.0})
    place.wait_step("hung", 7)
    os.kill(place.ranks("hung")[1], signal.SIGSTOP)
    requeued = place.wait_event("hung", "requeued")
    assert requeued["failure"] and "hang: no step finished for 20 s" in requeued["reason"]
    assert f"rank 1 on host {place.node(1)}" in requeued["reason"]
    place.wait_state("hung", "FINISHED")
    assert place.lines("hung") == place.whole.result()


@scenario
def test_scancel_is_final(place: Place) -> None:
    job = place.launch("cancelled")
    place.wait_step("cancelled", 6)
    place.cluster.run("scancel", job)
    assert place.wait_event("cancelled", "cancelled")["step"] >= 6  # with a checkpoint all the same
    status = place.wait_state("cancelled", "CANCELLED")
    assert status.jobs == [f"{job} CANCELLED"] and status.restarts == 0
    assert place.events("cancelled", "requeued") == []


@scenario
def test_stop_ends_with_a_checkpoint_and_the_next_launch_goes_on(place: Place) -> None:
    job = place.launch("stopped")
    place.wait_step("stopped", 6)
    assert f"job {job} stops with a checkpoint" in place.llada("stop", "stopped")
    status = place.wait_state("stopped", "STOPPED")
    assert (
        status.checkpoint is not None
        and status.checkpoint >= 6
        and place.events("stopped", "requeued") == []
    )
    until(lambda: not place.queue(), 30, "the job's end")
    assert "nothing runs" in place.llada("stop", "stopped")
    place.launch("stopped")
    place.wait_state("stopped", "FINISHED")
    assert place.lines("stopped") == place.whole.result()


@scenario
def test_the_cap_ends_a_run_that_gets_nowhere(place: Place) -> None:
    profile = place.profile(
        "broken",
        requeue={"limit": 1},
        environment={"variables": {"OMP_NUM_THREADS": "1", "PYTHONHOME": "/nowhere"}},
    )
    job = place.launch("hopeless", profile=profile, nodes=2)
    status = place.wait_state("hopeless", "FAILED")
    assert status.reason is not None
    assert status.reason.startswith(
        "2 failures in a row without a new checkpoint, and requeue.limit is 1; the last: "
    )
    assert [line["event"] for line in place.events("hopeless")] == [
        "submitted",
        "started",
        "requeued",
        "started",
        "failed",
    ]
    until(
        lambda: "JobState=FAILED" in place.cluster.run("scontrol", "show", "job", job),
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

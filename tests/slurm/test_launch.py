"""`llada launch` on a real Slurm: whole runs, refusals, and the status of a run that waits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import slurm
from launch.status import latest_submission
from llada.data.manifest import Manifest
from llada.errors import UserError
from llada.training.configure import load_config
from tests.preparation import prepare
from tests.slurm.cluster import until
from tests.slurm.island import STEPS, Island
from tests.slurm.scenarios import scenario


@scenario
def test_two_nodes_with_two_tasks_train_and_convert(island: Island) -> None:
    """Tensor x data parallel, with node tests, W&B, and the conversion."""
    profile = island.profile("tested", preflight={"enabled": True})
    layout = {"parallel": {"tensor": 2, "sequence": True}, "logging": {"every": 1, "wandb": True}}
    job = island.launch("full", "--then", "convert", profile=profile, per_node=2, **layout)
    status = island.wait_state("full", "FINISHED", seconds=120)
    assert (
        status.jobs == [f"{job} COMPLETED"]
        and status.step == status.steps == STEPS
        and status.restarts == 0
    )
    started, tested = island.events("full", "started")[0], island.events("full", "preflight")[0]
    assert (
        started["nodes"] == [island.node(0), island.node(1)]
        and started["ranks"] == 4
        and "bad" not in tested
    )
    for figures in tested["nodes"].values():
        assert set(figures) >= {"matmul_seconds", "local_gbps", "network_gbps", "disk_free_gb"}
    assert [line["step"] for line in island.events("full", "checkpoint")] == [5, 10, 15, 20]
    assert [line["step"] for line in island.events("full", "step")] == list(range(1, STEPS + 1))
    names = sorted(
        path.name for path in (island.folder / "full/logs/attempt-0001").glob("rank_*.log")
    )
    assert names == [f"rank_{rank:05d}.log" for rank in range(4)]
    console = (island.folder / f"full/logs/job-{job}.log").read_text()
    assert (
        f"llada: preflight: {island.node(1)}: " in console
        and "step 20/20" in console
        and "llada: finished" in console
    )
    assert "step 20/20" in island.llada("logs", "full")
    assert (
        "full" in island.llada("runs", ".")
        and json.loads(island.llada("status", "full", "--json"))["state"] == "FINISHED"
    )
    # The snapshot ran, not the checkout, and it knows which revision it is.
    provenance = yaml.safe_load((island.folder / "full/config.yaml").read_text())["provenance"]
    assert provenance["git"] == (
        (island.folder / "full/launch/0001/code/REVISION").read_text().strip() or None
    )
    until(
        lambda: (island.folder / "full/hf/config.json").exists(),
        120,
        "the converted model",
        lambda: island.evidence("full/then"),
    )
    assert (island.folder / "full/wandb_id").exists()


@scenario
def test_the_curve_is_that_of_torchrun_on_one_machine(island: Island) -> None:
    """`--local` gives the same files and numbers, and starts a killed rank again, too."""
    process = island.launch_local("here")
    island.wait_step("here", 7)
    assert island.status("here").state == "RUNNING"
    with pytest.raises(UserError, match=r"run.dir: '.*here' is in use by process"):
        island.launch("here")
    os.kill(island.ranks("here")[0], 9)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert (
        "llada: requeued: rank 0 on" in out
        and "killed by SIGKILL" in out
        and "llada: finished" in out
    )
    assert island.status("here").state == "FINISHED" and island.status("here").restarts == 1
    assert island.lines("here") == island.uninterrupted.result()


@scenario
def test_local_stops_with_a_checkpoint(island: Island) -> None:
    process = island.launch_local("halt")
    island.wait_step("halt", 6)
    # The command may have to wait for another island's, and the run would finish meanwhile.
    with island.paused("halt"):
        assert "stops with a checkpoint" in island.llada("stop", "halt")
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 75, out
    assert (
        island.status("halt").state == "STOPPED"
        and island.status("halt").checkpoint == island.steps("halt") >= 6
    )


@scenario
def test_a_chain_where_jobs_cannot_requeue(island: Island) -> None:
    """The second job continues, and the conversion waits for it.

    The third has nothing to do and is cancelled.
    """
    profile = island.profile("chained", requeue={"enabled": False})
    island.launch("chain", "--chain", "3", "--then", "convert", profile=profile)
    jobs = [line.split()[0] for line in island.status("chain").jobs or []]
    assert len(jobs) == 3
    island.wait_step("chain", 6)
    island.cluster.run("scancel", "--signal=USR1", "--batch", jobs[0])  # as before a time limit
    island.wait_event("chain", "started", 2)
    status = island.wait_state("chain", "FINISHED")
    shown = {job: slurm.show_job(job) for job in jobs}
    assert [shown[job]["JobState"] for job in jobs] == [
        "FAILED",
        "COMPLETED",
        "CANCELLED",
    ] and shown[jobs[0]]["ExitCode"] == "75:0"
    assert status.restarts == 1 and status.then is not None
    assert island.lines("chain") == island.uninterrupted.result()
    sent = latest_submission(island.folder / "chain")
    assert sent is not None and sent.then is not None
    until(
        lambda: slurm.show_job(str(sent.then))["JobState"] == "RUNNING",
        30,
        "the conversion to start",
    )


@scenario
def test_a_chain_goes_on_after_a_lost_node(island: Island) -> None:
    island.launch(
        "links", "--chain", "2", profile=island.profile("chained", requeue={"enabled": False})
    )
    island.wait_step("links", 6)
    island.kill_node(1)
    island.wait_event("links", "started", 2, seconds=60)
    island.wait_state("links", "FINISHED")
    assert island.lines("links") == island.uninterrupted.result()


@scenario
def test_scancel_of_a_chain_is_final_even_when_the_ranks_take_too_long(island: Island) -> None:
    first = island.launch(
        "severed", "--chain", "2", profile=island.profile("chained", requeue={"enabled": False})
    )
    second = (island.status("severed").jobs or [])[1].split()[0]
    island.wait_step("severed", 6)
    for pid in island.ranks("severed").values():
        os.kill(pid, signal.SIGSTOP)
    island.cluster.run("scancel", first)
    until(
        lambda: slurm.show_job(second).get("JobState") == "CANCELLED",
        30,
        "the second job's end",
        lambda: island.evidence("severed"),
    )
    assert island.wait_state("severed", "CANCELLED").restarts == 0


@scenario
def test_going_back_happens_once_whatever_restarts_come(island: Island) -> None:
    checkpoint = {"every": 5, "keep_last": 2}
    island.launch("back", checkpoint=checkpoint)
    island.wait_state("back", "FINISHED")
    until(lambda: not island.queue(), 30, "the job's end")
    island.launch("back", "lr=0.0005", "--rewind", "15", checkpoint=checkpoint, train={"steps": 40})
    island.wait_step("back", 32)  # by now step 15 is no longer kept
    os.kill(island.ranks("back")[0], signal.SIGKILL)
    assert island.wait_state("back", "FINISHED").restarts == 1
    rates = [line["lr"] for line in island.lines("back") if "lr" in line]
    assert len(rates) == 40 and rates[14] == 1e-3 and set(rates[15:]) == {5e-4}


@scenario
def test_a_corpus_in_an_array_of_tasks(island: Island) -> None:
    sources = [str(island.folder / "texts")]
    library = Path(os.__file__).parent
    shutil.copytree(
        library / "json", island.folder / "texts", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        library / "asyncio",
        island.folder / "texts" / "asyncio",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    prepare(sources, island.folder / "tokenizer", island.folder / "alone", unit_bytes=50_000)
    own = ["--tasks", "3", "--cluster", island.profile()]
    words = [
        "--input",
        "texts",
        "--tokenizer",
        "tokenizer",
        "--output",
        "shared",
        "--unit-bytes",
        "50000",
    ]
    assert "#SBATCH --array=0-2" in island.llada(
        "launch", "data-prepare", *own, "--dry-run", *words
    )
    island.llada("launch", "data-prepare", *own, *words)
    until(
        lambda: (island.folder / "shared/manifest.json").exists(),
        60,
        "the corpus",
        lambda: island.evidence("shared.launch"),
    )
    until(
        lambda: island.status("shared.launch").state == "FINISHED",
        60,
        "the tasks",
        lambda: island.evidence("shared.launch"),
    )
    status = island.status("shared.launch")
    assert (
        status.task == "data"
        and status.jobs is not None
        and [line.split()[1] for line in status.jobs] == ["COMPLETED"] * 3
    )
    one, several = (Manifest.load(island.folder / name) for name in ("alone", "shared"))
    assert one.fingerprint("train") == several.fingerprint("train") and one.fingerprint(
        "validation"
    ) == several.fingerprint("validation")
    assert "task-00002" in str(sorted((island.folder / "shared.launch/logs").glob("task-*"))[-1])
    with pytest.raises(UserError, match="--output: 'shared' exists"):
        island.llada("launch", "data-prepare", *own, *words)


@scenario
def test_a_task_of_an_array_that_fails_starts_alone_again(island: Island) -> None:
    """The bare number of the last task is that of the whole array, which must not restart."""
    own = ["--tasks", "2", "--cluster", island.profile("few", requeue={"limit": 1})]
    words = [
        "--input",
        "tokenizer",
        "--tokenizer",
        "tokenizer",
        "--output",
        "spoilt",
        "--ext",
        "json",
        "--wait",
        "0",
    ]
    (island.folder / "spoilt.partial").write_text("in the way of the second task, and of the first")
    island.llada("launch", "data-prepare", *own, *words)
    status = island.wait_state("spoilt.launch", "FAILED")
    started = [line["task"] for line in island.events("spoilt.launch", "started")]
    assert sorted(started) == [0, 0, 1, 1] or sorted(started) == [0, 1], (started, status)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--input", "texts", "--tokenizer", "tokenizer", "--output", "x", "--unit-byte", "5"],
            "No such option: --unit-byte",
        ),
        (["--tokenizer", "tokenizer", "--output", "x"], "Missing option '--input'"),
        (
            ["--input", "nothing", "--tokenizer", "tokenizer", "--output", "x"],
            "--input: no file or folder 'nothing'",
        ),
        (
            ["--input", "corpus", "--tokenizer", "tokenizer", "--output", "x", "--task", "1"],
            "--task: is set for every task of the array",
        ),
    ],
)
def test_options_of_an_array_are_checked_before(
    island: Island, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        island.llada(
            "launch", "data-prepare", "--tasks", "2", "--cluster", island.profile(), *words
        )


# -- what is refused before anything is submitted --------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"partition": "mian"},
            (
                r"partition: Slurm has no partition 'mian' \(did you mean 'main'\?\); there are"
                r" main, main1, "
            ),
        ),
        (
            {"cpu_jobs": {"partition": "cpu"}},
            "cpu_jobs.partition: Slurm has no partition 'cpu'; there are main, main1, ",
        ),
        (
            {"partition": "scavenge", "time": "02:00:00"},
            "time: '02:00:00' is over the limit 1:00:00 of partition 'scavenge'",
        ),
        ({"constraint": "volta"}, "Slurm refuses the job: Invalid feature specification"),
        (
            {"sbatch": {"nonsense": "1"}},
            "Slurm refuses the job: unrecognized option '--nonsense=1'",
        ),
    ],
)
def test_what_slurm_would_not_run_is_refused(
    island: Island, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        island.launch("refused", profile=island.profile("refused_profile", **settings))
    assert not (island.folder / "refused").exists()


@pytest.mark.parametrize(
    "nodes, per_node, sections, message",
    [
        (
            2,
            8,
            {"batch": {"global": 64, "micro": 4}},
            "Slurm refuses the job: Requested node configuration is not available",
        ),
        (
            9,
            2,
            {"batch": {"global": 72, "micro": 4}},
            "Slurm refuses the job: Requested node configuration is not available",
        ),
        (
            3,
            1,
            {},
            (
                "tensor x pipeline x context = 2 x 1 x 1 = 2 ranks per replica do not divide the"
                " world size 3"
            ),
        ),
        (2, 4, {}, "batch.global: 8 is not a multiple of batch.micro x data-parallel size = 4 x 4"),
        (2, 1, {"data": {"sequence_length": 64, "mixture": [{"path": "nowhere"}]}}, "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(
    island: Island, nodes: int, per_node: int, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        island.launch("misfit", nodes=nodes, per_node=per_node, **sections)
    assert not (island.folder / "misfit").exists()


@scenario
def test_one_run_folder_has_one_job(island: Island) -> None:
    blocker = island.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={island.main}",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 600",
    )
    job = island.launch("single")
    with pytest.raises(
        UserError,
        match=(
            rf"run.dir: '.*single' belongs to job {job}, which is PENDING; `llada stop single`"
            r" ends it"
        ),
    ):
        island.launch("single")
    assert f"job {job} is cancelled" in island.llada("stop", "single")
    assert island.status("single").state == "CANCELLED"
    island.cluster.run("scancel", blocker)
    job = island.launch("single", train={"steps": 300})
    island.wait_step("single", 3)
    with pytest.raises(
        UserError,
        match=rf"run.dir: '.*single' is in use by job {job}, process \d+ on host {island.node(0)}",
    ):
        island.launch("single", train={"steps": 300})
    # Without the launcher, the run itself refuses.
    words = [
        sys.executable,
        "-m",
        "llada",
        "pretrain",
        "single.yaml",
        "parallel.tensor=1",
        "parallel.sequence=false",
    ]
    alone = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert alone.returncode == 2 and f"'single' is in use by job {job}, process" in alone.stderr, (
        alone.stderr
    )
    island.llada("stop", "single")
    island.wait_state("single", "STOPPED")
    until(lambda: not island.queue(), 30, "the job's end")
    with pytest.raises(
        UserError, match=r"run.dir: '.*single' contains a run with a different config, seed: 5 -> 6"
    ):
        island.launch("single", seed=6)


def test_the_submitters_environment_changes_nothing(
    island: Island, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("SBATCH_TIMELIMIT", "3"),
        ("SBATCH_PARTITION", "scavenge"),
        ("SBATCH_NO_REQUEUE", "1"),
        ("SBATCH_SIGNAL", "KILL@1"),
        ("SLURM_DISTRIBUTION", "cyclic"),
        ("SLURM_GPUS_PER_TASK", "3"),
        ("SLURM_NTASKS_PER_GPU", "2"),
        ("RANK", "9"),
        ("WORLD_SIZE", "99"),
    ):
        monkeypatch.setenv(name, value)
    job = island.launch("shielded", per_node=2)
    shown = slurm.show_job(job)
    assert (shown["TimeLimit"], shown["Partition"], shown["Requeue"]) == ("00:10:00", "main", "1")
    started = [
        island.folder / f"shielded/logs/attempt-0001/rank_{rank:05d}.start.json"
        for rank in range(4)
    ]
    until(
        lambda: all(path.exists() for path in started),
        60,
        "four ranks",
        lambda: island.evidence("shielded"),
    )
    assert [json.loads(path.read_text())["host"] for path in started] == ["n0", "n0", "n1", "n1"]


@scenario
def test_a_stop_before_the_first_step_is_kept(island: Island) -> None:
    island.launch("unborn")
    until(lambda: island.status("unborn").state == "RUNNING", 30, "the job")
    # as `llada stop` does, while its signal meets a process that cannot handle it yet
    (island.folder / "unborn/launch/0001/stop").touch()
    assert island.wait_state("unborn", "STOPPED").restarts == 0
    assert island.steps("unborn") <= 1


@scenario
def test_a_run_can_be_launched_after_its_data(island: Island) -> None:
    earlier = island.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={island.main}",
        "--output=/dev/null",
        "--wrap",
        "sleep 30",
    )
    data = {"sequence_length": 64, "mixture": [{"path": "not_yet"}]}
    island.launch("later", "--after", earlier, data=data)
    until(
        lambda: (island.status("later").reason or "").startswith("Dependency"), 30, "the dependency"
    )
    assert island.status("later").state == "PENDING" and not (island.folder / "not_yet").exists()
    island.llada("stop", "later")


@scenario
def test_what_can_never_start_says_why(island: Island) -> None:
    failing = island.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={island.main}",
        "--output=/dev/null",
        "--wrap",
        "false",
    )
    until(
        lambda: "FAILED" in island.cluster.run("scontrol", "show", "job", failing),
        30,
        "the failing job",
    )
    island.launch("waiting", "--after", failing)
    until(lambda: island.status("waiting").reason is not None, 30, "a reason")
    status = island.status("waiting")
    assert status.state == "PENDING"
    assert status.reason == (
        "DependencyNeverSatisfied (waits for a job that can no longer succeed; cancel this one)"
    )
    assert "state     PENDING: DependencyNeverSatisfied" in island.llada("status", "waiting")


@scenario
def test_a_limit_that_came_later_is_shown(island: Island) -> None:
    """A job that waits when its partition's limit is lowered stays in the queue for ever."""
    blocker = island.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={island.main}",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 600",
    )
    island.launch(
        "overdue", profile=island.profile("long", time="01:00:00", partition=island.scavenge)
    )
    island.cluster.run("scontrol", "update", f"PartitionName={island.scavenge}", "MaxTime=5")
    try:
        island.cluster.run("scancel", blocker)
        until(
            lambda: (island.status("overdue").reason or "").startswith(
                "PartitionTimeLimit (requests more time"
            ),
            30,
            "the reason",
        )
        assert island.status("overdue").state == "PENDING"
    finally:
        island.cluster.run("scontrol", "update", f"PartitionName={island.scavenge}", "MaxTime=60")


def test_a_dry_run_submits_nothing(island: Island) -> None:
    out = island.llada(
        "launch",
        island.write("dry"),
        "--cluster",
        island.profile(),
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--dry-run",
    )
    assert (
        "pretrain in dry: 2 nodes x 2 ranks = 4 ranks, tensor 2 x pipeline 1 x context 1 x data 2"
        in out
    )
    assert (
        "Slurm: Job " in out
        and "#SBATCH --gpus-per-node=2" in out
        and "#SBATCH --signal=B:USR1@20" in out
    )
    assert not (island.folder / "dry").exists() and island.queue() == ""


# -- nodes that are bad ----------------------------------------------------------------------------


@scenario
def test_a_node_that_cannot_write_is_named_and_left_out(island: Island) -> None:
    island.inside(1, "mount", "--bind", str(island.folder), str(island.folder))
    island.inside(1, "mount", "-o", "remount,bind,ro", str(island.folder))
    try:
        island.launch("readonly", profile=island.profile("tested", preflight={"enabled": True}))
        requeued = island.wait_event("readonly", "requeued")
        assert requeued["excluded"] == [island.node(1)]
        assert requeued["reason"].startswith(
            f"preflight: {island.node(1)}: 1 of 1 ranks did not start"
        )
        assert "Read-only file system" in requeued["reason"]
        island.wait_state("readonly", "FINISHED")
        assert island.events("readonly", "started")[-1]["nodes"] == [island.node(0), island.node(2)]
        assert island.lines("readonly") == island.uninterrupted.result()
    finally:
        island.kill_node(1)  # with its mounts; it comes back without


@scenario
def test_no_node_has_what_the_profile_asks_for(island: Island) -> None:
    island.launch("blind", profile=island.profile("gpus", preflight={"enabled": True, "gpus": 4}))
    status = island.wait_state("blind", "FAILED")
    assert status.reason is not None
    assert status.reason.startswith(
        "the same failure twice in a row, so another attempt would not help: preflight:"
        f" {island.node(0)}: torch sees 0 GPUs, 4 are required; {island.node(1)}"
    )
    assert status.reason.endswith("that is most of the nodes, so none is excluded")


def test_settings_survive_the_way_through_the_job(island: Island) -> None:
    """The job reads the overrides, and one launch can change a setting of the profile."""
    out = island.llada(
        "launch",
        island.write("told"),
        "train.steps=7",
        "--cluster",
        island.profile(),
        "--set",
        "time=00:20:00",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
    )
    assert "submitted job" in out
    assert load_config(island.folder / "told/launch/0001/config.yaml").train.steps == 7
    script = next((island.folder / "told/launch/0001/submitit").glob("*_submission.sh")).read_text()
    assert "#SBATCH --time=20" in script

"""From nothing to a model on a real Slurm, what the launcher refuses before it submits, and what it
shows of a run that waits.
"""

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
from launch import status as watch
from llada.data.corpus import Manifest
from llada.errors import UserError
from llada.training.configure import load_config
from tests.preparation import prepare
from tests.slurm.cluster import until
from tests.slurm.conftest import STEPS, Place, scenario


@scenario
def test_two_nodes_with_two_tasks_train_and_convert(place: Place) -> None:
    """Tensor x data parallel, with the tests of the nodes before, W&B, and the conversion
    after it.
    """
    profile = place.profile("tested", preflight={"enabled": True})
    layout = {"parallel": {"tensor": 2, "sequence": True}, "logging": {"every": 1, "wandb": True}}
    job = place.launch("full", "--then", "convert", profile=profile, per_node=2, **layout)
    status = place.wait_state("full", "FINISHED", seconds=120)
    assert (
        status.jobs == [f"{job} COMPLETED"]
        and status.step == status.steps == STEPS
        and status.restarts == 0
    )
    started, tested = place.events("full", "started")[0], place.events("full", "preflight")[0]
    assert (
        started["nodes"] == [place.node(0), place.node(1)]
        and started["ranks"] == 4
        and "bad" not in tested
    )
    for figures in tested["nodes"].values():
        assert set(figures) >= {"matmul_seconds", "local_gbps", "network_gbps", "disk_free_gb"}
    assert [line["step"] for line in place.events("full", "checkpoint")] == [5, 10, 15, 20]
    assert [line["step"] for line in place.events("full", "step")] == list(range(1, STEPS + 1))
    names = sorted(
        path.name for path in (place.folder / "full/logs/attempt-0001").glob("rank_*.log")
    )
    assert names == [f"rank_{rank:05d}.log" for rank in range(4)]
    console = (place.folder / f"full/logs/job-{job}.log").read_text()
    assert (
        f"llada: preflight: {place.node(1)}: " in console
        and "step 20/20" in console
        and "llada: finished" in console
    )
    assert "step 20/20" in place.llada("logs", "full")
    assert (
        "full" in place.llada("runs", ".")
        and json.loads(place.llada("status", "full", "--json"))["state"] == "FINISHED"
    )
    # The snapshot ran, not the checkout, and it knows which revision it is.
    provenance = yaml.safe_load((place.folder / "full/config.yaml").read_text())["provenance"]
    assert provenance["git"] == (
        (place.folder / "full/launch/0001/code/REVISION").read_text().strip() or None
    )
    until(
        lambda: (place.folder / "full/hf/config.json").exists(),
        120,
        "the converted model",
        lambda: place.story("full/then"),
    )
    assert (place.folder / "full/wandb_id").exists()


@scenario
def test_the_curve_is_that_of_torchrun_on_one_machine(place: Place) -> None:
    """`--local` has the same run folder and the same numbers, and a killed rank is started again
    there, too.
    """
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "llada",
        "launch",
        place.write("here"),
        "--local",
        "--gpus-per-node",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    place.wait_step("here", 7)
    assert place.status("here").state == "RUNNING"
    with pytest.raises(UserError, match=r"run.dir: '.*here' is in use by process"):
        place.launch("here")
    os.kill(place.ranks("here")[0], 9)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert (
        "llada: requeued: rank 0 on" in out
        and "killed by SIGKILL" in out
        and "llada: finished" in out
    )
    assert place.status("here").state == "FINISHED" and place.status("here").restarts == 1
    assert place.lines("here") == place.whole.result()


@scenario
def test_local_stops_with_a_checkpoint(place: Place) -> None:
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "llada",
        "launch",
        place.write("halt"),
        "--local",
        "--gpus-per-node",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    place.wait_step("halt", 6)
    assert "stops with a checkpoint" in place.llada("stop", "halt")
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 75, out
    assert (
        place.status("halt").state == "STOPPED"
        and place.status("halt").checkpoint == place.steps("halt") >= 6
    )


@scenario
def test_a_chain_where_jobs_cannot_requeue(place: Place) -> None:
    """The second job goes on; the third has nothing to do and is cancelled; the conversion waits
    for the one that finished.
    """
    profile = place.profile("chained", requeue={"enabled": False})
    place.launch("chain", "--chain", "3", "--then", "convert", profile=profile)
    jobs = [line.split()[0] for line in place.status("chain").jobs or []]
    assert len(jobs) == 3
    place.wait_step("chain", 6)
    place.cluster.run("scancel", "--signal=USR1", "--batch", jobs[0])  # as before a time limit
    place.wait_event("chain", "started", 2)
    status = place.wait_state("chain", "FINISHED")
    shown = {job: slurm.describe(job) for job in jobs}
    assert [shown[job]["JobState"] for job in jobs] == [
        "FAILED",
        "COMPLETED",
        "CANCELLED",
    ] and shown[jobs[0]]["ExitCode"] == "75:0"
    assert status.restarts == 1 and status.then is not None
    assert place.lines("chain") == place.whole.result()
    sent = watch.latest(place.folder / "chain")
    assert sent is not None and sent.then is not None
    until(
        lambda: slurm.describe(str(sent.then))["JobState"] == "RUNNING",
        30,
        "the conversion to start",
    )


@scenario
def test_a_chain_goes_on_after_a_lost_node(place: Place) -> None:
    place.launch(
        "links", "--chain", "2", profile=place.profile("chained", requeue={"enabled": False})
    )
    place.wait_step("links", 6)
    place.kill_node(1)
    place.wait_event("links", "started", 2, seconds=60)
    place.wait_state("links", "FINISHED")
    assert place.lines("links") == place.whole.result()


@scenario
def test_scancel_of_a_chain_is_final_even_when_the_ranks_take_too_long(place: Place) -> None:
    first = place.launch(
        "severed", "--chain", "2", profile=place.profile("chained", requeue={"enabled": False})
    )
    second = (place.status("severed").jobs or [])[1].split()[0]
    place.wait_step("severed", 6)
    for pid in place.ranks("severed").values():
        os.kill(pid, signal.SIGSTOP)
    place.cluster.run("scancel", first)
    until(
        lambda: slurm.describe(second).get("JobState") == "CANCELLED",
        30,
        "the second job's end",
        lambda: place.story("severed"),
    )
    assert place.wait_state("severed", "CANCELLED").restarts == 0


@scenario
def test_going_back_happens_once_whatever_restarts_come(place: Place) -> None:
    checkpoint = {"every": 5, "keep_last": 2}
    place.launch("back", checkpoint=checkpoint)
    place.wait_state("back", "FINISHED")
    until(lambda: not place.queue(), 30, "the job's end")
    place.launch("back", "lr=0.0005", "--rewind", "15", checkpoint=checkpoint, train={"steps": 40})
    place.wait_step("back", 32)  # by now step 15 is no longer kept
    os.kill(place.ranks("back")[0], signal.SIGKILL)
    assert place.wait_state("back", "FINISHED").restarts == 1
    rates = [line["lr"] for line in place.lines("back") if "lr" in line]
    assert len(rates) == 40 and rates[14] == 1e-3 and set(rates[15:]) == {5e-4}


@scenario
def test_a_corpus_in_an_array_of_tasks(place: Place) -> None:
    sources = [str(place.folder / "texts")]
    library = Path(os.__file__).parent
    shutil.copytree(
        library / "json", place.folder / "texts", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        library / "asyncio",
        place.folder / "texts" / "asyncio",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    prepare(sources, place.folder / "tokenizer", place.folder / "alone", unit_bytes=50_000)
    own = ["--tasks", "3", "--cluster", place.profile()]
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
    assert "#SBATCH --array=0-2" in place.llada("launch", "data-prepare", *own, "--dry-run", *words)
    place.llada("launch", "data-prepare", *own, *words)
    until(
        lambda: (place.folder / "shared/manifest.json").exists(),
        60,
        "the corpus",
        lambda: place.story("shared.launch"),
    )
    until(
        lambda: place.status("shared.launch").state == "FINISHED",
        60,
        "the tasks",
        lambda: place.story("shared.launch"),
    )
    status = place.status("shared.launch")
    assert (
        status.task == "data"
        and status.jobs is not None
        and [line.split()[1] for line in status.jobs] == ["COMPLETED"] * 3
    )
    one, several = (Manifest.load(place.folder / name) for name in ("alone", "shared"))
    assert one.fingerprint("train") == several.fingerprint("train") and one.fingerprint(
        "validation"
    ) == several.fingerprint("validation")
    assert "task-00002" in str(sorted((place.folder / "shared.launch/logs").glob("task-*"))[-1])
    with pytest.raises(UserError, match="--output: 'shared' exists"):
        place.llada("launch", "data-prepare", *own, *words)


@scenario
def test_a_task_of_an_array_that_fails_starts_alone_again(place: Place) -> None:
    """Its number, where it is the last one, is the number of the array: all tasks would start again
    with it.
    """
    own = ["--tasks", "2", "--cluster", place.profile("few", requeue={"limit": 1})]
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
    (place.folder / "spoilt.partial").write_text("in the way of the second task, and of the first")
    place.llada("launch", "data-prepare", *own, *words)
    status = place.wait_state("spoilt.launch", "FAILED")
    started = [line["task"] for line in place.events("spoilt.launch", "started")]
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
            "--task: is the number of the array's tasks",
        ),
    ],
)
def test_options_of_an_array_are_checked_before(
    place: Place, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        place.llada("launch", "data-prepare", "--tasks", "2", "--cluster", place.profile(), *words)


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
    place: Place, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        place.launch("refused", profile=place.profile("refused_profile", **settings))
    assert not (place.folder / "refused").exists()


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
    place: Place, nodes: int, per_node: int, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        place.launch("misfit", nodes=nodes, per_node=per_node, **sections)
    assert not (place.folder / "misfit").exists()


@scenario
def test_one_run_folder_has_one_job(place: Place) -> None:
    blocker = place.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={place.main}",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 600",
    )
    job = place.launch("single")
    with pytest.raises(
        UserError,
        match=(
            rf"run.dir: '.*single' belongs to job {job}, which is PENDING; `llada stop single`"
            r" ends it"
        ),
    ):
        place.launch("single")
    assert f"job {job} is cancelled" in place.llada("stop", "single")
    assert place.status("single").state == "CANCELLED"
    place.cluster.run("scancel", blocker)
    job = place.launch("single", train={"steps": 300})
    place.wait_step("single", 3)
    with pytest.raises(
        UserError,
        match=rf"run.dir: '.*single' is in use by job {job}, process \d+ on host {place.node(0)}",
    ):
        place.launch("single", train={"steps": 300})
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
    place.llada("stop", "single")
    place.wait_state("single", "STOPPED")
    until(lambda: not place.queue(), 30, "the job's end")
    with pytest.raises(
        UserError, match=r"run.dir: '.*single' holds a run of another config, seed: 5 -> 6"
    ):
        place.launch("single", seed=6)


def test_the_submitters_environment_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
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
    job = place.launch("shielded", per_node=2)
    shown = slurm.describe(job)
    assert (shown["TimeLimit"], shown["Partition"], shown["Requeue"]) == ("00:10:00", "main", "1")
    started = [
        place.folder / f"shielded/logs/attempt-0001/rank_{rank:05d}.start.json" for rank in range(4)
    ]
    until(
        lambda: all(path.exists() for path in started),
        60,
        "four ranks",
        lambda: place.story("shielded"),
    )
    assert [json.loads(path.read_text())["host"] for path in started] == ["n0", "n0", "n1", "n1"]


@scenario
def test_a_stop_before_the_first_step_is_kept(place: Place) -> None:
    place.launch("unborn")
    until(lambda: place.status("unborn").state == "RUNNING", 30, "the job")
    # as `llada stop` does, while its signal meets a process that cannot handle it yet
    (place.folder / "unborn/launch/0001/stop").touch()
    assert place.wait_state("unborn", "STOPPED").restarts == 0
    assert place.steps("unborn") <= 1


@scenario
def test_a_run_can_be_launched_after_its_data(place: Place) -> None:
    earlier = place.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={place.main}",
        "--output=/dev/null",
        "--wrap",
        "sleep 30",
    )
    data = {"sequence_length": 64, "mixture": [{"path": "not_yet"}]}
    place.launch("later", "--after", earlier, data=data)
    until(
        lambda: (place.status("later").reason or "").startswith("Dependency"), 30, "the dependency"
    )
    assert place.status("later").state == "PENDING" and not (place.folder / "not_yet").exists()
    place.llada("stop", "later")


@scenario
def test_what_can_never_start_says_why(place: Place) -> None:
    failing = place.cluster.run(
        "sbatch", "--parsable", f"--partition={place.main}", "--output=/dev/null", "--wrap", "false"
    )
    until(
        lambda: "FAILED" in place.cluster.run("scontrol", "show", "job", failing),
        30,
        "the failing job",
    )
    place.launch("waiting", "--after", failing)
    until(lambda: place.status("waiting").reason is not None, 30, "a reason")
    status = place.status("waiting")
    assert status.state == "PENDING"
    assert (
        status.reason
        == "DependencyNeverSatisfied (waits for a job that can no longer end as it should; cancel"
        " this one)"
    )
    assert "state     PENDING: DependencyNeverSatisfied" in place.llada("status", "waiting")


@scenario
def test_a_limit_that_came_later_is_shown(place: Place) -> None:
    """A job that waits when its partition's limit is lowered stays in the queue for ever; that has
    to be seen.
    """
    blocker = place.cluster.run(
        "sbatch",
        "--parsable",
        f"--partition={place.main}",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 600",
    )
    place.launch(
        "overdue", profile=place.profile("long", time="01:00:00", partition=place.scavenge)
    )
    place.cluster.run("scontrol", "update", f"PartitionName={place.scavenge}", "MaxTime=5")
    try:
        place.cluster.run("scancel", blocker)
        until(
            lambda: (place.status("overdue").reason or "").startswith(
                "PartitionTimeLimit (asks for more time"
            ),
            30,
            "the reason",
        )
        assert place.status("overdue").state == "PENDING"
    finally:
        place.cluster.run("scontrol", "update", f"PartitionName={place.scavenge}", "MaxTime=60")


def test_a_dry_run_submits_nothing(place: Place) -> None:
    out = place.llada(
        "launch",
        place.write("dry"),
        "--cluster",
        place.profile(),
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
    assert not (place.folder / "dry").exists() and place.queue() == ""


# -- nodes that are bad ----------------------------------------------------------------------------


@scenario
def test_a_node_that_cannot_write_is_named_and_left_out(place: Place) -> None:
    place.inside(1, "mount", "--bind", str(place.folder), str(place.folder))
    place.inside(1, "mount", "-o", "remount,bind,ro", str(place.folder))
    try:
        place.launch("readonly", profile=place.profile("tested", preflight={"enabled": True}))
        requeued = place.wait_event("readonly", "requeued")
        assert requeued["excluded"] == [place.node(1)]
        assert requeued["reason"].startswith(
            f"preflight: {place.node(1)}: 1 of 1 ranks did not start"
        )
        assert "Read-only file system" in requeued["reason"]
        place.wait_state("readonly", "FINISHED")
        assert place.events("readonly", "started")[-1]["nodes"] == [place.node(0), place.node(2)]
        assert place.lines("readonly") == place.whole.result()
    finally:
        place.kill_node(1)  # with its mounts; it comes back without


@scenario
def test_no_node_has_what_the_profile_asks_for(place: Place) -> None:
    place.launch("blind", profile=place.profile("gpus", preflight={"enabled": True, "gpus": 4}))
    status = place.wait_state("blind", "FAILED")
    assert status.reason is not None
    assert status.reason.startswith(
        f"twice the same, so a third time would not differ: preflight: {place.node(0)}: torch sees"
        f" 0 GPUs, 4 are asked for; {place.node(1)}"
    )
    assert status.reason.endswith("that is most of the nodes, so none is excluded")


def test_settings_survive_the_way_through_the_job(place: Place) -> None:
    """Overrides are in the config that the job reads, and a profile's setting can be changed for
    one launch.
    """
    out = place.llada(
        "launch",
        place.write("told"),
        "train.steps=7",
        "--cluster",
        place.profile(),
        "--set",
        "time=00:20:00",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
    )
    assert "submitted job" in out
    assert load_config(place.folder / "told/launch/0001/config.yaml").train.steps == 7
    script = next((place.folder / "told/launch/0001/submitit").glob("*_submission.sh")).read_text()
    assert "#SBATCH --time=20" in script

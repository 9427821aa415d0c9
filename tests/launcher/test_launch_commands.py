"""`llada launch` on a machine without Slurm, and what a run looks like from outside."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch.status import read_status
from llada import events
from llada.cli import app
from llada.errors import RunError, UserError
from llada.events import EventLog, restarts
from llada.planning.summary import checkpoint_volume
from llada.training.configure import load_config
from llada.training.loop import train
from llada.training.signals import StopRequest
from tests.preparation import prepare_sft
from tests.stand_ins import like
from tests.workplace import CONFIG, Workplace


@pytest.fixture
def here(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The workplace, without Slurm's commands."""
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("PATH", str(tmp_path))
    (workplace.folder / "cluster.yaml").write_text(yaml.safe_dump({"time": "01:00:00"}))
    return workplace.folder


def llada(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return result.output


def config(folder: Path, name: str, **sections: Any) -> str:
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump(
            {**CONFIG, "batch": {"global": 8, "micro": 2}, "run": {"dir": name}, **sections}
        )
    )
    return f"{name}.yaml"


SIZE = ("--nodes", "2", "--gpus-per-node", "2")


def test_a_plan_needs_no_slurm_and_writes_nothing(here: Path) -> None:
    out = llada(
        "launch",
        config(here, "planned"),
        "--cluster",
        "cluster.yaml",
        *SIZE,
        "--dry-run",
        "--chain",
        "2",
        "--then",
        "convert",
        "train.steps=7",
    )
    assert (
        "pretrain in planned: 2 nodes x 2 ranks = 4 ranks" in out
        and "starts at step 0 of 7" in out
        and "a chain of 2 jobs" in out
    )
    assert (
        "#SBATCH --ntasks-per-node=2" in out
        and "#SBATCH --no-requeue" in out
        and "then: a job converts" in out
    )
    volume = checkpoint_volume(load_config("planned.yaml", ["train.steps=7"]))
    assert volume.kept == 2 and f"\ncheckpoints: {volume} (every 4 steps)\n" in out
    assert not (here / "planned").exists()
    with pytest.raises(UserError, match="launch: no Slurm on this machine"):
        llada("launch", config(here, "planned"), "--cluster", "cluster.yaml", *SIZE)


def test_fine_tuning_is_launched_alike(here: Path) -> None:
    (here / "words.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"what is {n}?", "response": f"{n} it is"}) + "\n"
            for n in range(40)
        )
    )
    prepare_sft([here / "words.jsonl"], here / "tokenizer", here / "words", validation_fraction=0.2)
    tuned = config(
        here,
        "tuned",
        task="sft",
        data={"sequence_length": 64, "mixture": [{"path": "words"}]},
        run={"dir": "tuned", "init_from": "whole"},
    )
    out = llada("launch", tuned, "--cluster", "cluster.yaml", *SIZE, "--dry-run")
    assert "sft in tuned: 2 nodes x 2 ranks = 4 ranks" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--cluster", "cluster.yaml"], "--gpus-per-node is required: one rank per GPU"),
        (["--gpus-per-node", "2"], "--cluster: missing"),
        (["--local", "--cluster", "cluster.yaml"], "--local takes no profile"),
        (["--local", "--nodes", "2"], "--nodes: 2 is for a cluster"),
        (["--local", "--chain", "2"], "--chain: 2 is for a cluster"),
        (
            ["--cluster", "cluster.yaml", *SIZE, "--then", "eval"],
            "--then: 'eval' is not allowed; it can be: convert",
        ),
        (
            ["--cluster", "cluster.yaml", *SIZE, "--after", "soon"],
            "--after: 'soon' is not the number of a job",
        ),
        (
            ["--cluster", "cluster.yaml", *SIZE, "--dry-run", "train.step=7"],
            "train.step: unknown setting",
        ),
        (
            ["--cluster", "cluster.yaml", *SIZE, "--dry-run", "--set", "tme=3"],
            "tme: unknown setting .*did you mean 'time'",
        ),
        (["--cluster", "cluster.yaml", *SIZE, "--dry-run", "run.init_from=nowhere"], "nowhere"),
        (
            ["--cluster", "cluster.yaml", *SIZE, "--dry-run", "run.dir=whole", "seed=6"],
            "run.dir: 'whole' contains a run with a different config, seed: 5 -> 6",
        ),
    ],
)
def test_mistakes(here: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llada("launch", config(here, "mistaken"), *words)
    assert not (here / "mistaken").exists()


def test_too_little_disk_for_two_checkpoints(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 10**12, "free": 10**6})
    monkeypatch.setattr("llada.outputs.shutil", like(shutil, disk_usage=lambda _: usage))
    with pytest.raises(UserError, match=r"run.dir: 'big' needs [\d.]+ [kM]B, and .* has 1 MB left"):
        llada("launch", config(here, "big"), "--local", "--gpus-per-node", "2", "--dry-run")
    # A machine without Slurm is not the one that the run will be on.
    out = llada("launch", config(here, "big"), "--cluster", "cluster.yaml", *SIZE, "--dry-run")
    assert (
        "MB left; checked on this machine only; the cluster's disk is checked at launch there"
        in out
    )


def test_only_training_takes_whole_nodes(here: Path) -> None:
    (here / "whole_nodes.yaml").write_text(yaml.safe_dump({"time": "01:00:00", "exclusive": True}))
    own = ["--cluster", "whole_nodes.yaml", "--dry-run"]
    data = ["launch", "data-prepare", "--tasks", "2", *own]
    words = ["--input", "tokenizer", "--tokenizer", "tokenizer", "--output", "new"]
    training = llada("launch", config(here, "planned"), *own, *SIZE, "--then", "convert")
    assert training.count("#SBATCH --exclusive") == 1
    assert "#SBATCH --exclusive" not in llada(*data, *words)
    assert "#SBATCH --exclusive" in llada(*data, "--set", "cpu_jobs.exclusive=true", *words)


def test_a_run_that_diverged_has_failed(here: Path) -> None:
    """Without a launcher the run writes its own events."""
    name = config(here, "diverged", train={"steps": 30, "max_skipped": 0})
    with pytest.raises(RunError, match="not finite"):
        train(load_config(here / name, ["schedule.stages.0.end=1e30"]), StopRequest())
    status = read_status(Path("diverged"))
    assert status.state == "FAILED" and status.reason is not None and "not finite" in status.reason


def test_a_run_without_a_launcher_from_outside(here: Path) -> None:
    status = read_status(Path("whole"))
    assert (status.state, status.step, status.steps, status.checkpoint, status.restarts) == (
        "FINISHED",
        12,
        12,
        12,
        None,
    )
    assert status.loss is not None and "12 of 12; latest checkpoint 12" in llada("status", "whole")
    with pytest.raises(UserError, match="RUN: 'corpus' is not a run folder"):
        llada("status", "corpus")
    assert "nothing runs" in llada("stop", "whole")
    table = llada("runs", ".").splitlines()
    assert table[0].split() == [
        "run",
        "task",
        "state",
        "step",
        "loss",
        "tokens/s",
        "to",
        "go",
        "restarts",
    ]
    assert any(
        line.startswith("whole") and "FINISHED" in line and "12/12" in line for line in table
    )
    with pytest.raises(UserError, match="ROOTS: no folder 'nowhere'"):
        llada("runs", "nowhere")


def test_logs_of_attempts_and_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    for attempt in (1, 2):
        folder = tmp_path / "logs" / f"attempt-{attempt:04d}"
        folder.mkdir(parents=True)
        for rank in (0, 1):
            (folder / f"rank_{rank:05d}.log").write_text(f"attempt {attempt} rank {rank}\n")
    run = str(tmp_path)
    assert llada("logs", run) == "attempt 2 rank 0\n"
    assert llada("logs", run, "--rank", "1", "--attempt", "1") == "attempt 1 rank 1\n"
    # nothing runs, so nothing more is to come
    assert llada("logs", run, "-f") == "attempt 2 rank 0\n"
    with pytest.raises(UserError, match="--rank: 7 has no log; there are 0 to 1"):
        llada("logs", run, "--rank", "7")
    with pytest.raises(UserError, match="--attempt: 3 is not one of 1, 2"):
        llada("logs", run, "--attempt", "3")


def test_events_survive_torn_lines_and_tell_restarts(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert restarts([]) == {} and events.read(tmp_path) == []
    log.write("started", attempt=1)
    log.write(
        "requeued", attempt=1, failure=True, reason="rank 1 on n1: killed by SIGKILL", excluded=None
    )
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "torn\n[1]\n')
    log.write("started", attempt=2)
    lines = events.read(tmp_path)
    assert [line["event"] for line in lines] == ["started", "requeued", "started"]
    assert "excluded" not in lines[1]
    assert abs(lines[0]["time"] - time.time()) < 60
    assert restarts(lines) == {
        "attempt": 2,
        "restarts": 1,
        "last_error": "rank 1 on n1: killed by SIGKILL",
    }


def test_a_run_that_died_without_a_word_is_lost(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 9}")
    EventLog(tmp_path).write("started", attempt=1)
    assert read_status(tmp_path).state == "LOST"
    EventLog(tmp_path).write("failed", attempt=1, reason="why", failure=True)
    status = read_status(tmp_path)
    assert (status.state, status.reason, status.last_error) == ("FAILED", "why", "why")

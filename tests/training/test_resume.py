"""A run that is killed, stopped or extended repeats the uninterrupted one to the last digit."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.workplace import LIMIT, Workplace


def kill_when(
    workplace: Workplace, config: str, ready: Callable[[], bool], number: int = signal.SIGKILL
) -> tuple[int, str]:
    """Start a run, send it `number` once `ready`, and return its exit code and output.

    One that gets SIGTERM is a new process: what a fork inherits must not be why signals work.
    """
    process = workplace.start("pretrain", config, fresh=number == signal.SIGTERM)
    deadline = time.monotonic() + LIMIT
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, f"the run ended before the signal\n{process.communicate()}"
    process.send_signal(number)
    out, _ = process.communicate(timeout=LIMIT)
    return process.returncode, out


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def slow_config(workplace: Workplace, name: str) -> str:
    """The config of `whole` in a folder of its own."""
    shutil.rmtree(workplace.folder / name, ignore_errors=True)
    return workplace.config(f"{name}.yaml", run={"dir": name, "threads": 2})


def test_killed_again_and_again(workplace: Workplace) -> None:
    """Before the first checkpoint, after one, inside a save and near the end; the same command goes
    on each time.
    """
    config = slow_config(workplace, "killed_often")
    metrics = workplace.folder / "killed_often" / "metrics.jsonl"
    checkpoints = workplace.folder / "killed_often" / "checkpoints"

    def lines(number: int) -> Callable[[], bool]:
        return lambda: count(metrics) >= number

    for moment in (lines(1), lines(6), (checkpoints / "step_00000008.partial").exists, lines(13)):
        code, _ = kill_when(workplace, config, moment)
        assert code == -signal.SIGKILL
    workplace.run("pretrain", config)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
    ]
    assert workplace.lines("killed_often") == workplace.lines("whole")


def test_signals_stop_at_the_next_step_with_a_checkpoint(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each to a process that continues where the last one stopped."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))  # as torchrun does
    slow_config(workplace, "stopped")
    config = workplace.config(
        "stopped.yaml", run={"dir": "stopped", "threads": 2}, train={"steps": 99}
    )
    metrics, done = workplace.folder / "stopped" / "metrics.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before = count(metrics)
        code, out = kill_when(
            workplace, config, lambda before=before: count(metrics) > before, number
        )  # type: ignore[misc]
        assert code == 75
        assert workplace.lines("stopped")[-1]["step"] > done
        done = workplace.lines("stopped")[-1]["step"]
        assert (
            workplace.folder / "stopped" / "checkpoints" / f"step_{done:08d}" / "COMMITTED"
        ).is_file()
        assert f"{number.name}: stopped after step {done} with a checkpoint" in out
        message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
        assert (
            message
            == "not finished: stopped with a checkpoint; run the same command again to continue"
        )
    assert done < 99
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    workplace.run("pretrain", config, f"train.steps={max(done, 12)}")
    whole = workplace.lines("whole")
    assert workplace.lines("stopped")[: len(whole)] == whole


def test_extending_a_run_changes_nothing_before(workplace: Workplace) -> None:
    config = slow_config(workplace, "extended")
    workplace.run("pretrain", config, "train.steps=6")
    workplace.run("pretrain", config)
    lines = [
        line
        for line in workplace.lines("extended")
        if not ("nelbo_per_token" in line and line["step"] == 6)
    ]
    assert lines == workplace.lines("whole")


@pytest.mark.slow
def test_twenty_processes_give_one_result(workplace: Workplace) -> None:
    """The first multi-threaded call of a math function may be imprecise in a fresh process; wide
    tensors make it likely.
    """
    wide = {
        "num_layers": 1,
        "hidden_size": 256,
        "num_attention_heads": 2,
        "ffn_hidden_size": 512,
        "vocab_size": 512,
    }
    data = {"sequence_length": 512, "mixture": [{"path": "corpus"}]}
    seen = set()
    for i in range(20):
        config = workplace.config(
            "fresh.yaml",
            run={"dir": f"fresh{i}", "threads": 2},
            model=wide,
            data=data,
            train={"steps": 3},
            validation={"every": 99, "windows": 8},
        )
        workplace.run("pretrain", config, fresh=True)
        seen.add(json.dumps(workplace.lines(f"fresh{i}")))
        shutil.rmtree(workplace.folder / f"fresh{i}")
    assert len(seen) == 1


def test_two_ranks_give_the_losses_of_one(workplace: Workplace) -> None:
    config = workplace.config("two.yaml", run={"dir": "two", "threads": 1})
    workplace.run(
        "--nproc-per-node=2",
        "-m",
        "llada",
        "pretrain",
        config,
        command=("-m", "torch.distributed.run"),
    )
    for ours, whole in zip(workplace.lines("two"), workplace.lines("whole"), strict=True):
        for key in ("loss", "grad_norm", "nelbo_per_token"):
            assert ours.get(key) == (pytest.approx(whole[key], rel=1e-5) if key in whole else None)
    assert (
        json.loads(
            (workplace.folder / "two" / "checkpoints" / "step_00000012" / "state.json").read_text()
        )["ranks"]
        == 2
    )


def test_a_new_run_starts_from_a_checkpoint_and_records_where_its_weights_came_from(
    workplace: Workplace,
) -> None:
    for what in ("weights", "weights+optimizer"):
        name = "annealed-" + what
        config = workplace.config(
            "annealed.yaml",
            run={"dir": name, "threads": 2, "init_from": "whole", "init_what": what},
            train={"steps": 1},
        )
        out = workplace.run("pretrain", config, "data.sequence_length=128").stdout
        assert f"initialized from whole/checkpoints/step_00000012 ({what})" in out
        lineage = yaml.safe_load((workplace.folder / name / "config.yaml").read_text())[
            "provenance"
        ]["lineage"]
        wanted = {
            "init_from": "whole/checkpoints/step_00000012",
            "objective": "masked",
            "step": 12,
            "tokens": 12 * 8 * 64,
            "what": what,
            "sequence_length": 64,
        }
        assert lineage == [wanted]
    fresh = workplace.config("fresh.yaml", run={"dir": "fresh", "threads": 2}, train={"steps": 1})
    workplace.run("pretrain", fresh, "data.sequence_length=128")
    # Old moments make another first update than none: the validation after it differs, what comes
    # before does not.
    first, second = (
        workplace.lines("annealed-weights"),
        workplace.lines("annealed-weights+optimizer"),
    )
    assert [line["step"] for line in first] == [0, 1, 1]
    assert first[:2] == second[:2] and first[2]["nelbo_per_token"] != second[2]["nelbo_per_token"]
    assert first[1]["loss"] < workplace.lines("fresh")[0]["loss"] - 0.3


def test_the_run_folder(workplace: Workplace) -> None:
    folder = workplace.folder / "whole"
    files = [
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "loss.png",
        "metrics.jsonl",
        "validation",
    ]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = workplace.lines("whole")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    valid = [line for line in lines if "nelbo_per_token" in line]
    assert [line["step"] for line in valid] == [4, 8, 12]
    assert (
        set(valid[0]["corpora"]) == {"corpus"}
        and len(valid[0]["corpora"]["corpus"]["t_deciles"]) == 10
    )
    assert (
        valid[0]["nelbo_per_token"] > valid[2]["nelbo_per_token"] > 0
        and valid[0]["nelbo_per_token_se"] > 0
    )
    # A run's own config.yaml is a config again.
    assert (
        workplace.run("config", "whole/config.yaml").stdout
        == workplace.run("config", "whole.yaml").stdout
    )

"""Users' mistakes: one line that names the setting, exit 2, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from typer.testing import CliRunner

from llada.cli import app
from llada.data.manifest import Manifest
from llada.errors import UserError
from tests.stand_ins import like
from tests.workplace import Workplace


def refusal(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The message of the UserError that the command ends with; the terminal shows it as one line
    and exits with 2.
    """
    monkeypatch.chdir(workplace.folder)
    # keep pytest's own handlers
    monkeypatch.setattr("llada.training.signals.signal", like(signal, signal=lambda *_: None))
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_the_terminal_shows_one_line_and_exit_2(workplace: Workplace) -> None:
    done = workplace.run("pretrain", workplace.config(), "train.stps=3", code=2)
    allowed = "train.steps, train.max_skipped, train.spike_sigma"
    allowed += (
        ", train.spike_loss_factor, train.spike_norm_factor, train.spike_window, train.skip_spikes"
    )
    assert (
        done.stderr
        == "error: train.stps: unknown setting (did you mean 'train.steps'?); allowed here:"
        f" {allowed}\n"
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=sft"], "task: run.yaml says 'sft', `llada pretrain` runs task 'pretrain' only"),
        (["data.mixture.0.path=nowhere"], "data.mixture.0.path: .*nowhere"),
        (
            ["model.vocab_size=256"],
            "model.vocab_size: 256 is too small for corpus, whose tokenizer has 512 ids",
        ),
        (
            ["schedule.stages=[{shape: linear, end: 1, steps: 3}]"],
            "schedule.stages: end after 3 steps",
        ),
        (["data.sequence_length=10000000"], "data.mixture.0.path: corpus contains no full window"),
        (
            ["data.mixture.0.max_epochs=0.0001"],
            "data.mixture.0.max_epochs: allows less than one of the",
        ),
        (
            ["data.mixture.0.max_epochs=0.03"],
            r"train.steps: 12 steps need 96 samples, the capped mixture holds \d\d;",
        ),
        (["engine=deepspeed"], "engine: 'deepspeed' is not allowed"),
        (["parallel.tensor=2"], "do not divide the world size 1"),
        (["run.dir=whole.yaml"], "run.dir: 'whole.yaml' cannot be created"),
        (["run.dir=/proc/x"], "run.dir: '/proc/x' cannot be created"),
        (["run.init_from=nowhere"], "run.init_from: no folder 'nowhere'"),
        (["run.init_from=corpus"], "run.init_from: 'corpus' is neither a checkpoint"),
        (
            ["run.dir=corpus"],
            r"run.dir: 'corpus' is a prepared corpus \(it contains manifest.json\)",
        ),
        (
            ["run.init_from=whole", "model.hidden_size=32"],
            r"a different architecture \(2 layers of width 64, .* is model.hidden_size: 64 -> 32",
        ),
        (
            ["data.mixture=[{path: corpus}, {path: corpus}]"],
            "data.mixture.1.path: corpus contains the same data as corpus",
        ),
    ],
)
def test_config_and_data(
    overrides: list[str], message: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(
        workplace,
        monkeypatch,
        "pretrain",
        workplace.config(run={"dir": "refused", "threads": 2}),
        *overrides,
    )
    assert re.search(message, said), said
    assert "\n" not in said
    assert not (workplace.folder / "refused").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=6"], "seed: 5 -> 6 has changed since"),
        (["batch.global=16"], "batch.global: 8 -> 16"),
        (["objective.masking=fixed_count"], "objective.masking: 'bernoulli' -> 'fixed_count'"),
        (["data.mixture.0.path=other"], "data.mixture: data "),
        (["data.mixture.0.weight_at=[{tokens: 1000000000, weight: 2}]"], "data.mixture: data "),
        (
            ["schedule.stages.0.end=0.01"],
            "schedule.stages: learning rate of step 1: 0.0001 -> 0.001",
        ),
        (["run.threads=1"], "run.threads: 2 -> 1"),
    ],
)
def test_resuming_another_run(
    overrides: list[str], message: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(workplace, monkeypatch, "pretrain", "whole.yaml", *overrides)
    assert message in said and "--allow-changed" in said


def test_another_architecture_is_never_resumed(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for allow in ([], ["--allow-changed"]):
        said = refusal(
            workplace, monkeypatch, "pretrain", "whole.yaml", "model.ffn_hidden_size=96", *allow
        )
        assert "a different architecture" in said and "model.ffn_hidden_size: 128 -> 96" in said


def test_a_change_can_be_allowed_and_is_recorded(workplace: Workplace) -> None:
    shutil.copytree(workplace.folder / "whole", workplace.folder / "changed")
    config = workplace.config(
        "changed.yaml", run={"dir": "changed", "threads": 2}, train={"steps": 13}
    )
    workplace.run("pretrain", config, "--allow-changed", "seed=6")
    state = json.loads(
        (workplace.folder / "changed" / "checkpoints" / "step_00000013" / "state.json").read_text()
    )
    assert state["lineage"] == [{"resumed_at_step": 12, "changed": ["seed: 5 -> 6"]}]


def damaged(workplace: Workplace, name: str) -> Path:
    shutil.rmtree(workplace.folder / name, ignore_errors=True)
    shutil.copytree(workplace.folder / "corpus", workplace.folder / name)
    return workplace.folder / name


def run_on(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> str:
    config = workplace.config(
        run={"dir": "refused", "threads": 2},
        data={"sequence_length": 64, "mixture": [{"path": corpus.name}]},
    )
    return refusal(workplace, monkeypatch, "pretrain", config)


def test_a_truncated_shard(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = damaged(workplace, "truncated")
    path = corpus / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert "train-00000.bin" in run_on(workplace, monkeypatch, corpus)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "manifest.json"])
def test_one_altered_byte(name: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = damaged(workplace, "altered")
    data = bytearray((corpus / name).read_bytes())
    data[len(data) // 2] ^= 1
    (corpus / name).write_bytes(data)
    assert name in run_on(workplace, monkeypatch, corpus)


def test_a_mask_id_in_a_shard(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with matching checksums, as a faulty tool of the user's would: found at the start, or
    when the window is read.
    """
    corpus = damaged(workplace, "forged")
    manifest = Manifest.load(corpus)
    path = corpus / "train-00000.bin"
    tokens = np.fromfile(path, dtype=manifest.dtype)
    tokens[:] = manifest.mask_id
    tokens.tofile(path)
    entry: dict[str, Any] = {
        **vars(manifest.shards[0]),
        "bin_xxh3": xxhash.xxh3_64_hexdigest(path.read_bytes()),
    }
    type(manifest)(
        **{**vars(manifest), "shards": [type(manifest.shards[0])(**entry), *manifest.shards[1:]]}
    ).save(corpus)
    said = run_on(workplace, monkeypatch, corpus)
    assert "the mask token" in said and "llada data verify" in said
    assert not (workplace.folder / "refused").exists()
    config = workplace.config(
        run={"dir": "late", "threads": 2},
        data={"sequence_length": 64, "mixture": [{"path": corpus.name}], "verify_bytes": 0},
    )
    said = refusal(workplace, monkeypatch, "pretrain", config)
    assert "the mask token" in said and "llada data verify" in said


def test_a_checkpoint_without_its_marker_is_ignored_with_a_word(workplace: Workplace) -> None:
    shutil.copytree(workplace.folder / "whole", workplace.folder / "unmarked")
    (workplace.folder / "unmarked" / "checkpoints" / "step_00000012" / "COMMITTED").unlink()
    config = workplace.config("unmarked.yaml", run={"dir": "unmarked", "threads": 2})
    out = workplace.run("pretrain", config).stdout
    assert "ignored unmarked/checkpoints/step_00000012: no COMMITTED file" in out
    assert "resumed from unmarked/checkpoints/step_00000008" in out
    assert workplace.lines("unmarked") == workplace.lines("whole")

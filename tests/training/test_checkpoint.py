"""Names and markers: everything is on the disk before the marker says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llada.training import checkpoint
from tests.workplace import CONFIG, Workplace


def test_every_file_is_flushed_before_the_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")

    def write(folder: Path) -> None:
        (folder / "weights.distcp").write_bytes(b"w")

    root = tmp_path / "run" / "checkpoints"
    state = checkpoint.State(3, 12, 100, "data", {}, {}, [])
    final = checkpoint.save(root, state, tmp_path / "tokenizer", write, True, lambda: None)
    partial = "run/checkpoints/step_00000003.partial"
    marker = flushed.index(f"{partial}/{checkpoint.MARKER}.tmp")
    before = set(flushed[:marker])
    files = {str(path.relative_to(final)) for path in final.rglob("*")} - {checkpoint.MARKER}
    assert {f"{partial}/{name}" for name in files} <= before
    assert "run" in before, "the entry of checkpoints/"
    assert flushed[-1] == "run/checkpoints", "the renamed folder's entry"


def _start_from(place: Workplace, name: str, source: str = "whole", **changes: Any) -> str:
    config = {**CONFIG, **changes, "run": {"dir": name, "threads": 2, "init_from": source}, "train": {"steps": 1}}
    (place.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return f"{name}.yaml"


def test_a_start_from_weights_with_another_rope_base(workplace: Workplace) -> None:
    """Longer sequences are a named use of init_from: they want another base."""
    model = {**CONFIG["model"], "rope_theta": 1e4}
    out = workplace.run("pretrain", _start_from(workplace, "longer", model=model, seed=8)).stdout
    assert "initialised from whole/checkpoints/step_00000012 (weights)" in out
    assert "reads the same samples again" not in out


def test_the_same_seed_and_data_are_said(workplace: Workplace) -> None:
    out = workplace.run("pretrain", _start_from(workplace, "again")).stdout
    assert "seed: 5 and the data are those of whole/checkpoints/step_00000012: this run reads the same samples again" in out


def test_weights_of_another_tokenizer_are_refused(workplace: Workplace) -> None:
    source = workplace.folder / "foreign"
    shutil.copytree(workplace.folder / "whole", source)
    path = source / "checkpoints" / "step_00000012" / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}'))
    assert path.read_text() != text
    done = workplace.run("pretrain", _start_from(workplace, "mixed_up", "foreign"), code=2)
    assert done.stderr.startswith("error: run.init_from: foreign/checkpoints/step_00000012 was trained with another tokenizer")
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace.folder / "mixed_up").exists()


def test_tasks_of_srun_that_cannot_find_each_other_are_refused(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would each train alone, on the same GPU, into the same folder."""
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "5")
    config = workplace.config("alone.yaml", run={"dir": "alone", "threads": 2})
    done = workplace.run("pretrain", config, code=2)
    assert done.stderr.startswith("error: environment: srun started 8 tasks, but MASTER_ADDR")
    assert not (workplace.folder / "alone").exists()

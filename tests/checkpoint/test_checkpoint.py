"""Names and markers: everything is on the disk before the marker says so."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llada.checkpoint.format import CheckpointState, begin_checkpoint, commit_checkpoint, read_state
from llada.checkpoint.names import MARKER, checkpoint_name, committed_checkpoints
from llada.checkpoint.retention import prune_checkpoints
from llada.checkpoint.verification import verify_checkpoint
from llada.files import checksum
from llada.tokenizer import Tokenizer
from tests.engine.saves import read_tensors
from tests.stand_ins import like
from tests.workplace import CONFIG, Workplace


def test_every_file_is_flushed_before_the_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def noted(descriptor: int) -> None:
        flushed.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        os.fsync(descriptor)

    monkeypatch.setattr("llada.files.os", like(os, fsync=noted))
    root = tmp_path / "run" / "checkpoints"
    root.parent.mkdir()
    state = CheckpointState(3, 12, 100, "data", {}, {}, [], [])
    folder = begin_checkpoint(root, 3)
    (folder / "model" / "weights.distcp").write_bytes(b"w")
    written = {"weights.distcp": checksum(folder / "model" / "weights.distcp")}
    final = commit_checkpoint(folder, state, {"tokenizer.json": b"{}"}, written)
    partial = "run/checkpoints/step_00000003.partial"
    [marker] = [
        i
        for i, name in enumerate(flushed)
        if name.startswith(f"{partial}/{MARKER}.") and name.endswith(".tmp")
    ]
    before = set(flushed[:marker])
    files = {str(path.relative_to(final)) for path in final.rglob("*")} - {MARKER}
    assert {f"{partial}/{name}" for name in files} <= before
    assert "run" in before, "the entry of checkpoints/"
    assert flushed[-1] == "run/checkpoints", "the renamed folder's entry"
    assert verify_checkpoint(final) == []
    assert set(json.loads((final / MARKER).read_text())["files"]) == {
        "model/weights.distcp",
        "state.json",
        "tokenizer/tokenizer.json",
    }


def made(root: Path, step: int) -> Path:
    """A committed checkpoint of made-up files."""
    folder = begin_checkpoint(root / "checkpoints", step)
    (folder / "model" / "a.distcp").write_bytes(bytes(range(200)))
    return commit_checkpoint(
        folder, CheckpointState(step, 0, 0, "data", {}, {}, [], []), {"tokenizer.json": b"{}"}, {}
    )


@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize("name", ["model/a.distcp", "state.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(b"", "has 0 bytes"), (None, "cannot be read"), ("flip", "another checksum")],
)
def test_damage_to_any_file_is_found_by_some_share(
    shares: int, name: str, change: Any, message: str, tmp_path: Path
) -> None:
    folder = made(tmp_path, 4)
    path = folder / name
    if change is None:
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if change == "flip" else change)
    problems = [
        problem for share in range(shares) for problem in verify_checkpoint(folder, share, shares)
    ]
    assert len(problems) == 1
    assert f"{path} {'has' if message != 'cannot be read' else ''}".strip() in problems[0]
    assert message in problems[0]


def test_a_damaged_marker_is_damage(tmp_path: Path) -> None:
    folder = made(tmp_path, 4)
    (folder / MARKER).write_text('{"step": 4}')
    assert "COMMITTED is damaged" in verify_checkpoint(folder)[0]


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (2, None, [8, 10]),
        (1, 4, [4, 8, 10]),
        (9, None, [2, 4, 6, 8, 10]),
        (None, 4, [2, 4, 6, 8, 10]),
    ],
)
def test_retention(last: int | None, every: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        made(tmp_path, step)
    root = tmp_path / "checkpoints"
    (root / "step_00000001.deleted").mkdir()
    prune_checkpoints(root, last, every)
    assert [path.name for path in committed_checkpoints(root)] == [
        checkpoint_name(step) for step in kept
    ]
    assert sorted(path.name for path in root.iterdir()) == [checkpoint_name(step) for step in kept]


def test_a_run_keeps_what_it_is_told_to(workplace: Workplace) -> None:
    """Written in the background or not, the same checkpoints stay, and each holds its own step's
    tensors, not later ones.
    """
    stored = []
    for asynchronous in (True, False):
        name = f"kept_{asynchronous}"
        keep = {"every": 2, "keep_last": 2, "keep_every": 6, "asynchronous": asynchronous}
        workplace.run(
            "pretrain",
            workplace.config(f"{name}.yaml", run={"dir": name, "threads": 2}, checkpoint=keep),
        )
        checkpoints = workplace.folder / name / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == [
            "step_00000006",
            "step_00000010",
            "step_00000012",
        ]
        assert workplace.lines(name) == workplace.lines("whole")
        assert all(verify_checkpoint(folder) == [] for folder in checkpoints.iterdir())
        raw = [
            json.loads(line)
            for line in (workplace.folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        blocked = [line["checkpoint_blocked_seconds"] for line in raw if "loss" in line]
        assert blocked[0] == 0
        assert max(blocked) > 0
        stored.append(read_tensors(checkpoints / "step_00000006" / "model"))
    assert len(stored[0]) > 30
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(value, stored[1][tensor]) for tensor, value in stored[0].items())
    # A run that was killed after its last checkpoint and before the pruning leaves one too many;
    # the next start mends that.
    (checkpoints / "step_00000010").rename(checkpoints / "step_00000009")
    shutil.copytree(checkpoints / "step_00000009", checkpoints / "step_00000010")
    workplace.run("pretrain", f"{name}.yaml")
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step_00000006",
        "step_00000010",
        "step_00000012",
    ]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(workplace: Workplace) -> None:
    shutil.copytree(workplace.folder / "whole", workplace.folder / "hurt")
    latest = workplace.folder / "hurt" / "checkpoints" / "step_00000012"
    path = max(latest.glob("model/*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    config = workplace.config("hurt.yaml", run={"dir": "hurt", "threads": 2})
    out = workplace.run("pretrain", config).stdout
    assert (
        f"ignored hurt/checkpoints/step_00000012: hurt/checkpoints/step_00000012/model/{path.name}"
        " has another checksum" in out
    )
    assert "resumed from hurt/checkpoints/step_00000008" in out
    assert workplace.lines("hurt") == workplace.lines("whole")
    done = workplace.run("pretrain", _start_from(workplace, "from_hurt", str(latest)))
    assert done.returncode == 0, "the damaged checkpoint was written anew"
    for folder in (workplace.folder / "hurt" / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    done = workplace.run("pretrain", config, code=2)
    assert "hurt/checkpoints contains no valid checkpoint" in done.stderr
    done = workplace.run("pretrain", _start_from(workplace, "from_hurt2", "hurt"), code=2)
    assert len(done.stderr.splitlines()) == 1


FULL_DISK = """
import errno
import functools
from llada.engine import megatron
from llada.__main__ import main
from megatron.core.dist_checkpointing.strategies import filesystem_async

real, saves = filesystem_async._write_item, []

@functools.wraps(real)
def write(*arguments, **options):
    if len(saves) > 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(*arguments, **options)

start = megatron.MegatronEngine.start_save

def start_save(self, folder):
    saves.append(folder)
    return start(self, folder)

filesystem_async._write_item = write
megatron.MegatronEngine.start_save = start_save
main()
"""


def test_a_full_disk_leaves_the_checkpoints_before(workplace: Workplace) -> None:
    """Writing fails in the second save, as on a full disk: one clear line, exit 1, and the first
    checkpoint is as it was.
    """
    (workplace.folder / "full.py").write_text(FULL_DISK)
    config = workplace.config("full.yaml", run={"dir": "full", "threads": 2})
    done = workplace.run("pretrain", config, code=1, command=("full.py",))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "failed: checkpoint after step 8: full/checkpoints cannot be written on rank 0"
    )
    assert re.search(
        r"\(No space left on device: a checkpoint needs about 2.36 MB, [\d.]+ \wB are left\)", last
    ), last
    assert [path.name for path in (workplace.folder / "full" / "checkpoints").iterdir()] == [
        "step_00000004"
    ]
    assert verify_checkpoint(workplace.folder / "full" / "checkpoints" / "step_00000004") == []
    workplace.run("pretrain", config)
    assert workplace.lines("full") == workplace.lines("whole")


def _start_from(workplace: Workplace, name: str, source: str = "whole", **changes: Any) -> str:
    config = {
        **CONFIG,
        **changes,
        "run": {"dir": name, "threads": 2, "init_from": source},
        "train": {"steps": 1},
    }
    (workplace.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return f"{name}.yaml"


def test_a_start_from_weights_with_another_rope_base(workplace: Workplace) -> None:
    """Longer sequences are a named use of init_from: they want another base."""
    model = {**CONFIG["model"], "rope_theta": 1e4}
    config = _start_from(workplace, "longer", model=model, seed=8)
    refused = workplace.run("pretrain", config, code=2).stderr
    assert (
        "model.rope_theta: 10000.0, but run.init_from: whole/checkpoints/step_00000012 has"
        " 500000.0; remove it" in refused
    )
    out = workplace.run("pretrain", config, "--allow-changed").stdout
    assert "rope_theta 10000.0, norm_eps 1e-05" in out
    state = read_state(workplace.folder / "longer" / "checkpoints" / "step_00000001")
    assert state.lineage[-1]["changed"] == ["model.rope_theta: 500000.0 -> 10000.0"]
    assert "initialized from whole/checkpoints/step_00000012 (weights)" in out
    assert "reads the same samples again" not in out


def test_the_same_seed_and_data_are_said(workplace: Workplace) -> None:
    out = workplace.run("pretrain", _start_from(workplace, "again")).stdout
    assert (
        "seed: 5 and the data are those of whole/checkpoints/step_00000012: this run reads the same"
        " samples again" in out
    )


def test_weights_of_another_tokenizer_are_refused(workplace: Workplace) -> None:
    source = workplace.folder / "foreign"
    shutil.copytree(workplace.folder / "whole", source)
    path = source / "checkpoints" / "step_00000012" / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}'))
    assert path.read_text() != text
    state = path.parents[1] / "state.json"
    state.write_text(
        json.dumps(
            {**json.loads(state.read_text()), "tokenizer": Tokenizer.load(path.parent).fingerprint}
        )
    )
    done = workplace.run("pretrain", _start_from(workplace, "mixed_up", "foreign"), code=2)
    assert done.stderr.startswith(
        "error: run.init_from: foreign/checkpoints/step_00000012 was trained with another tokenizer"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace.folder / "mixed_up").exists()


def test_tasks_of_srun_that_cannot_find_each_other_are_refused(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would each train alone, on the same GPU, into the same folder."""
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "5")
    config = workplace.config("alone.yaml", run={"dir": "alone", "threads": 2})
    done = workplace.run("pretrain", config, code=2)
    assert done.stderr.startswith("error: environment: srun started 8 tasks, but MASTER_ADDR")
    assert not (workplace.folder / "alone").exists()

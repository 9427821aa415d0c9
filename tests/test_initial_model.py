"""The model section of a config that starts from weights comes from their folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from llada.checkpoint.format import STATE_FILE, CheckpointState
from llada.checkpoint.names import MARKER
from llada.errors import UserError
from llada.training.configure import load_config
from tests.workplace import CONFIG

MODEL: dict[str, Any] = {**CONFIG["model"], "rope_theta": 1e4, "norm_eps": 1e-6}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
}


def hugging_face_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


def run_folder(path: Path) -> Path:
    folder = path / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    config = {"precision": "fp32", "data": {"sequence_length": 64}, "model": MODEL}
    state = CheckpointState(3, 24, 1536, "", config, {}, [], [])
    (folder / STATE_FILE).write_text(json.dumps(asdict(state)))
    (folder / MARKER).write_text("{}")
    return path


def write(path: Path, model: object, **run: object) -> Path:
    config = {**CONFIG, "run": {"dir": str(path / "run"), **run}, "model": model}
    if model is None:
        del config["model"]
    (path / "run.yaml").write_text(yaml.safe_dump(config))
    return path / "run.yaml"


@pytest.mark.parametrize("make", [hugging_face_folder, run_folder])
def test_what_a_config_leaves_out_comes_from_the_folder(make: Any, tmp_path: Path) -> None:
    """The defaults of the rotary base and the norm epsilon ruined a converted model."""
    source = str(make(tmp_path / "source"))
    whole = load_config(write(tmp_path, None, init_from=source)).model
    assert (whole.num_layers, whole.rope_theta, whole.norm_eps, whole.kv_heads) == (2, 1e4, 1e-6, 4)
    assert load_config(write(tmp_path, {"from": source})).model == whole
    assert load_config(write(tmp_path, CONFIG["model"], init_from=source)).model == whole
    assert (
        load_config(
            write(tmp_path, {"from": source, "num_query_groups": 4, "embedding_init_std": 1.0})
        ).model.embedding_init_std
        == 1.0
    )
    assert (
        load_config(
            write(tmp_path, CONFIG["model"]), [f"run.init_from={source}", "model.norm_eps=1e-5"]
        ).model.norm_eps
        == 1e-5
    )
    with pytest.raises(
        UserError,
        match=(
            r"^model.norm_eps: 1e-05, but model.from: .*source has 1e-06; leave one of the two out$"
        ),
    ):
        load_config(write(tmp_path, {"from": source, "norm_eps": 1e-5}))


def test_a_run_whose_source_is_gone_has_its_own_section(tmp_path: Path) -> None:
    source, config = (
        run_folder(tmp_path / "source"),
        write(tmp_path, None, init_from=str(tmp_path / "source")),
    )
    model = load_config(config).model
    shutil.rmtree(source)
    with pytest.raises(UserError, match=r"^run.init_from: no folder '.*source'"):
        load_config(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"model": model.model_dump()}))
    assert load_config(config).model == model
    partial = write(tmp_path, CONFIG["model"], init_from=str(source))
    assert load_config(partial).model == model, (
        "what it leaves out was taken from the folder before, and must not become a default now"
    )


def test_without_a_source_the_section_is_required(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model: missing"):
        load_config(write(tmp_path, None))
    with pytest.raises(UserError, match=r"^model.from: no folder '.*nowhere'"):
        load_config(write(tmp_path, {"from": str(tmp_path / "nowhere")}))

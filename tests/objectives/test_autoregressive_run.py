"""An autoregressive run from training to text: resumed, exported as a Llama, sampled."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llada.checkpoint.format import (
    load_tokenizer,
    read_state,
    resolve_checkpoint,
    trained_config,
)
from llada.config import build_config
from llada.data.manifest import TRAIN, VALIDATION
from llada.data.pretrain import PretrainData
from llada.engine.base import ParallelRank
from llada.evaluation.validation import Validator
from llada.model.weights import EMBEDDING, FINAL_NORM, HEAD, canonical_shapes
from llada.sampling.autoregressive import CausalModel
from llada.sampling.diffusion import SamplingOptions
from llada.sampling.loading import load_writer
from tests.model.in_memory import InMemory
from tests.workplace import CONFIG, Workplace

AUTOREGRESSIVE = {"objective": {"name": "autoregressive"}}


@pytest.fixture(scope="module")
def arm(workplace: Workplace) -> Workplace:
    """A workplace with the run `arm` of twelve steps and its export `arm_hf`."""
    config = workplace.config("arm.yaml", run={"dir": "arm", "threads": 2}, **AUTOREGRESSIVE)
    workplace.run("pretrain", config)
    out = workplace.run("convert", "to-hf", "arm", "arm_hf", "--verify").stdout
    assert "verified on 4 x 128 tokens" in out
    return workplace


def test_it_reads_what_the_diffusion_run_of_the_same_seed_reads(arm: Workplace) -> None:
    """And learns: held-out text becomes more likely."""
    own = arm.lines("arm")
    other = arm.lines("whole")
    assert [line["step"] for line in own] == [line["step"] for line in other]
    assert [line.get("tokens") for line in own] == [line.get("tokens") for line in other]
    validations = [line for line in own if "nelbo_per_token" in line]
    assert validations[-1]["nelbo_per_token"] < validations[0]["nelbo_per_token"] - 0.05
    # The four draws of a text are one and the same: there is no noise.
    assert validations[-1]["nelbo_per_token_se_noise"] == pytest.approx(0, abs=1e-6)
    measures = [
        [line["corpora"]["corpus"]["measure"] for line in lines if "nelbo_per_token" in line]
        for lines in (own, other)
    ]
    assert measures[0] == measures[1], "llada compare takes them as a pair"
    # Sample by sample: the same tokens, in the same order.
    mixture = [{"path": str(arm.folder / "corpus")}]
    raw = {**CONFIG, "data": {**CONFIG["data"], "mixture": mixture}}
    causal, diffusion = (
        PretrainData(build_config({**raw, **more})) for more in (AUTOREGRESSIVE, {})
    )
    read = set()
    for step in (1, 2, 9):
        plans = [data.plan(step) for data in (causal, diffusion)]
        for offset in range(len(plans[0].samples)):
            rows = [
                data.row(TRAIN, plan, offset)
                for data, plan in zip((causal, diffusion), plans, strict=True)
            ]
            assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
            assert rows[0].bounds.tolist() == rows[1].bounds.tolist()
            read.add(tuple(rows[0].tokens.tolist()))
    assert len(read) == 3 * CONFIG["batch"]["global"], "windows of a pass differ"


def test_a_likelihood_and_a_bound_are_compared_as_such(arm: Workplace) -> None:
    """The diffusion model may be better than its bound, so that it is not called worse."""
    output = arm.run("compare", "arm", "whole").stdout
    lines = [line for line in output.splitlines() if "errors are rough" not in line]
    assert "the same text and t in all runs, under the noise of each run's objective" in lines[0]
    assert "-log p" in lines[1] and lines[1].endswith(", autoregressive")
    assert "NELBO" in lines[2] and "masked, fixed_count" in lines[2]
    assert "better than" not in lines[3] and "is lower" in lines[3]
    assert lines[4].startswith("the NELBO of whole is an upper bound on its -log p")
    told = json.loads(arm.run("compare", "arm", "whole", "--json").stdout)
    assert [run["corpora"]["corpus"]["is_exact"] for run in told["runs"]] == [True, False]


def test_validation_is_the_likelihood_that_plain_transformers_computes(arm: Workplace) -> None:
    """Text by text, each after the start token; the error is that of the documents."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(arm.folder / "arm_hf").eval()
    mixture = [{"path": str(arm.folder / "corpus")}]
    settings = {**CONFIG, **AUTOREGRESSIVE, "data": {**CONFIG["data"], "mixture": mixture}}
    data = PretrainData(build_config(settings))
    design = Validator(data, ParallelRank(0, 1, 0, 1)).design(0)
    losses = []
    lengths = []
    for draw in range(0, len(design.plan.samples), 4):
        row = data.row(VALIDATION, design.plan, draw)
        for first, last in pairwise(row.bounds.tolist()):
            ids = torch.tensor([model.config.bos_token_id, *row.tokens[first:last]])
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0]
            losses.append(float(F.cross_entropy(logits, ids[1:], reduction="sum")))
            lengths.append(last - first)
    mean = sum(losses) / sum(lengths)
    reported = [line for line in arm.lines("arm") if "nelbo_per_token" in line][-1]
    assert reported["nelbo_per_token"] == pytest.approx(mean, rel=1e-5)

    # The jackknife: the mean without one document, for each document.
    of_documents = np.bincount(design.owner, losses), np.bincount(design.owner, lengths)
    count = len(of_documents[0])
    assert 1 < count < len(losses), "a document lies in several texts"
    without = [(of.sum() - of) for of in of_documents]
    errors = without[0] / without[1] - mean
    error = math.sqrt((count - 1) / count * (errors**2).sum())
    assert reported["nelbo_per_token_se"] == pytest.approx(error, rel=1e-4)
    assert "t_deciles" not in reported["corpora"]["corpus"]


def test_a_resumed_run_repeats_the_uninterrupted_one(arm: Workplace) -> None:
    config = arm.config("arm_cut.yaml", run={"dir": "arm_cut", "threads": 2}, **AUTOREGRESSIVE)
    arm.run("pretrain", config, "train.steps=5")
    arm.run("pretrain", config)
    expected = arm.lines("arm")
    lines = [
        line
        for line in arm.lines("arm_cut")
        if not ("nelbo_per_token" in line and line["step"] == 5)
    ]
    assert lines == expected


def test_the_objective_cannot_change_on_resume(arm: Workplace) -> None:
    config = arm.config("arm_other.yaml", run={"dir": "arm", "threads": 2}, train={"steps": 16})
    refused = arm.run("pretrain", config, code=2).stderr
    assert "objective" in refused


def test_plain_transformers_loads_the_export_without_the_folders_code(arm: Workplace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = arm.folder / "arm_hf"
    assert not list(folder.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = [config["bos_token_id"], *tokenizer("import ")["input_ids"]]
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=[tokenizer.mask_token_id],
        )
    expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    sampled = arm.run("sample", "arm_hf", "import ", "--length", "8").stdout
    assert sampled.rstrip("\n") == expected.rstrip("\n")


def test_each_new_token_is_read_once(arm: Workplace) -> None:
    """The keys and values of what was read are kept."""
    writer = load_writer(str(arm.folder / "arm_hf"))
    assert isinstance(writer, CausalModel)
    read: list[int] = []
    writer._model.model.embed_tokens.register_forward_pre_hook(
        lambda _, arguments: read.append(arguments[0].shape[1])
    )
    writer.end_ids = frozenset({writer.tokenizer.mask_id})  # which is never written
    written = writer.write([5, 6, 7], SamplingOptions(length=6))
    # The start token and the prompt at once, then one token after the other.
    assert len(written) == 6 and read == [4, 1, 1, 1, 1, 1]


def test_only_tokens_of_texts_are_written_and_an_end_ends(arm: Workplace) -> None:
    """A head that likes [MASK] best, then a row without a token, then token 9; and then each end of
    a text.
    """
    checkpoint = resolve_checkpoint(arm.folder / "arm")
    tokenizer = load_tokenizer(checkpoint)
    trained = trained_config(read_state(checkpoint))
    # The vocabulary of a model may be padded.
    model = trained.model.model_copy(update={"vocab_size": tokenizer.vocab_size + 2})
    tensors = {name: torch.zeros(shape) for name, shape in canonical_shapes(model).items()}
    # Every state is (1, 0, 0, ...), times a number: the first column of the head decides.
    tensors[EMBEDDING][:, 0] = 1.0
    tensors[FINAL_NORM][0] = 1.0
    liked = {tokenizer.mask_id: 3.0, tokenizer.vocab_size + 1: 2.0, 9: 1.0}
    for id_, logit in liked.items():
        tensors[HEAD][id_, 0] = logit
    device = torch.device("cpu")
    trained = replace(trained, model=model)
    writer = CausalModel(trained, tokenizer, InMemory(tensors), device)
    assert writer.write([5, 6, 7], SamplingOptions(length=6)) == [9] * 6
    assert tokenizer.eos_id in writer.end_ids and len(writer.end_ids) > 1
    for end in sorted(writer.end_ids):
        tensors[HEAD][end, 0] = 4.0
        writer = CausalModel(trained, tokenizer, InMemory(tensors), device)
        assert writer.write([5, 6, 7], SamplingOptions(length=6)) == [end]
        tensors[HEAD][end, 0] = 0.0


def test_a_checkpoint_and_its_export_write_the_same(arm: Workplace) -> None:
    words = ("import ", "--length", "12", "--temperature", "1", "--seed", "3")
    texts = [arm.run("sample", model, *words).stdout for model in ("arm", "arm_hf")]
    assert texts[0] == texts[1] and texts[0].strip()
    other = arm.run("sample", "arm", *words[:-1], "4").stdout
    assert other != texts[0]


def test_an_export_that_is_imported_still_writes_from_left_to_right(arm: Workplace) -> None:
    arm.run("convert", "from-hf", "arm_hf", "arm_back")
    words = ("import ", "--length", "8")
    assert arm.run("sample", "arm_back", *words).stdout == arm.run("sample", "arm", *words).stdout
    arm.run("convert", "to-hf", "arm_back", "arm_again")
    config = json.loads((arm.folder / "arm_again" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("convert", "to-hf", "arm", "other", "--layout", "llada"),
            "--layout: 'llada' is not for a model of the objective 'autoregressive'; use llama",
        ),
        (
            ("convert", "to-hf", "whole", "other", "--layout", "llama"),
            "--layout: 'llama' is not for a model of the objective 'masked'; use llada",
        ),
        (
            ("convert", "to-hf", "whole", "other", "--layout", "lama"),
            "--layout: 'lama' is not one of llada, llama (did you mean 'llama'?)",
        ),
        (("infill", "arm", "import [MASK]"), "'arm' writes from left to right"),
        (("sample", "arm", "a", "--steps", "3"), "--steps: 3 is for diffusion models"),
        (
            ("sample", "arm", "a", "--temperature", "1e-40"),
            "--temperature: 1e-40 is too small to divide logits by; 0 takes the most likely token",
        ),
        (("sample", "arm", "a", "--cfg", "1"), "--cfg: 1.0 is for diffusion models"),
        (("sample", "arm", "a", "--show"), "--show: this model writes from left to right"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    command: tuple[str, ...], message: str, arm: Workplace
) -> None:
    error = arm.run(*command, code=2).stderr
    assert message in error and error.count("\n") == 1

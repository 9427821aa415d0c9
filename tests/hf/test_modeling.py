"""The exported model: its numbers against the oracle, its files on their own."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada.hf import configuration_llada, generation_llada, modeling_llada
from llada.hf.modeling_llada import LLaDAModelLM
from llada.model.weights import canonical_shapes
from tests import processes
from tests.hf.models import (
    SHAPES,
    assert_near,
    gradients,
    hf_config,
    made,
    noisy_batch,
    section,
    tokens,
)
from tests.model.oracle import Oracle


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_the_oracle(shape: str) -> None:
    hf = made(**SHAPES[shape])
    oracle = Oracle(section(**SHAPES[shape]), hf.state_dict())
    inputs = tokens()
    expected = oracle(inputs, torch.zeros_like(inputs))
    assert_near(hf(inputs).logits, expected)
    direction = torch.randn(expected.shape)
    (expected * direction).sum().backward()
    actual = gradients(hf, inputs, direction)
    assert actual.keys() == oracle.w.keys()
    for name, parameter in oracle.w.items():
        assert (actual[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_the_published_ones(shape: str) -> None:
    state = made(**SHAPES[shape]).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == canonical_shapes(
        section(**SHAPES[shape])
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_padding_changes_nothing_for_the_tokens(side: str, kind: torch.dtype) -> None:
    hf, real = made(num_query_groups=2), 9
    inputs = tokens()
    real_tokens = slice(12 - real, 12) if side == "left" else slice(0, real)
    mask = torch.zeros(2, 12, dtype=kind)
    mask[0, real_tokens] = 1
    mask[1] = 1
    logits = hf(inputs, attention_mask=mask).logits
    assert_near(logits[0, real_tokens], hf(inputs[:1, real_tokens]).logits[0])
    assert_near(logits[1], hf(inputs[1:]).logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["2-D", "boolean", "-inf", "smallest"])
def test_a_row_of_padding_is_finite_and_disturbs_no_other(dtype: torch.dtype, kind: str) -> None:
    hf = made().to(dtype)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0] = False
    if kind != "2-D":
        mask = mask[:, None, None, :].expand(2, 1, 12, 12)
    if kind in ("-inf", "smallest"):
        never = -math.inf if kind == "-inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, never)
    logits = hf(tokens(), attention_mask=mask).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert_near(
        logits[1].float(),
        hf(tokens()[1:]).logits[0].float(),
        1e-5 if dtype == torch.float32 else 2e-2,
    )
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in hf.parameters())


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_pairs_is_the_oracles_segments(additive: bool) -> None:
    hf = made(num_query_groups=2)
    segment = torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]])
    mask = segment[:, None, :, None] == segment[:, None, None, :]
    expected = Oracle(section(num_query_groups=2), hf.state_dict())(tokens(), segment)
    # The oracle counts positions over the row; rotary embedding only sees differences.
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    assert_near(hf(tokens(), attention_mask=given).logits, expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 11), r"\(2, 11\) is neither \(2, 12\) nor \(2, 1, 12, 12\)"),
        (torch.ones(12), r"\(12,\)"),
        (torch.ones(2, 12, 12, dtype=torch.bool), r"\(2, 12, 12\)"),
        (torch.ones(2, 4, 12, 12, dtype=torch.bool), r"\(2, 4, 12, 12\)"),
        (torch.ones(2, 1, 12, 12, dtype=torch.long), "boolean or floating, not torch.int64"),
        (torch.full((2, 12), -math.inf), "negative"),
    ],
)
def test_other_masks_are_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()(tokens(), attention_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_every_token_reaches_every_position(masked: bool) -> None:
    """A causal model would leave the earlier positions as they were."""
    hf, inputs = made(), tokens(1)
    mask = torch.ones_like(inputs) if masked else None
    before = hf(inputs, attention_mask=mask).logits
    for position in (0, 11):
        changed = inputs.clone()
        changed[0, position] = (changed[0, position] + 1) % 128
        assert ((hf(changed, attention_mask=mask).logits - before).abs().amax(-1) > 1e-4).all()


def test_what_forward_takes_and_gives() -> None:
    hf, inputs = made(), tokens()
    whole = hf(
        inputs, output_hidden_states=True, use_cache=True, output_attentions=False, labels=None
    )
    assert whole.logits.shape == (2, 12, 128)
    assert whole.past_key_values is None
    assert [tuple(state.shape) for state in whole.hidden_states] == [(2, 12, 64)] * 3
    embedded = hf.get_input_embeddings()(inputs)
    assert torch.equal(whole.hidden_states[0], embedded)
    assert torch.equal(whole.hidden_states[-1] @ hf.get_output_embeddings().weight.T, whole.logits)
    (from_embeddings,) = hf(inputs_embeds=embedded, return_dict=False)
    assert torch.equal(from_embeddings, whole.logits)
    for arguments in ({}, {"input_ids": inputs, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one"):
            hf(**arguments)
    for name in ("attention_bias", "past_key_values", "cache_position", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name} not supported"):
            hf(inputs, **{name: inputs if name != "output_attentions" else True})
    with pytest.raises(TypeError, match="num_items_in_batch"):
        hf(inputs, num_items_in_batch=3)


def test_positions_may_be_given() -> None:
    """Only differences matter: a shift changes nothing, and a gap is that of a longer text whose
    middle nobody sees.
    """
    hf, inputs = made(num_query_groups=2), tokens()
    assert_near(hf(inputs, position_ids=torch.arange(7, 19)[None]).logits, hf(inputs).logits)
    seen = torch.tensor([0, 1, 2, 7, 8, 9, 10, 11])
    mask = torch.zeros(2, 12, dtype=torch.long)
    mask[:, seen] = 1
    assert_near(
        hf(inputs[:, seen], position_ids=seen.expand(2, -1)).logits,
        hf(inputs, attention_mask=mask).logits[:, seen],
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "2-D", "boolean", "additive", "-inf"])
def test_plain_softmax_attention_agrees(shape: str, kind: str) -> None:
    hf, plain = made(**SHAPES[shape]), made(**SHAPES[shape])
    plain.config._attn_implementation = "eager"
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = mask[1, 5:] = False
    if kind != "2-D":
        mask = mask[:, None, None, :].expand(2, 1, 12, 12)
    if kind in ("additive", "-inf"):
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf if kind == "-inf" else -1.5)
    given = None if kind == "none" else mask
    assert_near(
        plain(tokens(), attention_mask=given).logits, hf(tokens(), attention_mask=given).logits
    )


def test_an_attention_that_is_not_there_is_refused() -> None:
    hf = made()
    hf.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' is not one of sdpa, eager"):
        hf(tokens())


def test_both_generations_of_transformers_are_told_what_there_is() -> None:
    """The flags of 4.46 and of 5; a Trainer asks for the last."""
    flags = ("_supports_sdpa", "_supports_flash_attn_2", "_supports_flash_attn")
    assert all(getattr(LLaDAModelLM, name) for name in flags)
    assert LLaDAModelLM.accepts_loss_kwargs is False
    assert LLaDAModelLM.can_generate()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_called_as_a_module(tied: bool) -> None:
    """Offload hooks and adapters act on calls of modules; a look at the weight passes them by."""
    hf, inputs = made(tie_embeddings=tied), tokens()
    expected = hf(inputs).logits
    hf.get_output_embeddings().register_forward_hook(
        lambda module, given, out: 2 * out if out.shape[-1] == 128 else out
    )
    assert torch.equal(hf(inputs).logits, 2 * expected)


@pytest.mark.parametrize("prompt", [0, 5])
def test_the_loss_is_the_papers(prompt: int) -> None:
    """Token by token, from logits of the oracle."""
    hf = made()
    noisy, labels, chance = noisy_batch(prompt)
    logits = Oracle(section(), hf.state_dict())(noisy, torch.zeros_like(noisy)).detach()
    rows = []
    for row in range(3):
        terms = [
            -float(logits[row, i].log_softmax(-1)[labels[row, i]]) / float(chance[row, i])
            for i in range(prompt, 12)
            if noisy[row, i] == 126
        ]
        rows.append(sum(terms) / (12 - prompt))
    for p_mask in (chance, chance[:, :1], chance[:, 0]):
        loss = hf(noisy, labels=labels, p_mask=p_mask).loss
        assert loss.dtype == torch.float32
        assert abs(loss.item() - sum(rows) / 3) <= 1e-5 * sum(rows) / 3
    assert torch.equal(hf(noisy, labels=labels, p_mask=chance, return_dict=False)[0], loss)


def test_a_row_without_labels_or_masks_counts_as_nothing() -> None:
    hf = made()
    noisy, labels, chance = noisy_batch()
    alone = hf(noisy[1:], labels=labels[1:], p_mask=chance[1:]).loss
    chance = chance.clone()
    chance[0] = 0.0
    labels[0] = -100
    without_labels = hf(noisy, labels=labels, p_mask=chance).loss
    without_labels.backward()
    assert abs(float(without_labels) - float(alone) * 2 / 3) <= 1e-6 * float(alone)
    assert all(p.grad.isfinite().all() for p in hf.parameters())
    clean = tokens() % 126
    assert float(hf(clean, labels=clean, p_mask=torch.zeros(2)).loss) == 0.0


def test_the_loss_of_bf16_weights_is_fp32_and_close() -> None:
    hf = made()
    noisy, labels, chance = noisy_batch()
    expected = hf(noisy, labels=labels, p_mask=chance).loss
    actual = hf.to(torch.bfloat16)(noisy, labels=labels, p_mask=chance).loss
    assert actual.dtype == torch.float32
    assert abs((actual - expected).item()) <= 0.05 * expected.item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_mask": None}, "labels and p_mask together"),
        ({"labels": None}, "labels and p_mask together"),
        (
            {"p_mask": torch.ones(12)},
            (
                r"p_mask: torch.float32 of shape \(12,\) is not floating of shape \(3, 12\), \(3,"
                r" 1\) or \(3,\)"
            ),
        ),
        ({"p_mask": torch.ones(3, dtype=torch.long)}, "p_mask: torch.int64"),
        (
            {"labels": torch.zeros(3, 11, dtype=torch.long)},
            r"labels: shape \(3, 11\) is not \(3, 12\)",
        ),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 12, 64)}, "labels need input_ids"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_refused(change: dict[str, Any], message: str) -> None:
    noisy, labels, chance = noisy_batch()
    with pytest.raises(ValueError, match=message):
        made()(**{"input_ids": noisy, "labels": labels, "p_mask": chance, **change})


COMPILED = """
import torch
from tests.hf.models import made, noisy_batch, tokens

graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

inputs, ones = tokens(), torch.ones(2, 12, dtype=torch.bool)
ones[0, :3] = False
pairs = ones[:, None, None, :].expand(2, 1, 12, 12)
bias = torch.zeros(pairs.shape).masked_fill(~pairs, float("-inf"))
noisy, labels, chance = noisy_batch(3)
every_mask = [None, ones, ones.long(), ones.float(), pairs, bias]
for masks, tied in (([None, ones], True), (every_mask, False)):
    hf = made(num_layers=1, num_query_groups=2, tie_embeddings=tied)
    captured = torch.compile(hf, fullgraph=True, backend="eager")
    for mask in masks:
        with torch.no_grad():
            logits = captured(inputs, attention_mask=mask).logits
            torch.testing.assert_close(logits, hf(inputs, attention_mask=mask).logits)
    compiled = torch.compile(hf, fullgraph=True, backend="aot_eager")  # with its backward graph
    loss = compiled(noisy, labels=labels, p_mask=chance).loss
    loss.backward()
    torch.testing.assert_close(loss, hf(noisy, labels=labels, p_mask=chance).loss)
    assert all(p.grad.isfinite().all() for p in hf.parameters())
    torch.compiler.reset()
dynamic = torch.compile(hf, fullgraph=True, backend=backend, dynamic=True)
with torch.no_grad():
    for length in (5, 9, 31):
        ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
        mask[1, 2:] = 0
        logits = dynamic(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, hf(ids, attention_mask=mask).logits)
assert len(graphs) == 1, f"{len(graphs)} graphs for three lengths"
print("compiled")
"""


def test_it_compiles_as_one_graph_for_any_length() -> None:
    """In a fresh process: dynamo is switched off where an engine was imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    environment = {**kept, "PYTHONPATH": str(processes.ROOT)}
    process = processes.start("-c", COMPILED, cwd=processes.ROOT, env=environment, fresh=True)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    assert out == "compiled\n"


def test_checkpointed_gradients_are_the_same() -> None:
    hf, inputs = made(num_query_groups=2).train(), tokens()
    direction = torch.randn(2, 12, 128)
    expected = gradients(hf, inputs, direction)
    calls = []
    for block in hf.model.transformer["blocks"]:
        block.register_forward_pre_hook(lambda module, arguments: calls.append(module))
    hf.gradient_checkpointing_enable()
    actual = gradients(hf, inputs, direction)
    assert len(calls) == 2 * 2, "every block runs once forward and once more for its gradients"
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_bf16_is_finite_and_close() -> None:
    hf = made(num_query_groups=2)
    expected = hf(tokens()).logits
    actual = hf.to(torch.bfloat16)(tokens()).logits
    assert actual.dtype == torch.bfloat16
    assert actual.isfinite().all()
    assert_near(actual.float(), expected, 0.05)


def test_new_weights_are_mitchells() -> None:
    """Bounded by 3 sigma, with the truncated normal's standard deviation of 0.9866 sigma."""
    torch.manual_seed(0)
    hf = LLaDAModelLM(hf_config(section()))
    sigma = {
        "attn_out": [(2 * 64 * (i + 1)) ** -0.5 for i in range(2)],
        "ff_out": [(2 * 96 * (i + 1)) ** -0.5 for i in range(2)],
    }
    for name, parameter in hf.named_parameters():
        parts = name.split(".")
        std = (
            sigma[parts[4]][int(parts[3])] if parts[2] == "blocks" and parts[4] in sigma else 1 / 8
        )
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 3 * std * 1.000001, name
            assert abs(float(parameter.std()) / std - 0.9866) < 0.04, name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_model_comes_back_bit_for_bit(shape: str, tmp_path: Path) -> None:
    hf = made(**SHAPES[shape])
    hf.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in stored.items()} == canonical_shapes(
        section(**SHAPES[shape])
    )
    back, report = LLaDAModelLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    state = back.state_dict()
    assert state.keys() == hf.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in hf.state_dict().items())
    assert torch.equal(back(tokens()).logits, hf(tokens()).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, r"missing: .*blocks\.2\.attn_norm\.weight, .*blocks\.2\.v_proj\.weight$"),
        (1, r"unexpected: .*blocks\.1\.attn_norm\.weight, "),
    ],
)
def test_weights_of_another_config_are_an_error(
    layers: int, message: str, tied: bool, tmp_path: Path
) -> None:
    """transformers fills what is missing with random numbers, drops what is too much, and only
    warns.
    """
    made(tie_embeddings=tied).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layers": layers}))
    with pytest.raises(
        ValueError, match=rf"the weights in '.*' are not those of its config.json: {message}"
    ) as caught:
        LLaDAModelLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [False, True])
def test_states_of_the_blocks_are_kept_only_where_they_are_wanted(asked: bool) -> None:
    """At 8B and 4,096 tokens they are 1 GB."""
    hf = made(num_layers=4)
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def look(module: torch.nn.Module, arguments: Any) -> None:
        alive.append(weakref.ref(arguments[0]))
        counts.append(sum(reference() is not None for reference in alive[1:]))

    for block in hf.model.transformer["blocks"]:
        block.register_forward_pre_hook(look)
    with torch.no_grad():
        hf(tokens(), output_hidden_states=asked)
    # The first input is the embedding, which the caller may hold; of the others only that of this
    # block.
    assert counts == ([0, 1, 2, 3] if asked else [0, 1, 1, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_can_be_saved(tied: bool, tmp_path: Path) -> None:
    hf = made(tie_embeddings=tied)
    hf.config.tokenizer_vocab_size = 127
    before = hf(tokens()).logits
    hf.resize_token_embeddings(136, mean_resizing=False)
    hf.save_pretrained(tmp_path)
    back = LLaDAModelLM.from_pretrained(tmp_path)
    logits = back(tokens()).logits
    assert logits.shape[-1] == 136
    assert (hf.config.tokenizer_vocab_size, back.config.tokenizer_vocab_size) == (
        None,
        None,
    ), "the new rows are tokens"
    assert_near(logits[..., :128], before)


STRANGER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llada", "megatron"):
            raise ImportError("out of bounds: " + name)

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    inputs = torch.load(out + "/inputs.pt", weights_only=True)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "llada"
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        same = AutoModel.from_pretrained(folder, trust_remote_code=True)(inputs).logits
        save_file({"logits": model(inputs).logits, "same": same}, out + "/logits.safetensors")
    model.save_pretrained(out + "/again")
assert not {"llada", "megatron"} & sys.modules.keys()
"""


def test_a_folder_loads_where_this_package_is_absent(tmp_path: Path) -> None:
    models = {shape: made(**SHAPES[shape]) for shape in ("gqa", "tied")}
    folders = {shape: (tmp_path / shape / "export", tmp_path / shape / "out") for shape in models}
    for shape, hf in models.items():
        folder, out = folders[shape]
        folder.mkdir(parents=True)
        out.mkdir()
        hf.config.save_pretrained(folder)
        for module in (configuration_llada, generation_llada, modeling_llada):
            shutil.copy(str(module.__file__), folder)
        save_file(hf.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(tokens(), out / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            STRANGER,
            *(str(path) for pair in folders.values() for path in pair),
        ],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for shape, hf in models.items():
        _, out = folders[shape]
        actual = load_file(out / "logits.safetensors")
        assert_near(actual["logits"], hf(tokens()).logits)
        assert torch.equal(actual["same"], actual["logits"])
        again = {path.name for path in (out / "again").iterdir()}
        assert {
            "config.json",
            "model.safetensors",
            "configuration_llada.py",
            "generation_llada.py",
            "modeling_llada.py",
        } <= again

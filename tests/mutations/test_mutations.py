"""Proof that the suite would notice: known mistakes of diffusion trainers and traps of the libraries, planted one at a time into a
copy of the code. The named tests must fail on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LAYOUTS = "tests/distributed/test_layouts.py::test_five_steps_equal_the_oracle"


class Mutation(NamedTuple):
    """`file`: where; `old`, `new`: what is replaced, once; `tests`: what must notice."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS = {
    "the same noise on every replica": Mutation(
        "llada/objectives/masked.py",
        "mask_uniforms(self.seed, window.sample,",
        "mask_uniforms(self.seed, 0,",
        "tests/data/test_pretrain.py",
    ),
    "tensor ranks that read different tokens": Mutation(
        "llada/engine/megatron.py",
        "replica(batch.inputs, attention",
        "replica(batch.inputs.roll(parallel_state.get_tensor_model_parallel_rank(), 1), attention",
        f"{LAYOUTS}[TP2 x DP4]",
    ),
    "noise that starts over after a resume": Mutation(
        "llada/data/pretrain.py", "timesteps(config.seed, step, shares", "timesteps(config.seed, 0, shares", "tests/data/test_pretrain.py"
    ),
    "a loss scaled by accumulation": Mutation(
        "llada/engine/megatron.py",
        "    return loss, torch.zeros((), dtype=torch.int, device=losses.device), {}",
        "    return loss, {}",
        "tests/engine/test_parity.py",
    ),
    "a normaliser of the local micro-batch": Mutation(
        "llada/data/base.py",
        "[self.objective.corrupt(window) for window in windows], plan.normaliser)",
        "[self.objective.corrupt(window) for window in windows], plan.normaliser * len(windows) / len(plan.samples))",
        "tests/data/test_pretrain.py",
    ),
    "a mean of ratios": Mutation(
        "llada/training/estimates.py",
        "ratio = loss.sum() / total",
        "ratio = (loss / length).mean()",
        "tests/training/test_estimates.py::test_intervals_cover_the_truth",
    ),
    "held-out texts that share their noise": Mutation(
        "llada/training/validation.py",
        '"offset"), texts))',
        '"offset"), 0 * texts))',
        "tests/data/test_sft_data.py::test_validation_reads_every_reply_of_a_conversation_and_counts_the_conversation",
    ),
    "an error without its degrees of freedom": Mutation(
        "llada/training/estimates.py",
        "* t_quantile(level, self.degrees)",
        "* t_quantile(level, 1e9)",
        "tests/training/test_comparison.py::test_said_in_words_and_in_json",
    ),
    "t tied to the place in the batch": Mutation(
        "llada/noise.py",
        'order = np.argsort(bits.random_raw(len(shares)), kind="stable")',
        "order = np.arange(len(shares))",
        "tests/test_noise.py",
    ),
    "division by the number of masked tokens": Mutation(
        "llada/engine/megatron.py",
        "(losses * weights_).sum() / normaliser",
        "(losses * weights_).sum() / max(1, len(losses))",
        "tests/engine/test_parity.py",
    ),
    "no weight 1/p": Mutation("llada/objectives/masked.py", "len(draws)), 1 / p", "len(draws)), np.ones_like(p)", "tests/objectives"),
    "windows that are read again after a change of weights": Mutation(
        "llada/data/mixture.py",
        "block + length, consumed + length * quotas",
        "block + length, consumed + quotas",
        "tests/data/test_mixture.py",
    ),
    "a sequence of windows that skips what a stage has read": Mutation(
        "llada/data/mixture.py",
        "stage.consumed[chosen] + (block - stage.first_block)",
        "stage.consumed[chosen] + block",
        "tests/data/test_mixture.py",
    ),
    "causal attention": Mutation(
        "llada/model/attention.py",
        "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
        "tests/engine/test_model.py",
    ),
    "an exported model that ignores attention_mask": Mutation(
        "llada/hf/modeling_llada.py", "mask = None if attention_mask is None else", "mask = None if True else", "tests/hf/test_modeling.py"
    ),
    "one t for all documents": Mutation(
        "llada/data/pretrain.py", "draw_t(lengths), float", "np.full(len(spans), draw_t(lengths)[0]), float", "tests/data/test_pretrain.py"
    ),
    "documents that see each other": Mutation(
        "llada/model/attention.py", "if inputs.layout.whole():", "if len(q) == len(k):", "tests/engine/test_model.py"
    ),
    "context ranks that attend to their own part": Mutation(
        "llada/model/transformer.py", "if self.context_group.size() > 1:", "if self.context_group.size() > 99:", f"{LAYOUTS}[CP2 x DP4]"
    ),
    "a head that does not wait for its updated weights": Mutation(
        "llada/model/transformer.py",
        "return self.output_layer(hidden)",
        "return self._head(hidden)",
        f"{LAYOUTS}[DP8, small buckets]",
    ),
    "the head's gradient under sequence parallelism": Mutation(
        "llada/model/transformer.py", "tensor_parallel_output_grad=True", "tensor_parallel_output_grad=False", f"{LAYOUTS}[TP2+SP x DP4]"
    ),
    "batched exchange between two stages with virtual stages": Mutation(
        "llada/engine/megatron.py",
        "overlap_p2p_comm=overlapped,\n        batch_p2p_comm=not overlapped,",
        "overlap_p2p_comm=False,\n        batch_p2p_comm=True,",
        f"{LAYOUTS}[TP2 x CP2 x PP2 x VP2]",
    ),
    "one step count for all parameters after loading": Mutation(
        "llada/engine/optimizer_state.py",
        """    for part in parts:
        for master, moments in part.optimizer.state.items():
            moments["step"] = torch.full((), float(count), dtype=torch.float32, device=master.device)""",
        """    shared = torch.full((), float(count))
    for part in parts:
        for master, moments in part.optimizer.state.items():
            moments["step"] = shared""",
        "tests/engine/test_state.py",
    ),
    "a piece of the moments that no rank writes": Mutation(
        "llada/engine/optimizer_state.py",
        "    if max(body, tail) < stop:",
        "    if max(body, tail) < stop and tail < body:",
        "tests/engine/test_optimizer_state.py",
    ),
    "a norm's gradient counted twice": Mutation(
        "llada/engine/megatron.py",
        "    finalize_model_grads(model, None, **kwargs)",
        "    finalize_model_grads(model, None, **kwargs)\n"
        "    for name, p in model[0].named_parameters():\n"
        '        if name.endswith("layers.0.input_layernorm.weight"):\n'
        "            p.main_grad.mul_(2)",
        "tests/engine/test_parity.py",
    ),
    "a prompt that is masked": Mutation(
        "llada/data/sft.py",
        "spans[own] = np.stack([starts, ends], axis=1)",
        "spans[own] = np.stack([starts - 1, ends], axis=1)",
        "tests/data/test_sft_data.py",
    ),
    "padding left out of the response": Mutation(
        "llada/data/sft.py", "np.repeat(longest, group)[: len(ends)][own]", "ends[own]", "tests/data/test_sft_data.py"
    ),
    "EOS taught after a reply that was cut": Mutation(
        "llada/data/sft.py", "return np.where(cut, ends[own], ", "return np.where(cut & False, ends[own], ", "tests/data/test_sft_data.py"
    ),
    "keys and values of an imported Llama exchanged": Mutation(
        "llada/hf/folder.py",
        """    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",""",
        """    "k_proj": "self_attn.v_proj",
    "v_proj": "self_attn.k_proj",""",
        "tests/hf/test_from_hf.py::test_a_llama_is_the_same_function_under_a_causal_mask",
    ),
    "a mean of rounded weights": Mutation(
        "llada/hf/convert.py",
        "CheckpointWeights(each, model, masters)",
        "CheckpointWeights(each, model)",
        "tests/hf/test_convert.py::test_the_mean_of_checkpoints_is_that_of_their_masters",
    ),
    "imported weights rounded before they become masters": Mutation(
        "llada/engine/megatron.py",
        "whole = torch.empty(parameter.shape, dtype=torch.float32)",
        "whole = torch.empty(parameter.shape, dtype=self.dtype)",
        "tests/distributed/test_export.py::test_folders_and_imports_pass_through_every_layout_bit_for_bit[TP2+SP x CP2 x DP2-bf16]",
    ),
    "a new token's row left as it was": Mutation(
        "llada/hf/sources.py",
        "(self._taken, self._before)",
        "(self._tokens, self._before)",
        "tests/hf/test_from_hf.py::test_new_tokens_take_rows_that_are_there_and_others_keep_theirs",
    ),
    "the exported loss without its weight": Mutation(
        "llada/hf/modeling_llada.py", "counted / torch.where(counted, p_wide.float(), 1.0)", "counted.float()", "tests/hf/test_modeling.py"
    ),
    "a turn's text read as special tokens": Mutation(
        "llada/chat_template.py",
        "for part in self._split(text) if is_own else [text]:",
        "for part in self._split(text):",
        "tests/test_chat_template.py",
    ),
    "a job that comes back after scancel": Mutation(
        "launch/decide.py", 'if now.state == "cancelled":', "if False:", "tests/launcher/test_decide.py"
    ),
    "stops in order that use up the restarts": Mutation(
        "launch/decide.py", 'if not ends or ends[-1].get("failure"):', "if True:", "tests/launcher/test_decide.py"
    ),
    "a signal that is lost while Python imports": Mutation(
        "launch/rank.py",
        "if self._last is not None and time",
        "if sent == 0.0 and self._last is not None and time",
        "tests/launcher/test_pieces.py",
    ),
    "a run folder taken from a living process": Mutation(
        "llada/training/lock.py", "    return (born is None", "    return True or (born is None", "tests/training/test_lock.py"
    ),
}


def chosen() -> list[str]:
    """All of them, or with MUTATIONS=I/N in the environment every N-th from number I (0-based) on."""
    first, _, every = os.environ.get("MUTATIONS", "0/1").partition("/")
    return list(MUTATIONS)[int(first) :: int(every)]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", chosen())
def test_the_suite_notices(mistake: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[mistake]
    for name in ("llada", "data_tools", "launch", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    path = tmp_path / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, f"{mutation.file} no longer holds what is to be replaced"
    path.write_text(source.replace(mutation.old, mutation.new))
    # Plain asserts: that a test fails is all that counts, and where CI is set pytest explains the difference of two long lists
    # without a limit, for hours.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", mutation.tests, "-x", "-q", "-p", "no:cacheprovider", "--assert=plain"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1, f"{mutation.tests} did not fail\n{done.stdout[-2000:]}\n{done.stderr[-500:]}"
    assert "FAILED" in done.stdout
    assert not any(error in done.stdout for error in ("ImportError", "SyntaxError", "NameError")), done.stdout[-2000:]

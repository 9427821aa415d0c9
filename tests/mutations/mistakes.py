"""Known mistakes of diffusion trainers, and traps of the libraries, as changes of the code.

A mistake that fits on the border of a function replaces that function; its name in the module is
all that a renaming has to keep. One in the middle of a function replaces text of the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.mutations.planting import Change, Mistake

MISTAKES: dict[str, Mistake] = {}
LAYOUTS = "tests/distributed/test_layouts.py::test_training_equals_the_oracle"
PRETRAIN = "tests/data/test_pretrain.py"
SFT = "tests/data/test_sft_data.py"


def changes(module: str, tests: str) -> Callable[[Change], Change]:
    """Register a function that changes `module` after its import. What it does wrong is
    its name.
    """

    def register(change: Change) -> Change:
        MISTAKES[change.__name__.replace("_", " ")] = Mistake(module, tests, change=change)
        return change

    return register


def rewrites(name: str, module: str, old: str, new: str, tests: str) -> None:
    """Register a replacement in the source of `module`."""
    MISTAKES[name] = Mistake(module, tests, rewrite=(old, new))


# -- noise -----------------------------------------------------------------------------------------


@changes("llada.objectives.row", PRETRAIN)
def the_same_noise_for_every_sample(row: Any) -> None:
    right = row.mask_uniforms
    row.mask_uniforms = lambda seed, sample, *others: right(seed, 0, *others)


@changes("llada.objectives.masked", PRETRAIN)
def noise_that_starts_over_after_a_resume(masked: Any) -> None:
    right = masked.timesteps
    masked.timesteps = lambda seed, step, *others: right(seed, 0, *others)


@changes("llada.data.pretrain", PRETRAIN)
def one_t_for_all_documents(pretrain: Any) -> None:
    right = pretrain._assemble

    def assemble(*arguments: Any) -> Any:
        *others, t = arguments
        return right(*others, 0 * t + t[0])

    pretrain._assemble = assemble


rewrites(
    "t tied to the place in the batch",
    "llada.noise",
    'order = np.argsort(bits.random_raw(len(shares)), kind="stable")',
    "order = np.arange(len(shares))",
    "tests/test_noise.py",
)
rewrites(
    "held-out texts that share their noise",
    "llada.evaluation.validation",
    '"offset"), texts))',
    '"offset"), 0 * texts))',
    f"{SFT}::test_validation_reads_every_reply_of_a_conversation_and_counts_the_conversation",
)


# -- the loss --------------------------------------------------------------------------------------


@changes("llada.objectives.schedules", "tests/objectives/test_schedules.py")
def a_weight_of_another_schedule(schedules: Any) -> None:
    right = schedules.cosine
    schedules.cosine = lambda t: replace(right(t), weight=1 / t)


@changes("llada.objectives.discrete_steps", "tests/objectives/test_schedules.py")
def a_first_step_that_masks_nothing(discrete_steps: Any) -> None:
    right = discrete_steps.StepSchedule.__call__

    def rates(self: Any, t: Any) -> Any:
        return right(self, t - 1 / self.steps)

    discrete_steps.StepSchedule.__call__ = rates


@changes("llada.objectives.autoregressive", "tests/objectives/test_autoregressive.py")
def a_term_read_one_position_too_late(autoregressive: Any) -> None:
    """It has read the token that it predicts."""
    right = autoregressive.Autoregressive.corrupt

    def corrupt(self: Any, *arguments: Any) -> Any:
        corrupted = right(self, *arguments)
        terms = corrupted.terms["tokens"]
        last = len(corrupted.inputs) - 1
        late = replace(terms, positions=(terms.positions + 1).clip(max=last))
        return replace(corrupted, terms={"tokens": late})

    autoregressive.Autoregressive.corrupt = corrupt


@changes("llada.objectives.autoregressive", "tests/objectives/test_autoregressive.py")
def a_dropped_group(autoregressive: Any) -> None:
    right = autoregressive.Autoregressive.corrupt

    def corrupt(self: Any, row: Any, key: Any) -> Any:
        return right(self, replace(row, groups=row.groups[:1]), key)

    autoregressive.Autoregressive.corrupt = corrupt


@changes("llada.objectives.autoregressive", "tests/objectives/test_autoregressive.py")
def a_layout_that_sees_its_future(autoregressive: Any) -> None:
    right = autoregressive.Layout
    autoregressive.Layout = lambda bounds, length, rule: right(bounds, length)


@changes("llada.objectives.losses", "tests/model/test_head_loss.py")
def a_mask_token_that_stays_in_the_softmax(losses: Any) -> None:
    losses.CrossEntropyWithout.__call__ = lambda self, *arguments: losses.cross_entropy(*arguments)


@changes("llada.objectives.masked", "tests/objectives")
def no_weight_1_over_p(masked: Any) -> None:
    right = masked.MaskedDiffusion._bernoulli

    def bernoulli(self: Any, *arguments: Any) -> Any:
        chosen, weights = right(self, *arguments)
        return chosen, 0 * weights + 1

    masked.MaskedDiffusion._bernoulli = bernoulli


@changes("llada.engine.megatron", "tests/engine/test_parity.py")
def division_by_the_number_of_masked_tokens(megatron: Any) -> None:
    right = megatron.rank_batch

    def rank_batch(*arguments: Any) -> Any:
        part = right(*arguments)
        if part.normalizer is None:
            return part
        return replace(part, normalizer=float(max(1, len(part.terms["tokens"]))))

    megatron.rank_batch = rank_batch


@changes("llada.engine.megatron", "tests/engine/test_parity.py")
def a_loss_scaled_by_accumulation(megatron: Any) -> None:
    """Where the loss function returns two values instead of three, Megatron-Core's schedules divide
    by the micro-batches.
    """
    right = megatron._training_loss

    def training_loss(*arguments: Any) -> Any:
        loss, _, figures = right(*arguments)
        return loss, figures

    megatron._training_loss = training_loss


rewrites(
    "a normalizer of the local micro-batch",
    "llada.data.training_data",
    "collate(corrupted, self.normalizer(plan))",
    "collate(corrupted, self.normalizer(plan) * len(rows) / len(plan.samples))",
    PRETRAIN,
)
rewrites(
    "the exported loss without its weight",
    "llada.hf.modeling_llada",
    "counted / torch.where(counted, p_wide.float(), 1.0)",
    "counted.float()",
    "tests/hf/test_modeling.py",
)


# -- validation ------------------------------------------------------------------------------------

rewrites(
    "a mean of ratios",
    "llada.evaluation.estimates",
    "ratio = loss.sum() / total",
    "ratio = (loss / length).mean()",
    "tests/evaluation/test_estimates.py::test_intervals_cover_the_truth",
)


@changes(
    "llada.evaluation.estimates",
    "tests/evaluation/test_comparison.py::test_the_result_as_text_and_as_json",
)
def an_error_without_its_degrees_of_freedom(estimates: Any) -> None:
    right = estimates.Estimate.half_width
    estimates.Estimate.half_width = lambda self, *level: right(replace(self, degrees=10**9), *level)


# -- data ------------------------------------------------------------------------------------------

rewrites(
    "windows that are read again after a change of weights",
    "llada.data.mixture",
    "consumed = consumed + length * quotas",
    "consumed = consumed + quotas",
    "tests/data/test_mixture.py",
)
rewrites(
    "a sequence of windows that skips what a stage has read",
    "llada.data.mixture",
    "stage.consumed[chosen] + (block - stage.first_block)",
    "stage.consumed[chosen] + block",
    "tests/data/test_mixture.py",
)


@changes("llada.data.sft", SFT)
def a_prompt_that_is_masked(sft: Any) -> None:
    right = sft.SFTData._responses
    sft.SFTData._responses = lambda self, *rows: right(self, *rows) - [1, 0]


rewrites(
    "padding left out of the response",
    "llada.data.sft",
    "padded = np.repeat(longest, group)[: len(ends)]",
    "padded = ends",
    SFT,
)


@changes("llada.data.sft", SFT)
def an_eos_taught_after_a_reply_that_was_cut(sft: Any) -> None:
    sft.ReplyReader.is_cut = lambda self, reply: False


rewrites(
    "a turn's text read as special tokens",
    "llada.chat.template",
    "parts = self._split_at_specials(text) if by_template else [text]",
    "parts = self._split_at_specials(text)",
    "tests/chat/test_chat_template.py",
)


# -- attention and the model -----------------------------------------------------------------------


@changes("llada.model.attention", "tests/engine/test_model.py")
def causal_attention(attention: Any) -> None:
    from tests.stand_ins import like

    right = attention.F.scaled_dot_product_attention
    attention.F = like(
        attention.F, scaled_dot_product_attention=lambda *inputs: right(*inputs, is_causal=True)
    )


@changes("llada.model.attention", "tests/engine/test_model.py")
def documents_that_see_each_other(attention: Any) -> None:
    attention.segmented_sdpa = lambda q, k, v, inputs: attention._sdpa(q, k, v)


@changes("llada.hf.modeling_llada", "tests/hf/test_modeling.py")
def an_exported_model_that_ignores_attention_mask(modeling: Any) -> None:
    right = modeling.LLaDAModel.forward

    def forward(self: Any, x: Any, attention_mask: Any, *others: Any, **named: Any) -> Any:
        return right(self, x, None, *others, **named)

    modeling.LLaDAModel.forward = forward


rewrites(
    "context ranks that attend to their own part",
    "llada.model.transformer",
    "if self.context_group.size() > 1:",
    "if self.context_group.size() > 99:",
    f"{LAYOUTS}[CP2 x DP4]",
)
rewrites(
    "a head that does not wait for its updated weights",
    "llada.model.transformer",
    "return self.output_layer(flat.",
    "return self._head(flat.",
    f"{LAYOUTS}[DP8, small buckets]",
)
rewrites(
    "the head's gradient under sequence parallelism",
    "llada.model.transformer",
    "tensor_parallel_output_grad=True",
    "tensor_parallel_output_grad=False",
    f"{LAYOUTS}[TP2+SP x DP4]",
)


# -- ranks and their state -------------------------------------------------------------------------


@changes("llada.engine.megatron", f"{LAYOUTS}[TP2 x DP4]")
def tensor_ranks_that_read_different_tokens(megatron: Any) -> None:
    right = megatron.rank_batch

    def rank_batch(*arguments: Any) -> Any:
        part = right(*arguments)
        return replace(
            part,
            inputs=part.inputs.roll(megatron.parallel_state.get_tensor_model_parallel_rank(), 1),
        )

    megatron.rank_batch = rank_batch


@changes("llada.engine.megatron", f"{LAYOUTS}[TP2 x CP2 x PP2 x VP2]")
def batched_exchange_between_two_stages_with_virtual_stages(megatron: Any) -> None:
    right = megatron.transformer_config

    def transformer_config(*arguments: Any) -> Any:
        config = right(*arguments)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    megatron.transformer_config = transformer_config


@changes("llada.engine.megatron", "tests/engine/test_parity.py")
def a_norms_gradient_counted_twice(megatron: Any) -> None:
    right = megatron._finalize

    def finalize(model: list[Any], *others: Any, **named: Any) -> None:
        right(model, *others, **named)
        for name, parameter in model[0].named_parameters():
            if name.endswith("layers.0.input_layernorm.weight"):
                parameter.main_grad.mul_(2)

    megatron._finalize = finalize


@changes("llada.checkpoint.optimizer_state", "tests/engine/test_state.py")
def one_step_count_for_all_parameters_after_loading(optimizer_state: Any) -> None:
    """AdamW then raises the count once for each parameter in every step."""
    right = optimizer_state.set_step_count

    def set_step_count(parts: Any, count: int) -> None:
        import torch

        right(parts, count)
        shared = torch.full((), float(count))
        for part in parts:
            for moments in part.optimizer.state.values():
                moments["step"] = shared

    optimizer_state.set_step_count = set_step_count


rewrites(
    "a rectangle of the moments that no rank writes",
    "llada.checkpoint.optimizer_state",
    "if max(body, tail) < stop:",
    "if max(body, tail) < stop and tail < body:",
    "tests/checkpoint/test_optimizer_state.py",
)
rewrites(
    "imported weights rounded before they become masters",
    "llada.engine.megatron",
    "whole = torch.empty(parameter.shape, dtype=torch.float32)",
    "whole = torch.empty(parameter.shape, dtype=self.dtype)",
    "tests/distributed/test_export.py::test_folders_and_imports_pass_through_every_layout_bit_for_bit[TP2+SP"
    " x CP2 x DP2-bf16]",
)


# -- Hugging Face folders --------------------------------------------------------------------------


@changes(
    "llada.hf.llama_layout",
    "tests/hf/test_from_hf.py::test_a_llama_is_the_same_function_under_a_causal_mask",
)
def keys_and_values_of_an_imported_llama_exchanged(llama_layout: Any) -> None:
    right = llama_layout._BLOCK_NAMES
    llama_layout._BLOCK_NAMES = {**right, "k_proj": right["v_proj"], "v_proj": right["k_proj"]}


@changes(
    "llada.hf.exporting",
    "tests/hf/test_convert.py::test_the_mean_of_checkpoints_is_that_of_their_masters",
)
def a_mean_of_rounded_weights(exporting: Any) -> None:
    right = exporting.CheckpointWeights
    exporting.CheckpointWeights = lambda stored, model, masters: right(stored, model)


rewrites(
    "a new token's row left as it was",
    "llada.hf.sources",
    "(self._num_tokens_after, self._num_rows_before)",
    "(self._num_tokens, self._num_rows_before)",
    "tests/hf/test_from_hf.py::test_new_tokens_take_rows_that_are_there_and_others_keep_theirs",
)


# -- the launcher and the run folder ---------------------------------------------------------------


@changes("llada.training.lock", "tests/training/test_lock.py")
def a_run_folder_taken_from_a_living_process(lock: Any) -> None:
    right = lock._has_ended
    lock._has_ended = lambda holder, own: right(holder, own) or holder.get("host") == own["host"]


@changes("launch.job.policy", "tests/launcher/test_policy.py")
def a_job_that_comes_back_after_scancel(policy: Any) -> None:
    right = policy.decide

    def decide(end: Any, now: Any, limits: Any) -> Any:
        if now.state == "cancelled":
            now = replace(now, state="running")
        return right(end, now, limits)

    policy.decide = decide


rewrites(
    "clean stops that use up the restarts",
    "launch.job.policy",
    'failed = not ends or ends[-1].get("failure", False)',
    "failed = True",
    "tests/launcher/test_policy.py",
)
rewrites(
    "a signal that is lost while Python imports",
    "launch.job.rank",
    "is_due = time.monotonic() - last_sent > _REPEAT_SECONDS",
    "is_due = last_sent == 0.0",
    "tests/launcher/test_rank.py",
)

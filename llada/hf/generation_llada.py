# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""Sampling from LLaDA (arXiv 2502.09992, section 2.4, algorithms 4 and 5).

`model.diffusion_generate` is the sampler. `model.generate` calls it for code that knows the
interface of transformers' causal language models only.

Shapes in this file: b rows, p prompt tokens, s tokens in all.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .configuration_llada import LLaDAConfig

Settings = dict[str, Any]
REMASKING = ("low_confidence", "random")

# Settings that `generate` passes on to `diffusion_generate` unchanged.
_DIFFUSION_SETTINGS = (
    "attention_mask",
    "steps",
    "block_length",
    "cfg_scale",
    "remasking",
    "generator",
    "num_tokens",
)

# Settings of autoregressive decoding, with the one value that does not ask for anything.
_NEUTRAL_VALUES: dict[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
}

# Settings that have no effect on the text, whatever their value.
_IGNORED = ("bos_token_id", "use_cache", "transformers_version", "token_type_ids")


@dataclass(frozen=True)
class _Options:
    """The settings of `diffusion_generate` that every step reads."""

    steps_per_block: int
    temperature: float
    cfg_scale: float
    remasking: str
    generator: torch.Generator | None
    mask_id: int
    num_tokens: int


class LLaDAGenerationMixin(GenerationMixin):
    """The generation methods of the model class.

    The name must end in GenerationMixin: transformers' auto classes add their own mixin, and with
    it their own `generate`, to any class that has no base of such a name.
    """

    config: LLaDAConfig
    generation_config: GenerationConfig

    @classmethod
    def can_generate(cls) -> bool:
        """True, although `generate` does not decode from left to right."""
        return True

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> Settings:
        """Not used. peft looks this method up when it wraps a causal language model."""
        raise NotImplementedError(
            "LLaDA does not write from left to right: call diffusion_generate"
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Run `diffusion_generate` through the interface of transformers' `generate`.

        Pipelines call this method, too.

        Args:
            inputs: int64 [b, p]. May also be given as input_ids.
            generation_config: Defaults for `settings`. Its eos_token_id and pad_token_id, or else
                those of the model, end and pad a text.
            settings: input_ids; attention_mask; max_new_tokens, or max_length, which counts the
                prompt too (default: 128 new tokens); temperature; do_sample, which alone means a
                temperature of 1 or 0; eos_token_id; pad_token_id; and steps, block_length,
                cfg_scale, remasking, generator and num_tokens of `diffusion_generate`.

        Returns:
            int64 [b, p + max_new_tokens], the prompt included. Everything after the first end
            token of a response is padding.

        Raises:
            ValueError: A setting of autoregressive decoding, such as top_p or num_beams, with a
                value that would change the text; or whatever `diffusion_generate` refuses.
        """
        settings = {
            **_non_default(self.generation_config),
            **_non_default(generation_config),
            **_without_none(settings),
        }
        # Take out every setting that has a meaning here. What is left is refused.
        prompt = settings.pop("input_ids", inputs)
        prompt_length = 0 if prompt is None else prompt.shape[-1]
        passed_on = {name: settings.pop(name) for name in _DIFFUSION_SETTINGS if name in settings}
        # One id or a list of ids
        end_setting = settings.pop("eos_token_id", self.config.eos_token_id)
        end_ids = torch.as_tensor(end_setting).flatten().tolist()
        pad_id = settings.pop("pad_token_id", self.config.pad_token_id)
        max_length = settings.pop("max_length", prompt_length + 128)
        max_new_tokens = settings.pop("max_new_tokens", max_length - prompt_length)
        temperature = _temperature(
            settings.pop("do_sample", None), settings.pop("temperature", None)
        )
        _refuse_unknown(settings)
        _check_counts(max_new_tokens=max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(
                f"LLaDAModelLM.generate: {max_new_tokens} new tokens are less than 1;"
                " diffusion_generate fills masks"
            )
        tokens = self.diffusion_generate(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, **passed_on
        )
        if pad_id is None:
            pad_id = end_ids[0]
        response = _pad_after_end(tokens[:, prompt_length:], end_ids, pad_id)
        return torch.cat([tokens[:, :prompt_length], response], dim=1)

    @torch.no_grad()
    def diffusion_generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        generator: torch.Generator | None = None,
        num_tokens: int | None = None,
    ) -> torch.Tensor:
        """Continue prompts, or fill their masks, by reverse diffusion.

        The response starts as [MASK] only. In each step the model predicts every mask; of the
        current block, the most confident predictions (or a uniform choice) are kept and the rest
        stays masked. The masks of a block are spread evenly over its steps, and the first steps
        take the remainder. Generation does not stop at an end-of-text token, and the tokens after
        it are returned too.

        Args:
            input_ids: int64 [b, p]. None means one empty prompt.
            attention_mask: [b, p], 1 for tokens and 0 for padding, on either side. A row gives the
                same tokens as it would alone.
            max_new_tokens: Length of the response, in tokens. 0 fills the [MASK]s of input_ids
                instead, all at once.
            steps: Number of model calls, a multiple of the number of blocks. With guidance each
                call has twice as many rows. None means one step per token. When filling, steps
                beyond the number of masks in a row have no effect.
            block_length: Tokens per block, a divisor of max_new_tokens. Blocks are written from
                left to right. None means one block.
            temperature: 0 takes the most probable token; T > 0 samples from softmax(logits / T) by
                the Gumbel trick, in float64.
            cfg_scale: Strength w of classifier-free guidance (arXiv 2410.18514): uncond + (w + 1)
                (cond - uncond), where the prompt is masked in the unconditional pass. 0 turns it
                off.
            remasking: "low_confidence" keeps the predictions with the highest probability,
                "random" a uniform choice.
            generator: Source of the noise. None means torch's default generator of the model's
                device.
            num_tokens: Only ids below num_tokens, and not [MASK], are written. None means the
                config's tokenizer_vocab_size, or else its vocab_size.

        Returns:
            int64 [b, p + max_new_tokens], the prompt and its padding included.

        Raises:
            ValueError: A setting out of range; shapes that do not match; [MASK] in a prompt that
                is to be continued; no [MASK] in rows that are to be filled.
        """
        tokens, attended = _prompt(input_ids, attention_mask, next(self.parameters()).device)
        mask_id, num_tokens = _vocabulary(self.config, num_tokens)
        _check_counts(max_new_tokens=max_new_tokens, steps=steps, block_length=block_length)
        _check_settings(max_new_tokens, temperature, cfg_scale, remasking)
        # Append the response, as masks: [b, p] -> [b, s]
        batch, prompt_length = tokens.shape
        response = tokens.new_full((batch, max_new_tokens), mask_id)
        tokens = torch.cat([tokens, response], dim=1)
        attended = torch.cat([attended, attended.new_ones(batch, max_new_tokens)], dim=1)
        to_write = (tokens == mask_id) & attended
        blocks = _blocks(to_write, prompt_length, max_new_tokens, block_length)
        if steps is None:
            steps = max_new_tokens or int(to_write.sum(1).max())
        if steps < 1 or steps % len(blocks):
            raise ValueError(
                f"steps: {steps} is not a positive multiple of the {len(blocks)} blocks of"
                " max_new_tokens / block_length"
            )
        options = _Options(
            steps_per_block=steps // len(blocks),
            temperature=temperature,
            cfg_scale=cfg_scale,
            remasking=remasking,
            generator=generator,
            mask_id=mask_id,
            num_tokens=num_tokens,
        )
        padding: dict[str, torch.Tensor] = {}
        if not attended.all():
            # Positions count tokens only, so a response directly follows its prompt on whichever
            # side the padding is.
            position_ids = (attended.cumsum(1) - 1).clamp(min=0)
            padding = {"attention_mask": attended, "position_ids": position_ids}
        return _denoise(self, tokens, ~to_write, blocks, options, padding)


# -- settings --------------------------------------------------------------------------------------


def _non_default(config: GenerationConfig | None) -> Settings:
    """The settings of a generation config that differ from its class's defaults."""
    if config is None:
        return {}
    fields = config.to_diff_dict()
    return _without_none({name: fields[name] for name in fields if not name.startswith("_")})


def _without_none(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if value is not None}


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    """The temperature by the rules of transformers: it samples only with `do_sample`."""
    if do_sample is False:
        return 0.0
    if temperature is None:
        return 1.0 if do_sample else 0.0
    return temperature


def _refuse_unknown(settings: Settings) -> None:
    refused = []
    for name, value in settings.items():
        if name not in _IGNORED and value != _NEUTRAL_VALUES.get(name):
            refused.append(f"{name}={value!r}")
    if refused:
        raise ValueError(
            f"LLaDAModelLM.generate: {', '.join(refused)} not supported: text is written by"
            " diffusion, not from left to right; see diffusion_generate"
        )


def _check_counts(**counts: object) -> None:
    """Raise ValueError unless every value is None or an integer; numpy's count, bool does not."""
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}: {value!r} is not a whole number")


def _check_settings(
    max_new_tokens: int, temperature: object, cfg_scale: object, remasking: str
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is less than 0")
    for name, value in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{name}: {value} is not a number of at least 0")
    if remasking not in REMASKING:
        raise ValueError(f"remasking: '{remasking}' is not allowed; one of {', '.join(REMASKING)}")


def _prompt(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids, int64 [b, p], and where they are not padding, bool [b, p]."""
    if input_ids is None:
        input_ids = torch.empty(1, 0, dtype=torch.long, device=device)
    if input_ids.dim() != 2 or input_ids.dtype != torch.long:
        raise ValueError(
            f"input_ids: {input_ids.dtype} of shape {tuple(input_ids.shape)} is not int64 of shape"
            " [b, p]"
        )
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} is not that of input_ids,"
            f" {tuple(input_ids.shape)}"
        )
    return input_ids, attention_mask.to(input_ids.device) != 0


def _vocabulary(config: LLaDAConfig, num_tokens: int | None) -> tuple[int, int]:
    """Return the id of [MASK] and the number of ids that may be written."""
    if config.mask_token_id is None:
        raise ValueError("mask_token_id: the config has none, so there is nothing to start from")
    if num_tokens is None:
        num_tokens = config.tokenizer_vocab_size or config.vocab_size
    if not 1 <= num_tokens <= config.embedding_size:
        raise ValueError(
            f"num_tokens: {num_tokens} is not from 1 to the {config.embedding_size} rows of the"
            " embedding"
        )
    return config.mask_token_id, num_tokens


def _blocks(
    to_write: torch.Tensor, prompt_length: int, max_new_tokens: int, block_length: int | None
) -> list[torch.Tensor]:
    """Divide the positions `to_write` into blocks, each bool [b, s], in the order of writing."""
    if not max_new_tokens:
        if block_length is not None:
            raise ValueError(
                "block_length: masks are filled all at once (max_new_tokens=0), there are no blocks"
            )
        if not to_write.any():
            raise ValueError("input_ids: no [MASK] to fill (max_new_tokens=0)")
        return [to_write]
    if to_write[:, :prompt_length].any():
        raise ValueError(
            "input_ids: a prompt with [MASK] cannot be continued; fill it first, with"
            " max_new_tokens=0"
        )
    length = max_new_tokens if block_length is None else block_length
    if length < 1 or max_new_tokens % length:
        raise ValueError(
            f"block_length: {block_length} is not a divisor of max_new_tokens, {max_new_tokens}"
        )
    # Prompt positions are negative here, so they fall into no block.
    position = torch.arange(to_write.shape[1], device=to_write.device) - prompt_length
    block_of = position // length
    return [to_write & (block_of == block) for block in range(max_new_tokens // length)]


def _pad_after_end(response: torch.Tensor, end_ids: list[int], pad_id: int) -> torch.Tensor:
    """Replace everything after the first end token of each row [b, s] by padding."""
    is_end = torch.isin(response, torch.tensor(end_ids, device=response.device))
    ends_before = is_end.cumsum(1) - is_end.long()
    return response.masked_fill(ends_before > 0, pad_id)


# -- denoising -------------------------------------------------------------------------------------


def _denoise(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    fixed: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    options: _Options,
    padding: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Fill the masks block by block.

    Args:
        model: The mask predictor.
        tokens: int64 [b, s].
        fixed: bool [b, s], the positions that are not written. Guidance hides them in its
            unconditional pass.
        blocks: Positions of each block, bool [b, s].
        options: See `_Options`.
        padding: Arguments of the model for padded rows.
    """
    masked = ~fixed
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    for block in blocks:
        for quota in _quotas(block, options.steps_per_block).unbind(1):
            if not quota.any():
                break  # quotas never rise, so the rest are 0 too
            candidates = block & masked
            logits = _logits(model, tokens, fixed, candidates, options, padding)
            chosen, confidence = _predict(logits, options)
            # Rank the candidates of each row; all other positions come last.
            scores = confidence
            if options.remasking == "random":
                scores = _uniform(confidence, options)
            rank = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
            rank[candidates] = scores
            # A stable sort gives ties to the earlier position.
            order = rank.argsort(dim=1, descending=True, stable=True)
            # Commit the first `quota` positions of each row's order.
            in_quota = columns < quota[:, None]
            commit = torch.zeros_like(candidates).scatter(1, order, in_quota)
            tokens = torch.where(commit, tokens.masked_scatter(candidates, chosen), tokens)
            masked = masked & ~commit
    return tokens


def _quotas(block: torch.Tensor, steps: int) -> torch.Tensor:
    """Number of masks to fill in each step, int64 [b, steps], for a block, bool [b, s].

    Example: 7 masks in 3 steps are filled 3, 2, 2 at a time.
    """
    masks = block.sum(1, keepdim=True)
    step = torch.arange(steps, device=block.device)
    return masks // steps + (step < masks % steps)


def _logits(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    fixed: torch.Tensor,
    candidates: torch.Tensor,
    options: _Options,
    padding: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Logits of the n candidate positions after guidance, float64 [n, embedding_size]."""
    if not options.cfg_scale:
        return model(tokens, **padding).logits[candidates].double()
    # One call with twice the rows: the conditional pass, then the unconditional one.
    hidden = torch.where(fixed, options.mask_id, tokens)
    twice = {name: value.repeat(2, 1) for name, value in padding.items()}
    logits = model(torch.cat([tokens, hidden]), **twice).logits
    first_half, second_half = logits.chunk(2)
    conditional = first_half[candidates].double()
    unconditional = second_half[candidates].double()
    return unconditional + (options.cfg_scale + 1) * (conditional - unconditional)


def _predict(logits: torch.Tensor, options: _Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for each of n positions.

    Ids beyond the tokenizer's and [MASK] are never chosen, but they stay in the softmax, as in
    training.

    Args:
        logits: float64 [n, embedding_size].
        options: See `_Options`.

    Returns:
        The chosen ids, int64 [n], and their probabilities without the noise of the temperature,
        float64 [n].
    """
    scores = logits[:, : options.num_tokens].clone()
    # A slice: num_tokens may be smaller than the id of [MASK], and then this changes nothing.
    scores[:, options.mask_id : options.mask_id + 1] = -torch.inf
    if options.temperature:
        # Gumbel trick: argmax(logits - T log(-log u)) is a sample from softmax(logits / T).
        scores -= options.temperature * torch.log(-torch.log(_uniform(scores, options)))
    chosen = scores.argmax(-1)
    probabilities = logits.softmax(-1)
    return chosen, probabilities.gather(-1, chosen[:, None])[:, 0]


def _uniform(like: torch.Tensor, options: _Options) -> torch.Tensor:
    """Draw uniform numbers from (0, 1), float64, of the shape and on the device of `like`."""
    # Draw where the generator is: torch requires both on one device.
    device = like.device if options.generator is None else options.generator.device
    draws = torch.rand(like.shape, dtype=torch.float64, device=device, generator=options.generator)
    # torch.rand may return 0, whose logarithm is infinite.
    return draws.clamp_(min=2.0**-54).to(like.device)

# Copyright the llada authors. SPDX-License-Identifier: Apache-2.0
"""Sampling from LLaDA (arXiv 2502.09992, section 2.4, algorithms 4 and 5):
`model.diffusion_generate`, and `generate` on top of it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

REMASKING = ("low_confidence", "random")


_OF_DIFFUSION = (
    "attention_mask",
    "steps",
    "block_length",
    "cfg_scale",
    "remasking",
    "generator",
    "num_tokens",
)
"""Arguments of `diffusion_generate` that `generate` hands on as they are."""
_NEUTRAL = {
    **{
        "num_beams": 1,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
    },
    **{"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits"), False
    ),
}
"""Settings for text from left to right, with the value that changes nothing."""
_IGNORED = ("bos_token_id", "use_cache", "transformers_version", "token_type_ids")


@dataclass(frozen=True)
class _Options:
    """The settings of `diffusion_generate` that every step reads, and the ids it must know."""

    steps_per_block: int
    temperature: float
    cfg_scale: float
    remasking: str
    generator: torch.Generator | None
    mask_id: int
    num_tokens: int


class LLaDAGenerationMixin(GenerationMixin):
    """What the model class adds to transformers' own, of which `generate` is replaced.

    The name ends in GenerationMixin because transformers' auto classes add theirs to a class that
    has no base called so.
    """

    config: Any
    generation_config: Any

    @classmethod
    def can_generate(cls) -> bool:
        """True: `generate` is there, though it does not write from left to right."""
        return True

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """peft looks this name up when it wraps a causal language model; only text from left to
        right would call it.
        """
        raise NotImplementedError(
            "LLaDA does not write from left to right: call diffusion_generate"
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """`diffusion_generate` for callers of transformers' `generate`, pipelines among them.

        Args:
            inputs: int64 [b, p], also as input_ids.
            generation_config: settings that are not given here. Its ids, and those of the model's
                own, end a text and pad it.
            settings: input_ids; attention_mask; max_new_tokens, or max_length, which counts the
                prompt too (128 new tokens if neither is given); temperature, and do_sample, which
                is 0 or 1 of it if it stands alone; eos_token_id, pad_token_id; steps, block_length,
                cfg_scale, remasking, generator and num_tokens of `diffusion_generate`.

        Returns:
            int64 [b, p + max_new_tokens], the prompt included. What follows the first end of a
            response is padding.

        Raises:
            ValueError: a setting for text from left to right, as top_p or num_beams, whose value
                would change the text; what `diffusion_generate` raises.
        """
        given = {
            **_changed(self.generation_config),
            **_changed(generation_config),
            **_without_none(settings),
        }
        prompt = given.pop("input_ids", inputs)
        kept = {name: given.pop(name) for name in _OF_DIFFUSION if name in given}
        ends = (
            torch.as_tensor(given.pop("eos_token_id", self.config.eos_token_id)).flatten().tolist()
        )
        pad = given.pop("pad_token_id", self.config.pad_token_id)
        start = 0 if prompt is None else prompt.shape[-1]
        longest = given.pop("max_length", start + 128)
        count = given.pop("max_new_tokens", longest - start)
        temperature = _temperature(given.pop("do_sample", None), given.pop("temperature", None))
        refused = [
            f"{name}={value!r}"
            for name, value in given.items()
            if name not in _IGNORED and value != _NEUTRAL.get(name)
        ]
        if refused:
            raise ValueError(
                f"LLaDAModelLM.generate: {', '.join(refused)} not supported: text is written by"
                " diffusion, not from left to right; see diffusion_generate"
            )
        _check_counts(max_new_tokens=count)
        if count < 1:
            raise ValueError(
                f"LLaDAModelLM.generate: {count} new tokens are less than 1; diffusion_generate"
                " fills masks"
            )
        tokens = self.diffusion_generate(
            prompt, max_new_tokens=count, temperature=temperature, **kept
        )
        is_end = torch.isin(tokens[:, start:], torch.tensor(ends, device=tokens.device))
        after = is_end.cumsum(1) - is_end.long() > 0
        return torch.cat(
            [
                tokens[:, :start],
                tokens[:, start:].masked_fill(after, ends[0] if pad is None else pad),
            ],
            dim=1,
        )

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
        """Continue prompts, or fill their masks, by reverse diffusion (arXiv 2502.09992, section
        2.4).

        The response starts as [MASK] only. In each step the model predicts every mask; of the
        current block the most confident predictions, or a uniform choice, are kept and the rest
        stays masked. A block's masks are spread over its steps as evenly as they go, the remainder
        over the first ones. Nothing ends early and nothing is cut: what follows an end-of-text
        token is returned too.

        Args:
            input_ids: int64 [b, p]; None: one empty prompt.
            attention_mask: [b, p], 1 for tokens and 0 for padding, on either side. A row gives the
                tokens it would give alone.
            max_new_tokens: length of the response, in tokens. 0: fill the [MASK]s of input_ids
                instead, all at once.
            steps: calls of the model in all, a multiple of the number of blocks (each is one of
                twice as many rows with guidance). None: one a token. When filling, more than the
                masks of a row are not of use.
            block_length: tokens of a block, a divisor of max_new_tokens; blocks are written from
                left to right. None: one block.
            temperature: 0 takes the best token; T > 0 samples from softmax(logits / T) by the
                Gumbel trick, in float64.
            cfg_scale: strength w of classifier-free guidance (arXiv 2410.18514): uncond + (w + 1)
                (cond - uncond), with the given tokens masked in the unconditional pass; 0: none.
            remasking: "low_confidence" keeps the predictions with the highest probability, "random"
                a uniform choice.
            generator: of the noise; None: torch's own of the model's device.
            num_tokens: ids from 0 to num_tokens - 1 may be written, without [MASK]. None: the
                config's tokenizer_vocab_size, or its vocab_size.

        Returns:
            int64 [b, p + max_new_tokens], the prompt and its padding included.

        Raises:
            ValueError: a setting outside its range, shapes that do not fit, [MASK] in a prompt that
                is to be continued, no [MASK] in rows that are to be filled.
        """
        tokens, attended = _prompt(input_ids, attention_mask, next(self.parameters()).device)
        mask_id, num_tokens = _ids(self.config, num_tokens)
        _check_counts(max_new_tokens=max_new_tokens, steps=steps, block_length=block_length)
        _check(max_new_tokens, temperature, cfg_scale, remasking)
        rows, start = tokens.shape
        tokens = torch.cat([tokens, tokens.new_full((rows, max_new_tokens), mask_id)], dim=1)
        attended = torch.cat([attended, attended.new_ones(rows, max_new_tokens)], dim=1)
        wanted = (tokens == mask_id) & attended
        blocks = _blocks(wanted, start, max_new_tokens, block_length)
        if steps is None:
            steps = max_new_tokens or int(wanted.sum(1).max())
        if steps < 1 or steps % len(blocks):
            raise ValueError(
                f"steps: {steps} is not a positive multiple of the {len(blocks)} blocks of"
                " max_new_tokens / block_length"
            )
        options = _Options(
            steps // len(blocks), temperature, cfg_scale, remasking, generator, mask_id, num_tokens
        )
        # Positions count tokens only, so that a response follows its prompt at once wherever the
        # padding is.
        padding = (
            {"attention_mask": attended, "position_ids": (attended.cumsum(1) - 1).clamp(min=0)}
            if not attended.all()
            else {}
        )
        return _denoise(self, tokens, ~wanted, blocks, options, padding)


def _changed(config: GenerationConfig | None) -> dict[str, Any]:
    """The settings of a generation config that are not its class's defaults."""
    fields = {} if config is None else config.to_diff_dict()
    return _without_none(
        {name: value for name, value in fields.items() if not name.startswith("_")}
    )


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    """transformers samples with `do_sample` only, at a temperature of 1 unless it is
    told another.
    """
    if do_sample is False:
        return 0.0
    if temperature is None:
        return 1.0 if do_sample else 0.0
    return temperature


def _prompt(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [b, p] and where they are not padding, bool [b, p]."""
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


def _ids(config: Any, num_tokens: int | None) -> tuple[int, int]:
    """Id of [MASK] and how many ids may be written."""
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


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, numbers.Integral)
        ):
            raise ValueError(f"{name}: {value!r} is not a whole number")


def _check(max_new_tokens: int, temperature: Any, cfg_scale: Any, remasking: str) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is less than 0")
    for name, value in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{name}: {value} is not a number of at least 0")
    if remasking not in REMASKING:
        raise ValueError(f"remasking: '{remasking}' is not allowed; one of {', '.join(REMASKING)}")


def _blocks(
    wanted: torch.Tensor, start: int, max_new_tokens: int, block_length: int | None
) -> list[torch.Tensor]:
    """The blocks in the order in which they are written, each bool [b, s]."""
    if not max_new_tokens:
        if block_length is not None:
            raise ValueError(
                "block_length: masks are filled all at once (max_new_tokens=0), there are no blocks"
            )
        if not wanted.any():
            raise ValueError("input_ids: no [MASK] to fill (max_new_tokens=0)")
        return [wanted]
    if wanted[:, :start].any():
        raise ValueError(
            "input_ids: a prompt with [MASK] cannot be continued; fill it first, with"
            " max_new_tokens=0"
        )
    length = max_new_tokens if block_length is None else block_length
    if length < 1 or max_new_tokens % length:
        raise ValueError(
            f"block_length: {block_length} is not a divisor of max_new_tokens, {max_new_tokens}"
        )
    position = torch.arange(wanted.shape[1], device=wanted.device) - start
    return [wanted & (position // length == block) for block in range(max_new_tokens // length)]


def _denoise(
    model: Any,
    tokens: torch.Tensor,
    given: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    options: _Options,
    padding: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Fill the masks block by block; `given` marks what guidance hides in its
    unconditional pass.
    """
    open_ = ~given
    for block in blocks:
        # [b, steps]: as even as it goes, the remainder over the first steps
        masks, step = (
            block.sum(1, keepdim=True),
            torch.arange(options.steps_per_block, device=tokens.device),
        )
        quotas = masks // options.steps_per_block + (step < masks % options.steps_per_block)
        for quota in quotas.unbind(1):
            if not quota.any():
                break  # quotas only fall
            now = block & open_
            chosen, confidence = _predict(
                _logits(model, tokens, given, now, options, padding), options
            )
            rank = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
            rank[now] = (
                _uniform(confidence, options) if options.remasking == "random" else confidence
            )
            # Ties go to the earlier position.
            order = rank.argsort(dim=1, descending=True, stable=True)
            first = torch.arange(tokens.shape[1], device=tokens.device) < quota[:, None]
            commit = torch.zeros_like(now).scatter(1, order, first)
            tokens = torch.where(commit, tokens.masked_scatter(now, chosen), tokens)
            open_ = open_ & ~commit
    return tokens


def _logits(
    model: Any,
    tokens: torch.Tensor,
    given: torch.Tensor,
    now: torch.Tensor,
    options: _Options,
    padding: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Logits float64 [n, rows] of the n positions `now`, with guidance."""
    if not options.cfg_scale:
        return model(tokens, **padding).logits[now].double()
    hidden = torch.where(given, options.mask_id, tokens)
    twice = {name: value.repeat(2, 1) for name, value in padding.items()}
    conditional, unconditional = (
        part[now].double() for part in model(torch.cat([tokens, hidden]), **twice).logits.chunk(2)
    )
    return unconditional + (options.cfg_scale + 1) * (conditional - unconditional)


def _predict(logits: torch.Tensor, options: _Options) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row [n, rows], with the temperature's noise, and its probability without,
    float64 [n].

    [MASK] and rows past the tokenizer's are never chosen; in the softmax they stay, as in training.
    """
    possible = logits[:, : options.num_tokens].clone()
    possible[:, options.mask_id : options.mask_id + 1] = -torch.inf
    if options.temperature:
        possible -= options.temperature * torch.log(-torch.log(_uniform(possible, options)))
    chosen = possible.argmax(-1)
    return chosen, logits.softmax(-1).gather(-1, chosen[:, None])[:, 0]


def _uniform(like: torch.Tensor, options: _Options) -> torch.Tensor:
    """Draws from (0, 1), float64, of the shape of `like`."""
    device = like.device if options.generator is None else options.generator.device
    draws = torch.rand(like.shape, dtype=torch.float64, device=device, generator=options.generator)
    return draws.clamp_(min=2.0**-54).to(like.device)

"""Reverse diffusion: from [MASK] to text (arXiv 2502.09992, section 2.4, algorithms 4 and 5).

A response starts as [MASK] only. In each step the model predicts every mask; of the current block,
the most confident predictions (or a uniform choice) are kept and the rest stays masked. The masks
of a block are spread evenly over its steps, and the first steps take the remainder. Infilling is
the same with all gaps as one block.

Noise is keyed by (seed, row, step, position), so the text of a row does not depend on the rows that
are sampled with it.

Shapes in this file: b rows, p prompt tokens, s tokens in all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llada.errors import UserError
from llada.noise import stream, uniforms

Model = Callable[[torch.Tensor], torch.Tensor]
"""A bidirectional mask predictor: ids [b, s] -> logits [b, s, vocab_size]."""
REMASKING = ("low_confidence", "random")
LONGEST = 100_000
"""Largest number of response tokens, and of steps: more is a typing error."""


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        length: Tokens of the response.
        steps: Number of model calls (with guidance each has twice as many rows), a multiple of the
            number of blocks. Steps beyond one per token have no effect. None: one per token, the
            slowest and the best.
        block_length: Tokens per block. Blocks are written from left to right. None: one block.
        temperature: 0 takes the most probable token; T > 0 samples from softmax(logits / T) by the
            Gumbel trick, in float64.
        cfg: Strength w of classifier-free guidance (arXiv 2410.18514): uncond + (w + 1) (cond -
            uncond), where the prompt is masked in the unconditional pass. 0 turns it off.
        remasking: "low_confidence" keeps the predictions with the highest probability, "random" a
            uniform choice.
        seed: Key of the noise.

    Raises:
        UserError: A value out of range, or settings that contradict each other.
    """

    length: int = 128
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    cfg: float = 0.0
    remasking: str = "low_confidence"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"length": self.length, "steps": self.num_steps, "block-length": self.block}
        # Counts first: the divisions below need positive numbers.
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"--{name}: {count} is less than 1")
            if count > LONGEST:
                raise UserError(f"--{name}: {count} is more than {LONGEST}")
        for name, number in (("temperature", self.temperature), ("cfg", self.cfg)):
            # Not `number < 0`: a comparison with NaN is false.
            if not 0 <= number < float("inf"):
                raise UserError(f"--{name}: {number} is not a number of at least 0")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed: {self.seed} is not from 0 to 2^64 - 1")
        if self.remasking not in REMASKING:
            raise UserError(
                f"--remasking: '{self.remasking}' is not allowed; one of {', '.join(REMASKING)}"
            )
        # Every block has the same length and the same number of steps.
        if self.length % self.block:
            raise UserError(f"--block-length: {self.block} does not divide --length {self.length}")
        num_blocks = self.length // self.block
        if self.num_steps % num_blocks:
            raise UserError(
                f"--steps: {self.num_steps} is not a multiple of the {num_blocks} blocks of"
                " --length / --block-length"
            )

    @property
    def num_steps(self) -> int:
        """Number of model calls."""
        return self.length if self.steps is None else self.steps

    @property
    def block(self) -> int:
        """Tokens per block."""
        return self.length if self.block_length is None else self.block_length


@dataclass(frozen=True)
class SpecialIds:
    """The ids that a sampler must know.

    Attributes:
        mask_id: Id of [MASK].
        eos_id: Id of the end-of-text token.
        vocab_size: Number of ids of the tokenizer. Rows of the head beyond it are padding; neither
            they nor [MASK] are ever written.
    """

    mask_id: int
    eos_id: int
    vocab_size: int


@dataclass(frozen=True)
class DenoisingStep:
    """One step of a denoising.

    Attributes:
        number: Number of this step, from 1.
        total: Number of all steps.
        tokens: Ids after it, int64 [b, s].
        committed: The positions that it filled, bool [b, s].
    """

    number: int
    total: int
    tokens: torch.Tensor
    committed: torch.Tensor


OnStep = Callable[[DenoisingStep], None]
"""Called after every step that fills at least one mask."""


def generate(
    model: Model,
    prompt: torch.Tensor,
    special_ids: SpecialIds,
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Continue prompts of equal length.

    Args:
        model: The mask predictor.
        prompt: Ids, int64 [b, p].
        special_ids: See SpecialIds.
        options: See SamplingOptions.
        on_step: Called after every step.

    Returns:
        The responses, int64 [b, options.length], with EOS and everything after it.
    """
    # [b, p] -> [b, p + length], the response as masks
    prompt_length = prompt.shape[1]
    response = prompt.new_full((len(prompt), options.length), special_ids.mask_id)
    tokens = torch.cat([prompt, response], dim=1)
    in_prompt = torch.arange(tokens.shape[1], device=prompt.device) < prompt_length
    blocks = []
    for first in range(prompt_length, tokens.shape[1], options.block):
        block = torch.zeros_like(tokens, dtype=torch.bool)
        block[:, first : first + options.block] = True
        blocks.append(block)
    fixed = in_prompt.expand_as(tokens)
    tokens = _denoise(model, tokens, fixed, blocks, special_ids, options, on_step)
    return tokens[:, prompt_length:]


def infill(
    model: Model,
    tokens: torch.Tensor,
    special_ids: SpecialIds,
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Fill every [MASK] of the given rows, all gaps at once.

    Args:
        model: The mask predictor.
        tokens: Ids, int64 [b, s], with [MASK] where to write.
        special_ids: See SpecialIds.
        options: See SamplingOptions; `length` and `block_length` are not used.
        on_step: Called after every step.

    Returns:
        Ids, int64 [b, s].

    Raises:
        UserError: There is no [MASK].
    """
    gaps = tokens == special_ids.mask_id
    if not gaps.any():
        raise UserError("the text has no [MASK] to fill")
    return _denoise(model, tokens.clone(), ~gaps, [gaps], special_ids, options, on_step)


def quotas(masks: int, steps: int) -> list[int]:
    """Number of masks to fill in each step: as even as possible, the remainder in the first steps.

    >>> quotas(7, 3)
    [3, 2, 2]
    """
    share, remainder = divmod(masks, steps)
    return [share + 1] * remainder + [share] * (steps - remainder)


def cut_at_end(ids: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """The ids before the first that ends a text. What follows is padding, as in training."""
    before_end = itertools.takewhile(lambda i: i not in end_ids, ids)
    return [int(i) for i in before_end]


@torch.no_grad()
def _denoise(
    model: Model,
    tokens: torch.Tensor,
    fixed: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    special_ids: SpecialIds,
    options: SamplingOptions,
    on_step: OnStep | None,
) -> torch.Tensor:
    """Fill the masks block by block.

    Args:
        model: The mask predictor.
        tokens: int64 [b, s].
        fixed: bool [b, s], the positions that are not written. Guidance hides them in its
            unconditional pass.
        blocks: Positions of each block, bool [b, s].
        special_ids: See SpecialIds.
        options: See SamplingOptions.
        on_step: Called after every step.
    """
    steps_per_block = options.num_steps // len(blocks)
    number = 0
    for block in blocks:
        in_block = (tokens == special_ids.mask_id) & block
        row_quotas = [quotas(count, steps_per_block) for count in in_block.sum(1).tolist()]
        for step in range(steps_per_block):
            # Steps without a quota count too: the number is part of the noise's key.
            number += 1
            counts = [row[step] for row in row_quotas]
            if not any(counts):
                continue
            candidates = (tokens == special_ids.mask_id) & block
            logits = _logits(model, tokens, fixed, special_ids.mask_id, options.cfg)
            chosen, confidence = _predict(logits, candidates, special_ids, options, number)
            # Keep the best predictions of each row; all other positions stay as they are.
            rank = _rank(confidence, options, number)
            commit = _largest(torch.where(candidates, rank, -torch.inf), counts)
            tokens = torch.where(commit, chosen, tokens)
            if on_step is not None:
                on_step(DenoisingStep(number, options.num_steps, tokens, commit))
    return tokens


def _logits(
    model: Model, tokens: torch.Tensor, fixed: torch.Tensor, mask_id: int, strength: float
) -> torch.Tensor:
    """Logits after guidance, float64 [b, s, vocab_size]."""
    if not strength:
        return model(tokens).double()
    # One call with twice the rows: the conditional pass, then the unconditional one.
    hidden = torch.where(fixed, mask_id, tokens)
    conditional, unconditional = model(torch.cat([tokens, hidden])).double().chunk(2)
    return unconditional + (strength + 1) * (conditional - unconditional)


def _predict(
    logits: torch.Tensor,
    candidates: torch.Tensor,
    special_ids: SpecialIds,
    options: SamplingOptions,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for every position.

    [MASK] and padding rows are never chosen, but they stay in the softmax, as in training.

    Args:
        logits: float64 [b, s, vocab_size].
        candidates: bool [b, s], the positions that need the noise of the temperature.
        special_ids: See SpecialIds.
        options: See SamplingOptions.
        step: Number of the step, part of the noise's key.

    Returns:
        The chosen ids, int64 [b, s], and their probabilities without the noise of the temperature,
        float64 [b, s].
    """
    scores = logits[..., : special_ids.vocab_size].clone()
    scores[..., special_ids.mask_id] = -torch.inf
    if options.temperature:
        # Gumbel trick: argmax(logits - T log(-log u)) is a sample from softmax(logits / T).
        for row, position in candidates.nonzero().tolist():
            key = stream(options.seed, "sample/gumbel", row, step, position)
            draws = torch.from_numpy(uniforms(key, special_ids.vocab_size))
            # A draw may be 0, whose logarithm is infinite.
            noise = draws.clamp_(min=2.0**-54).to(logits.device)
            scores[row, position] -= options.temperature * torch.log(-torch.log(noise))
    chosen = scores.argmax(-1)
    probabilities = logits.softmax(-1)
    return chosen, probabilities.gather(-1, chosen[..., None])[..., 0]


def _rank(confidence: torch.Tensor, options: SamplingOptions, step: int) -> torch.Tensor:
    """Scores [b, s] that decide which predictions are kept, the highest first."""
    if options.remasking == "low_confidence":
        return confidence
    batch, length = confidence.shape
    rows = []
    for row in range(batch):
        rows.append(uniforms(stream(options.seed, "sample/remask", row, step), length))
    return torch.from_numpy(np.stack(rows)).to(confidence.device)


def _largest(values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Positions of the `counts[row]` largest values of each row, bool [b, s].

    Ties go to the earlier position.
    """
    order = values.argsort(dim=1, descending=True, stable=True)
    columns = torch.arange(values.shape[1], device=values.device)
    keep = columns < torch.tensor(counts, device=values.device)[:, None]
    # `keep` is in the order of rank; bring it back to the order of positions.
    return torch.zeros_like(keep).scatter(1, order, keep)

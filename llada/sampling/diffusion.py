"""Reverse diffusion: from [MASK] to text (arXiv 2502.09992, section 2.4, algorithms 4 and 5).

A response starts as [MASK] only. In each step the model predicts every mask; of the current block
the most confident predictions (or a uniform choice) are kept and the rest stays masked. A block's
masks are spread over its steps as evenly as they go, the remainder over the first ones. Filling
gaps is the same with the gaps for the block.

Noise is keyed by (seed, row, step, position): a row's text does not depend on what is sampled
beside it.
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
REMASKING = ("low_confidence", "random")
LONGEST = 100_000
"""Most tokens of a response, and most steps: more is a slip of the finger."""


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        length: tokens of the response.
        steps: calls of the model in all (twice as many with guidance); at least one a block and at
            most one a token is of use.
        block_length: tokens of a block; blocks are written from left to right. None: one block.
        temperature: 0 takes the best token; T > 0 samples from softmax(logits / T) by the Gumbel
            trick, in float64.
        cfg: strength w of classifier-free guidance (arXiv 2410.18514): uncond + (w + 1) (cond -
            uncond), with the prompt masked in the unconditional pass; 0: none.
        remasking: "low_confidence" keeps the predictions with the highest probability, "random" a
            uniform choice.
        seed: key of the noise.

    Raises:
        UserError: a value outside its range, or settings that do not fit together.
    """

    length: int = 128
    steps: int = 64
    block_length: int | None = None
    temperature: float = 0.0
    cfg: float = 0.0
    remasking: str = "low_confidence"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low in (
            ("length", self.length, 1),
            ("steps", self.steps, 1),
            ("block-length", self.block, 1),
        ):
            if value < low:
                raise UserError(f"--{name}: {value} is less than {low}")
            if value > LONGEST:
                raise UserError(f"--{name}: {value} is more than {LONGEST}")
        for name, number in (("temperature", self.temperature), ("cfg", self.cfg)):
            if not 0 <= number < float("inf"):
                raise UserError(f"--{name}: {number} is not a number of at least 0")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed: {self.seed} is not from 0 to 2^64 - 1")
        if self.remasking not in REMASKING:
            raise UserError(
                f"--remasking: '{self.remasking}' is not allowed; one of {', '.join(REMASKING)}"
            )
        if self.length % self.block:
            raise UserError(f"--block-length: {self.block} does not divide --length {self.length}")
        if self.steps % (self.length // self.block):
            raise UserError(
                f"--steps: {self.steps} is not a multiple of the {self.length // self.block} blocks"
                " of --length / --block-length"
            )

    @property
    def block(self) -> int:
        return self.length if self.block_length is None else self.block_length


@dataclass(frozen=True)
class Specials:
    """Ids that a sampler must know.

    Attributes:
        mask_id: of [MASK].
        eos_id: of the end of a text.
        vocab_size: ids of the tokenizer; rows past them are padding and are never written, and
            neither is [MASK].
    """

    mask_id: int
    eos_id: int
    vocab_size: int


@dataclass(frozen=True)
class Event:
    """One step of the denoising.

    Attributes:
        step, steps: number of this step from 1, and of all.
        tokens: ids after it, int64 [b, s].
        committed: what this step filled in, bool [b, s].
        confidence: probability of the best token at each mask before the step, float64 [b, s]; 0
            elsewhere.
    """

    step: int
    steps: int
    tokens: torch.Tensor
    committed: torch.Tensor
    confidence: torch.Tensor


OnStep = Callable[[Event], None]


def generate(
    model: Model,
    prompt: torch.Tensor,
    specials: Specials,
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Continue prompts of equal length.

    Args:
        model: ids [b, s] -> logits [b, s, rows], bidirectional.
        prompt: ids int64 [b, p].
        specials: see Specials.
        options: see SamplingOptions.
        on_step: called after every step.

    Returns:
        ids int64 [b, options.length], EOS and what follows it included.
    """
    rows, start = prompt.shape
    tokens = torch.cat(
        [
            prompt,
            torch.full(
                (rows, options.length), specials.mask_id, dtype=prompt.dtype, device=prompt.device
            ),
        ],
        dim=1,
    )
    given = torch.arange(tokens.shape[1], device=prompt.device) < start
    blocks = []
    for first in range(start, tokens.shape[1], options.block):
        block = torch.zeros_like(tokens, dtype=torch.bool)
        block[:, first : first + options.block] = True
        blocks.append(block)
    return _denoise(model, tokens, given.expand_as(tokens), blocks, specials, options, on_step)[
        :, start:
    ]


def infill(
    model: Model,
    tokens: torch.Tensor,
    specials: Specials,
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Fill every [MASK] of given rows, all gaps at once; `options.length` and `block_length` are
    not used.

    Args:
        model, specials, options, on_step: see `generate`.
        tokens: ids int64 [b, s], [MASK] where to write.

    Returns:
        ids int64 [b, s].

    Raises:
        UserError: nothing to fill.
    """
    gaps = tokens == specials.mask_id
    if not gaps.any():
        raise UserError("the text has no [MASK] to fill")
    return _denoise(model, tokens.clone(), ~gaps, [gaps], specials, options, on_step)


def quotas(masks: int, steps: int) -> list[int]:
    """How many of `masks` to fill in each of `steps`: as even as it goes, the remainder over the
    first steps.
    """
    return [masks // steps + (step < masks % steps) for step in range(steps)]


@torch.no_grad()
def _denoise(
    model: Model,
    tokens: torch.Tensor,
    given: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    specials: Specials,
    options: SamplingOptions,
    on_step: OnStep | None,
) -> torch.Tensor:
    """Fill the masks block by block; `given` marks what guidance hides in its
    unconditional pass.
    """
    steps = options.steps // len(blocks)
    number = 0
    for block in blocks:
        plan = [
            quotas(int(count), steps)
            for count in ((tokens == specials.mask_id) & block).sum(1).tolist()
        ]
        for step in range(steps):
            number += 1
            counts = [row[step] for row in plan]
            if not any(counts):
                continue
            masks = tokens == specials.mask_id
            logits = _guided(model, tokens, given, specials.mask_id, options.cfg)
            chosen, confidence = _predict(logits, block & masks, specials, options, number)
            commit = _most(
                torch.where(block & masks, _rank(confidence, options, number), -torch.inf), counts
            )
            tokens = torch.where(commit, chosen, tokens)
            if on_step is not None:
                on_step(
                    Event(
                        number, options.steps, tokens, commit, torch.where(masks, confidence, 0.0)
                    )
                )
    return tokens


def _guided(
    model: Model, tokens: torch.Tensor, given: torch.Tensor, mask_id: int, strength: float
) -> torch.Tensor:
    """Logits float64 [b, s, rows], with guidance."""
    if not strength:
        return model(tokens).double()
    hidden = torch.where(given, mask_id, tokens)
    conditional, unconditional = model(torch.cat([tokens, hidden])).double().chunk(2)
    return unconditional + (strength + 1) * (conditional - unconditional)


def _predict(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    specials: Specials,
    options: SamplingOptions,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for every position, with the temperature's noise where `wanted`, and its probability
    without, float64 [b, s].

    [MASK] and padding rows are never chosen; in the softmax they stay, as in training.
    """
    possible = logits[..., : specials.vocab_size].clone()
    possible[..., specials.mask_id] = -torch.inf
    if options.temperature:
        for row, position in wanted.nonzero().tolist():
            draws = uniforms(
                stream(options.seed, "sample/gumbel", row, step, position), specials.vocab_size
            )
            noise = torch.from_numpy(draws).clamp_(min=2.0**-54).to(logits.device)
            possible[row, position] -= options.temperature * torch.log(-torch.log(noise))
    chosen = possible.argmax(-1)
    return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]


def _rank(confidence: torch.Tensor, options: SamplingOptions, step: int) -> torch.Tensor:
    """What decides which predictions are kept, the highest first."""
    if options.remasking == "low_confidence":
        return confidence
    rows = [
        uniforms(stream(options.seed, "sample/remask", row, step), confidence.shape[1])
        for row in range(len(confidence))
    ]
    return torch.from_numpy(np.stack(rows)).to(confidence.device)


def _most(values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The `counts[row]` largest values of each row, bool; ties go to the earlier position."""
    order = values.argsort(dim=1, descending=True, stable=True)
    keep = (
        torch.arange(values.shape[1], device=values.device)
        < torch.tensor(counts, device=values.device)[:, None]
    )
    return torch.zeros_like(keep).scatter(1, order, keep)


def cut_at_end(ids: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """What comes before the first token that ends a text: what follows is padding, as the model was
    trained to write.
    """
    return [int(i) for i in itertools.takewhile(lambda i: i not in end_ids, ids)]

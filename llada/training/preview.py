"""What a training step reads and masks, as text, without a model (`llada data step`)."""

from __future__ import annotations

from pathlib import Path

from llada.config import RunConfig
from llada.data.manifest import TRAIN
from llada.data.step_plan import StepPlan
from llada.data.tasks import open_data
from llada.data.training_data import TrainingData
from llada.errors import UserError
from llada.objectives import TOKENS
from llada.tokenizer import Tokenizer

_MAX_TOKENS = 48
"""Tokens of a segment that are shown."""
_MASKED = "▁"


def describe_step(config: RunConfig, step: int, samples: int) -> str:
    """Describe corpora, windows or conversations, noise groups, t and masks of a training step.

    Args:
        config: the run's config.
        step: 1-based.
        samples: how many of the step's samples are shown in full.

    Raises:
        UserError: the step is past the run's last one.
    """
    if step > config.train.steps:
        raise UserError(f"step: {step} is past the run's last, train.steps = {config.train.steps}")
    data = open_data(config)
    plan = data.plan(step - 1)
    tokenizer = data.tokenizer()
    t = plan.groups.t
    expected = data.objective.work(plan.attended, plan.groups).terms[TOKENS]
    lines = [
        f"step {step}: samples {plan.samples[0]} to {plan.samples[-1]}, {len(t)} noise groups,"
        f" {plan.tokens:,} tokens",
        f"objective: {data.objective.summary}",
    ]
    # Without noise there is no t.
    if not data.objective.is_exact:
        lines.append(f"t: smallest {t.min():.4f}, mean {t.mean():.4f}, largest {t.max():.4f}")
    lines.append(
        f"terms of the loss expected: {expected:,.0f} for {plan.groups.sizes.sum():,} tokens"
    )
    for i, source in enumerate(data.mixture.sources):
        lines.append(f"corpus {i}: {source.name}: {(plan.corpora == i).sum()} samples")
    for offset in range(min(samples, len(plan.samples))):
        lines += _describe_sample(data, plan, offset, tokenizer)
    return "\n".join(lines)


def _describe_sample(
    data: TrainingData, plan: StepPlan, offset: int, tokenizer: Tokenizer
) -> list[str]:
    """Describe one sample of a step: a line for it and one for each noise group."""
    row = data.row(TRAIN, plan, offset)
    masked: set[int] = set()
    if not data.objective.is_exact:
        masked.update(data.objective.corrupt(row, data.key).terms[TOKENS].positions.tolist())
    corpus = int(plan.corpora[offset])
    name = Path(data.mixture.sources[corpus].name).name
    lines = [
        f"sample {plan.samples[offset]}: corpus {corpus} ({name}),"
        f" {data.describe_example(corpus, int(plan.examples[offset]))}"
    ]
    for (start, end), t in zip(row.groups.spans.tolist(), row.groups.t.tolist(), strict=True):
        num_masked = len(masked.intersection(range(start, end)))
        text = ""
        for position in range(start, min(end, start + _MAX_TOKENS)):
            if position in masked:
                text += _MASKED
            else:
                text += tokenizer.decode([int(row.tokens[position])])
        one_line = " ".join(text.split())
        if data.objective.is_exact:
            lines.append(f"  [{start}, {end}) predicted: {one_line}")
        else:
            lines.append(f"  [{start}, {end}) t = {t:.4f}, {num_masked} masked: {one_line}")
    return lines

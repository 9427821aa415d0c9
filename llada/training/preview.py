"""What a training step reads and masks, as text, without a model."""

from __future__ import annotations

from pathlib import Path

from llada.config import RunConfig
from llada.data.manifest import TRAIN
from llada.data.step_plan import StepPlan
from llada.data.tasks import open_data
from llada.data.training_data import TrainingData
from llada.errors import UserError
from llada.tokenizer import Tokenizer

_SHOWN_TOKENS = 48


def describe_step(config: RunConfig, step: int, samples: int) -> str:
    """Corpora, windows or conversations, segments, t and masks of training step `step` (1-based),
    `samples` of them in full.
    """
    if step > config.train.steps:
        raise UserError(f"step: {step} is past the run's last, train.steps = {config.train.steps}")
    data = open_data(config)
    plan = data.plan(step - 1)
    tokenizer = data.tokenizer()
    own = plan.maskable > 0
    t, maskable = plan.t[own], plan.maskable[own]
    expected = data.objective.expected_predictions(maskable, t)
    lines = [
        (
            f"step {step}: samples {plan.samples[0]} to {plan.samples[-1]}, {own.sum()} segments,"
            f" {plan.tokens:,} tokens"
        ),
        (
            f"t: smallest {t.min():.4f}, mean {t.mean():.4f}, largest {t.max():.4f}"
            f" ({config.objective.timesteps})"
        ),
        (
            f"masked tokens expected: {expected:,.0f} of {maskable.sum():,}"
            f" ({config.objective.masking})"
        ),
    ]
    for i, source in enumerate(data.mixture.sources):
        lines.append(f"corpus {i}: {source.name}: {(plan.corpora == i).sum()} samples")
    for offset in range(min(samples, len(plan.samples))):
        lines.append(_describe_sample(data, plan, offset, tokenizer))
    return "\n".join(lines)


def _describe_sample(data: TrainingData, plan: StepPlan, offset: int, tokenizer: Tokenizer) -> str:
    window = data.window(TRAIN, plan, offset)
    masked = set(data.objective.corrupt(window).predicted.tolist())
    source = int(plan.corpora[offset])
    name = Path(data.mixture.sources[source].name).name
    lines = [
        f"sample {window.sample}: corpus {source} ({name}),"
        f" {data.describe_instance(source, int(plan.instances[offset]))}"
    ]
    for start, end, t, scale in window.segments():
        if not scale:
            continue
        count = sum(1 for position in range(start, end) if position in masked)
        text = "".join(
            "▁" if position in masked else tokenizer.decode([int(window.tokens[position])])
            for position in range(start, min(end, start + _SHOWN_TOKENS))
        )
        lines.append(f"  [{start}, {end}) t = {t:.4f}, {count} masked: {' '.join(text.split())}")
    return "\n".join(lines)

"""What a training step reads and masks, as text, without a model."""

from __future__ import annotations

from pathlib import Path

from llada.config import RunConfig
from llada.data.pretrain import TRAIN, Plan, PretrainData
from llada.errors import UserError
from llada.tokenizer import Tokenizer


def describe_step(config: RunConfig, step: int, samples: int) -> str:
    """Corpora, windows, documents, segments, t and masks of training step `step` (1-based), `samples` of them in full."""
    if step > config.train.steps:
        raise UserError(f"step: {step} is past the run's last, train.steps = {config.train.steps}")
    data = PretrainData(config)
    plan = data.plan(step - 1)
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    expected = data.objective.expected_predictions(plan.lengths, plan.t)
    lines = [
        f"step {step}: samples {plan.samples[0]} to {plan.samples[-1]}, {len(plan.lengths)} segments, {int(plan.normaliser):,} tokens",
        f"t: smallest {plan.t.min():.4f}, mean {plan.t.mean():.4f}, largest {plan.t.max():.4f} ({config.objective.timesteps})",
        f"masked tokens expected: {expected:,.0f} of {int(plan.normaliser):,} ({config.objective.masking})",
    ]
    for i, source in enumerate(data.mixture.sources):
        lines.append(f"corpus {i}: {source.name}: {(plan.sources == i).sum()} samples")
    for offset in range(min(samples, len(plan.samples))):
        lines.append(_describe_sample(data, plan, offset, tokenizer))
    return "\n".join(lines)


def _describe_sample(data: PretrainData, plan: Plan, offset: int, tokenizer: Tokenizer) -> str:
    window = data.window(TRAIN, plan, offset)
    corrupted = data.objective.corrupt(window)
    source = int(plan.sources[offset])
    documents = len(data.readers[TRAIN][source].document_starts(int(plan.windows[offset]))) + 1
    name = Path(data.mixture.sources[source].name).name
    lines = [f"sample {window.sample}: corpus {source} ({name}), window {plan.windows[offset]}, {documents} documents"]
    masked = set(corrupted.predicted.tolist())
    for start, end, t in zip(window.bounds[:-1], window.bounds[1:], window.t, strict=True):
        count = sum(1 for position in range(start, end) if position in masked)
        text = "".join(
            "▁" if position in masked else tokenizer.decode([int(window.tokens[position])])
            for position in range(start, min(end, start + 48))
        )
        lines.append(f"  [{start}, {end}) t = {t:.4f}, {count} masked: {' '.join(text.split())}")
    return "\n".join(lines)

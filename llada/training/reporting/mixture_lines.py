"""What the mixture of a run amounts to, as lines for the console at its start."""

from __future__ import annotations

from llada.arithmetic import ceil_div
from llada.data.training_data import TrainingData


def weight_changes(data: TrainingData) -> list[str]:
    """Return a line for every change of the weights that the mixture reaches."""
    config = data.config
    mixture = data.mixture
    lines = []
    for block in mixture.changes:
        first = block * mixture.block
        if mixture.num_samples is not None and first >= mixture.num_samples:
            continue
        quotas = mixture.stage_of(block).quotas
        shares = ", ".join(
            f"{100 * quota / quotas.sum():.4g} % {source.name}"
            for quota, source in zip(quotas, mixture.sources, strict=True)
        )
        step = first // config.batch.global_ + 1
        tokens = first * config.data.sequence_length
        lines.append(f"weights change in step {step:,}, after {tokens:,} tokens: {shares}")
    return lines


def corpus_usage(data: TrainingData) -> list[str]:
    """Return a line for every corpus: its share of the run, how often it is read, and where its cap
    ends that.
    """
    config = data.config
    mixture = data.mixture
    samples = config.train.steps * config.batch.global_
    lines = []
    for i, count in enumerate(mixture.consumed(samples).tolist()):
        source = mixture.sources[i]
        line = (
            f"{source.name}: {100 * count / samples:.4g} % of the run's samples,"
            f" {count / source.num_instances:.3g} passes"
        )
        end = mixture.exhausted_after(i)
        if end is not None and end <= samples:
            step = ceil_div(end, config.batch.global_)
            max_epochs = config.data.mixture[i].max_epochs
            line += f"; its cap (max_epochs {max_epochs:g}) ends it by step {step:,}"
            # Rows of conversations are filled up: their tokens are not known from the index.
            if config.task == "pretrain":
                line += f", after {end * config.data.sequence_length:,} tokens"
        lines.append(line)
    return lines

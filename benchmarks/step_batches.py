"""Steps of random tokens with the real distribution of the noise, for benchmarks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llada.config import RunConfig
from llada.model.flops import StepFlops, step_flops
from llada.noise import random_lengths, timesteps
from llada.objectives import (
    TOKENS,
    Batch,
    Key,
    MaskedDiffusion,
    NoiseGroups,
    Row,
    collate,
)


def make_batches(config: RunConfig, step: int, whole_rows: bool) -> tuple[list[Batch], StepFlops]:
    """A step of random tokens with the real distribution of t, masks and random lengths.

    Args:
        config: The run.
        step: Number of the step, part of the key of the noise.
        whole_rows: Make no random lengths, which the plain loops do not support.
    """
    rng = np.random.default_rng(step)
    count = config.batch.global_
    length = config.data.sequence_length
    samples = step * count + np.arange(count)
    if whole_rows:
        cuts = np.full(count, length)
    else:
        cuts = random_lengths(0, samples, length, config.data.random_length_probability)
    # Boundaries of the segments of each row: [0, length], or with a cut [0, cut, length]
    bounds = [np.unique([0, cut, length]) for cut in cuts]
    # Each segment is a noise group. Groups are numbered over the whole step; row i has those from
    # firsts[i] to firsts[i + 1].
    counts = [len(row) - 1 for row in bounds]
    firsts = np.concatenate([[0], np.cumsum(counts)])
    spans = np.concatenate([np.stack([row[:-1], row[1:]], axis=1) for row in bounds])
    lengths = spans[:, 1] - spans[:, 0]
    t = timesteps(0, step, lengths, "stratified")
    groups = NoiseGroups.of_whole_samples(np.repeat(samples, counts), spans, t)
    mask_id = config.model.vocab_size - 1
    objective = MaskedDiffusion(mask_id)
    corrupted = []
    for i in range(count):
        tokens = rng.integers(0, mask_id, length)
        row = Row(tokens, bounds[i], groups[firsts[i] : firsts[i + 1]])
        corrupted.append(objective.corrupt(row, Key(seed=0)))
    micro = config.batch.micro
    batches = [
        collate(corrupted[i : i + micro], float(count * length)) for i in range(0, count, micro)
    ]
    predicted = sum(len(row.terms[TOKENS].positions) for row in corrupted)
    work = replace(objective.work(lengths, groups), terms={TOKENS: predicted})
    return batches, step_flops(config.model, work, length)

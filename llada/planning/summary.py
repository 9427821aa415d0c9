"""Parameters, FLOPs, memory and disk of a run, before anything is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from llada.arithmetic import ceil_div
from llada.config import RunConfig
from llada.config.objective_sections import ObjectiveSection
from llada.config.sections import CheckpointSection
from llada.formatting import readable_size
from llada.model.flops import step_flops
from llada.model.weights import num_parameters
from llada.objectives import TOKENS, NoiseGroups, Work
from llada.objectives.registry import SpecialIds, make_objective

_TIMES = 1000
"""Times over which the work of a row is averaged."""

# Bytes per parameter, by precision. An fp32 value takes 4 bytes, a bf16 value 2.

_CHECKPOINT_BYTES = {"fp32": 4 + 4 + 2 * 4, "bf16": 2 + 4 + 2 * 4}
"""In a checkpoint: weights, fp32 master weights (in fp32 a copy) and two Adam moments."""
_REPLICA_BYTES = {"fp32": 4 + 4, "bf16": 2 + 4}
"""On the ranks of each replica: the weight and its fp32 gradient."""
_SHARDED_BYTES = {"fp32": 2 * 4, "bf16": 4 + 2 * 4}
"""Divided over all replicas: two Adam moments; in bf16 runs the fp32 master weight as well."""


@dataclass(frozen=True)
class CheckpointVolume:
    """Disk that the checkpoints of a whole run take.

    Attributes:
        bytes_each: size of one checkpoint, bytes.
        kept: number of checkpoints at the end of the run.
    """

    bytes_each: int
    kept: int

    def __str__(self) -> str:
        return (
            f"{readable_size(self.bytes_each)} each, {self.kept:,} kept at the end,"
            f" {readable_size(self.bytes_each * self.kept)} in total"
        )


def checkpoint_volume(config: RunConfig) -> CheckpointVolume:
    """Size and number of the checkpoints that a run keeps until its end."""
    return CheckpointVolume(
        bytes_each=num_parameters(config.model) * _CHECKPOINT_BYTES[config.precision],
        kept=_num_kept(config.checkpoint, config.train.steps),
    )


def _num_kept(section: CheckpointSection, steps: int) -> int:
    """Number of checkpoints at the end of a run of `steps` steps.

    Example: 1,050 steps with every = 100 write 11 checkpoints, at 100, 200, ..., 1,000 and 1,050.
    keep_last = 3 keeps those at 900, 1,000 and 1,050. Of the 8 older ones, keep_every = 400 exempts
    those at 400 and 800: 5 remain.
    """
    written = ceil_div(steps, section.every)  # the last step is always saved
    if section.keep_last is None or written <= section.keep_last:
        return written
    if section.keep_every is None:
        return section.keep_last
    # Only the newest checkpoint can lie off the grid of `every`, so all older ones are on it.
    last_old_step = (written - section.keep_last) * section.every
    num_exempt = last_old_step // math.lcm(section.every, section.keep_every)
    return section.keep_last + num_exempt


def mean_work_of_a_row(section: ObjectiveSection, length: int) -> Work:
    """Return the work of a row that is one attention segment, on average over t."""
    objective = make_objective(section, SpecialIds(mask=0, start=0))
    t = (np.arange(_TIMES) + 0.5) / _TIMES
    spans = np.tile([0, length], (_TIMES, 1))
    groups = NoiseGroups.of_whole_samples(np.zeros(_TIMES, dtype=np.int64), spans, t)
    work = objective.work(np.array([length]), groups)
    terms = {head: count / _TIMES for head, count in work.terms.items()}
    return replace(work, terms=terms)


def summarize(config: RunConfig) -> list[str]:
    """The lines that `llada config` prints below the settings."""
    model = config.model
    length = config.data.sequence_length
    parameters = num_parameters(model)
    without_embedding = num_parameters(model, embedding=False)

    one_row = mean_work_of_a_row(config.objective, length)
    head_share = one_row.terms[TOKENS] / length
    row_flops = step_flops(model, one_row, one_row.inputs).actual
    flops_per_step = row_flops * config.batch.global_

    tokens_per_step = config.tokens_per_step
    at_most = ""
    if config.task == "sft":  # rows of conversations are shorter than the sequence length
        at_most = " at most"

    limits_hint = ""
    if config.checkpoint.keep_last is None:
        limits_hint = "; checkpoint.keep_last and keep_every limit them"

    return [
        f"parameters: {parameters:,}, {without_embedding:,} without embedding and head",
        (
            f"FLOPs: {row_flops / length:.3g} per token, {flops_per_step:.3g} per step,"
            f" {flops_per_step * config.train.steps:.3g} in total (forward and backward, whole"
            f" rows, head on {head_share:.0%} of the positions)"
        ),
        (
            f"tokens: {tokens_per_step:,} per step,"
            f" {tokens_per_step * config.train.steps:,} in total{at_most}"
        ),
        (
            f"state: {readable_size(parameters * _REPLICA_BYTES[config.precision])} of weights and"
            " gradients on each replica,"
            f" {readable_size(parameters * _SHARDED_BYTES[config.precision])} of optimizer state"
            " divided over all"
        ),
        (
            f"checkpoints: {checkpoint_volume(config)} (every {config.checkpoint.every:,}"
            f" steps){limits_hint}"
        ),
    ]

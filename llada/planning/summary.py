"""What a config amounts to, before anything is opened: parameters, FLOPs, bytes of state,
checkpoints on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llada.config import RunConfig
from llada.files import readable_size
from llada.model.flops import step_flops
from llada.model.weights import num_parameters

_CHECKPOINT_BYTES = {"fp32": 12, "bf16": 14}
"""Of a parameter in a checkpoint: fp32 weights and two moments, and of bf16 runs the bf16 weights
too.
"""
_REPLICA_BYTES = {"fp32": 8, "bf16": 6}
"""Of a parameter on the ranks of every replica: the weight and its fp32 gradient."""
_SHARED_BYTES = {"fp32": 8, "bf16": 12}
"""Of a parameter over all replicas together: two moments, and of bf16 runs the fp32 master weight.
"""


@dataclass(frozen=True)
class CheckpointVolume:
    """The checkpoints of a whole run.

    Attributes:
        bytes_each: size of one, bytes.
        kept: how many are there at the end.
    """

    bytes_each: int
    kept: int

    def __str__(self) -> str:
        return (
            f"{readable_size(self.bytes_each)} each, {self.kept:,} kept at the end,"
            f" {readable_size(self.bytes_each * self.kept)} in all"
        )


def checkpoint_volume(config: RunConfig) -> CheckpointVolume:
    """Size and number of the checkpoints that a run leaves, by checkpoint.every, keep_last and
    keep_every.
    """
    section, steps = config.checkpoint, config.train.steps
    saved = -(-steps // section.every)  # one more at the end of the run
    kept = saved
    if section.keep_last is not None and saved > section.keep_last:
        last_old = (saved - section.keep_last) * section.every
        exempt = (
            0
            if section.keep_every is None
            else last_old // math.lcm(section.every, section.keep_every)
        )
        kept = section.keep_last + exempt
    return CheckpointVolume(
        num_parameters(config.model) * _CHECKPOINT_BYTES[config.precision], kept
    )


def describe(config: RunConfig) -> list[str]:
    """Lines for `llada config`."""
    model, length = config.model, config.data.sequence_length
    parameters, inner = num_parameters(model), num_parameters(model, embedding=False)
    flops = step_flops(model, [length], length / 2, length).actual
    replica, shared = (
        parameters * _REPLICA_BYTES[config.precision],
        parameters * _SHARED_BYTES[config.precision],
    )
    volume, section = checkpoint_volume(config), config.checkpoint
    unlimited = (
        "" if section.keep_last is not None else "; checkpoint.keep_last and keep_every limit them"
    )
    return [
        f"parameters: {parameters:,}, of them {inner:,} without embedding and head",
        (
            f"FLOPs: {flops / length:.3g} a token, {flops * config.batch.global_:.3g} a step,"
            f" {flops * config.batch.global_ * config.train.steps:.3g} in all (forward and"
            " backward, whole rows, head on half of the positions)"
        ),
        f"tokens: {config.tokens_per_step:,} a step,"
        f" {config.tokens_per_step * config.train.steps:,} in all"
        + (" at most" if config.task == "sft" else ""),
        (
            f"state: {readable_size(replica)} of weights and gradients on each replica, "
            f"{readable_size(shared)} of optimizer state divided over all"
        ),
        f"checkpoints: {volume} (every {section.every:,} steps){unlimited}",
    ]

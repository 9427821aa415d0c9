"""The weights of a checkpoint by canonical name, from the names and rectangles that it stores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llada.checkpoint.reading import MASTER_PREFIX, StoredTensors
from llada.config.sections import ModelSection
from llada.errors import UserError
from llada.model import weights

Shapes = Mapping[str, tuple[int, ...]]

_LAYER_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
}
"""Parameter of a layer -> its name in a checkpoint, where all layers are stacked along axis 0."""


def stored_name(parameter: str) -> tuple[str, int | None]:
    """Return a Megatron parameter's name in a checkpoint, and its layer there.

    "decoder.layers.3.mlp.linear_fc2.weight" is layer 3 of "decoder.layers.mlp.linear_fc2.weight";
    a parameter outside the layers has its own name and no layer.
    """
    if not parameter.startswith("decoder.layers."):
        return parameter, None
    number, part = parameter.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{_LAYER_NAMES[part]}", int(number)


@dataclass(frozen=True)
class _Location:
    """Where a part of a canonical tensor is stored.

    Attributes:
        stored: name of the stored tensor.
        layer: index along its axis 0, where layers are stacked; None: they are not.
        rectangle: which rows of the canonical tensor, and where in the stored one.
    """

    stored: str
    layer: int | None
    rectangle: weights.WeightRectangle


class CheckpointWeights:
    """The canonical tensors of a checkpoint; implements `llada.model.weights.Weights`.

    Args:
        stored: the checkpoint's model folder.
        model: shape of the model.
        masters: read the fp32 masters of the optimizer instead of the weights that the model
            computes with.

    Raises:
        UserError: tensors are missing, unexpected or misshapen; all are named.
    """

    def __init__(self, stored: StoredTensors, model: ModelSection, masters: bool = False) -> None:
        self._stored = stored
        self.shapes: Shapes = weights.canonical_shapes(model)
        self._locations: dict[str, list[_Location]] = defaultdict(list)
        prefix = MASTER_PREFIX if masters else ""
        expected: dict[str, tuple[int, ...]] = {}
        for parameter in weights.parameter_names(model):
            name, layer = stored_name(parameter)
            shape = weights.parameter_shape(model, parameter)
            expected[prefix + name] = shape if layer is None else (model.num_layers, *shape)
            # By rows, so that those of one canonical tensor are concatenated in order: the fused
            # QKV of Megatron holds its query heads in several rectangles.
            rectangles = sorted(weights.rectangles(model, parameter), key=lambda each: each.rows)
            for rectangle in rectangles:
                self._locations[rectangle.name].append(_Location(prefix + name, layer, rectangle))
        self._check(expected, masters)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a canonical tensor is stored in."""
        return self._stored.dtype(self._locations[name][0].stored)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read rows `first` to `last` (exclusive) of a canonical tensor."""
        parts = []
        for location in self._locations[name]:
            rectangle = location.rectangle
            start = max(first, rectangle.rows[0])
            stop = min(last, rectangle.rows[1])
            if start < stop:
                local = rectangle.local_row + start - rectangle.rows[0]
                parts.append(
                    self._stored.rows(location.stored, local, local + stop - start, location.layer)
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check(self, expected: Shapes, masters: bool) -> None:
        names = self._stored.names()
        if masters:
            names = [name for name in names if name.startswith(MASTER_PREFIX)]
        else:
            names = [name for name in names if not name.startswith("optimizer.")]
        problems = shape_differences({name: self._stored.shape(name) for name in names}, expected)
        if problems:
            raise UserError(
                f"checkpoint: {self._stored.folder} is not of its config's model: {problems}"
            )


def shape_differences(actual: Shapes, expected: Shapes) -> str:
    """Return one line that names every missing, unexpected and misshapen tensor, or ""."""
    missing = sorted(expected.keys() - actual.keys())
    unexpected = sorted(actual.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(actual[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in actual and actual[name] != shape
    ]
    titled = {"missing: ": missing, "unexpected: ": unexpected, "misshapen: ": misshapen}
    return "; ".join(title + ", ".join(names) for title, names in titled.items() if names)


def all_rows(source: weights.Weights, name: str) -> torch.Tensor:
    """Read a whole canonical tensor."""
    return source.rows(name, 0, source.shapes[name][0])

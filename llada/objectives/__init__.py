"""Objectives: pure functions from clean tokens and keys to a Batch, without ranks or a model.

Four things are kept apart:

- What attends together (`Layout`) is not what shares a t (`NoiseGroups`), and neither is what keys
  the noise (a group's sample and origin).
- A term of the loss (`Terms`) is not a position of the row.
- Corruption runs on the CPU and follows from keys; the loss runs on the device and follows from
  logits and terms. Both belong to the objective; the engine knows neither.
- The bound that validation measures is an objective too (`Objective.bound`).
"""

from llada.objectives.batch import Batch, BatchTerms, collate
from llada.objectives.corrupted import TOKENS, Corrupted, Terms
from llada.objectives.layout import Layout
from llada.objectives.masked import MaskedDiffusion
from llada.objectives.objective import Objective, Work
from llada.objectives.row import Key, NoiseGroups, Row

__all__ = [
    "TOKENS",
    "Batch",
    "BatchTerms",
    "Corrupted",
    "Key",
    "Layout",
    "MaskedDiffusion",
    "NoiseGroups",
    "Objective",
    "Row",
    "Terms",
    "Work",
    "collate",
]

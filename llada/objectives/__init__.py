"""Objectives: pure functions from clean tokens and keys to a Batch, without ranks or a model."""

from llada.objectives.base import Batch, Objective, Segments, Window, collate
from llada.objectives.masked import MaskedDiffusion

__all__ = ["Batch", "MaskedDiffusion", "Objective", "Segments", "Window", "collate"]

"""Shards, mixtures, plans and batches. Knows no model and no ranks."""

from llada.config import RunConfig
from llada.data.base import TrainingData
from llada.data.pretrain import PretrainData
from llada.data.sft import SFTData

__all__ = ["PretrainData", "SFTData", "TrainingData", "open_data"]


def open_data(config: RunConfig, verify: bool = False) -> TrainingData:
    """The data of a run's task; see TrainingData."""
    return {"pretrain": PretrainData, "sft": SFTData}[config.task](config, verify)

"""The data of a run, by its task. (Not in the package itself: shards are read and written without
torch.)
"""

from llada.config import RunConfig
from llada.data.pretrain import PretrainData
from llada.data.sft import SFTData
from llada.data.training_data import TrainingData


def open_data(config: RunConfig, verify: bool = False) -> TrainingData:
    """The data of a run's task; see TrainingData."""
    return {"pretrain": PretrainData, "sft": SFTData}[config.task](config, verify)

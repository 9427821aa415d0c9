"""Opens the data of a run by its task.

This is not in the package itself, since shards are read and written without torch.
"""

from llada.config import RunConfig
from llada.data.pretrain import PretrainData
from llada.data.sft import SFTData
from llada.data.training_data import TrainingData

_DATA = {"pretrain": PretrainData, "sft": SFTData}


def open_data(config: RunConfig, verify: bool = False) -> TrainingData:
    """Open the data of a run's task; see TrainingData for the arguments and errors."""
    return _DATA[config.task](config, verify)

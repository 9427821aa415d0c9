"""The config of a run: its sections, their checks, and how it is read and written.

`llada.training.configure.load_config` reads a config as the commands do: it also completes the
model section from the weights that a run starts from.
"""

from llada.config.loading import (
    PROVENANCE,
    build_config,
    dump_config,
    one_line,
    read_config,
    read_yaml,
    to_yaml,
)
from llada.config.overrides import apply_override
from llada.config.run import SHUFFLE_BLOCK, RunConfig, Task

__all__ = [
    "PROVENANCE",
    "SHUFFLE_BLOCK",
    "RunConfig",
    "Task",
    "apply_override",
    "build_config",
    "dump_config",
    "one_line",
    "read_config",
    "read_yaml",
    "to_yaml",
]

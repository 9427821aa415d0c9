"""The config of a run: its sections, their rules, and how it is read and written.

The commands read a config with `llada.training.configure.load_config`, which also completes the
model section from the weights that a run starts from.
"""

from llada.config.loading import (
    PROVENANCE,
    build_config,
    dump_config,
    first_mistake,
    read_config,
    read_yaml,
    to_yaml,
)
from llada.config.overrides import RawConfig, apply_override
from llada.config.run import SHUFFLE_BLOCK, RunConfig, Task

__all__ = [
    "PROVENANCE",
    "SHUFFLE_BLOCK",
    "RawConfig",
    "RunConfig",
    "Task",
    "apply_override",
    "build_config",
    "dump_config",
    "first_mistake",
    "read_config",
    "read_yaml",
    "to_yaml",
]

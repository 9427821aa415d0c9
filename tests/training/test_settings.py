"""What a resumed run may change, compared with the state of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llada.checkpoint.format import CheckpointState
from llada.config import build_config, dump_config
from llada.training.starting.settings import find_changes
from tests.workplace import CONFIG

DATA: Any = SimpleNamespace(fingerprint="the data")


def changes(stored: dict[str, Any], **sections: Any) -> list[str]:
    """Compare a run with a checkpoint that has the `stored` config."""
    state = CheckpointState(0, 0, 0, DATA.fingerprint, stored, {}, [], [])
    config = build_config({**CONFIG, **sections})
    return find_changes(config, DATA, Path("checkpoint"), state, threads=None)


@pytest.mark.parametrize("section, key", [("optimizer", "eps"), ("objective", "eps")])
def test_a_setting_that_is_newer_than_the_checkpoint_has_its_default(
    section: str, key: str
) -> None:
    """So a run that was started with an older version can go on with this one."""
    stored = dump_config(build_config(CONFIG))
    del stored[section][key]
    assert changes(stored) == []
    [change] = changes(stored, **{section: {key: 0.01}})
    assert change.startswith(f"{section}.{key}: ") and change.endswith(" -> 0.01")

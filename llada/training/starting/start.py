"""What a run starts from, once that is decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llada.engine.base import Engine
from llada.hf.folder import is_folder, open_folder
from llada.training.guard import Applied
from llada.types import JsonObject


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        folder: a checkpoint or a Hugging Face folder; None: random weights.
        step, tokens: done already.
        optimizer: whether the checkpoint's optimizer state is used.
        lineage: where the weights came from, oldest first.
        notes: lines for the console.
        superseded: later checkpoints that a rewind leaves behind.
        recent, validation: read from the checkpoint, see `CheckpointState`.
    """

    folder: Path | None = None
    step: int = 0
    tokens: int = 0
    optimizer: bool = False
    lineage: list[JsonObject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    superseded: list[Path] = field(default_factory=list)
    recent: list[Applied] = field(default_factory=list)
    validation: JsonObject | None = None

    def load(self, engine: Engine) -> None:
        """Give the engine what the run starts from; collective."""
        if self.folder is None:
            return
        if is_folder(self.folder):
            engine.load_canonical(open_folder(self.folder, setting="run.init_from").weights)
        else:
            engine.load(self.folder / "model", optimizer=self.optimizer)

"""What a finished unit leaves in the folder of an unfinished preparation.

units/00042.json            its result; the unit is done when this file exists
parts/train-00042-000.bin   its shards, which become shards of the corpus at the end
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.types import JsonObject
from llada.data.manifest import ShardEntry
from llada.files import write_atomically

RESULTS = "units"
PARTS = "parts"


class RangeCount(NamedTuple):
    """What a range of a source gave.

    Attributes:
        source: index of the source in the plan.
        documents: how many documents it gave.
        left_out: what was left out of it, by reason; empty unless it gave no document.
    """

    source: int
    documents: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class UnitResult:
    """The outcome of one unit.

    Attributes:
        shards: its shards, in the order they were written.
        ranges: one entry for each of its input ranges, in order.
        skipped: documents and lines left out, by reason.
        noted: documents counted and kept, by reason.
        listed: entries of the list of what is left out.
        encoder: name of the encoder.
    """

    shards: list[ShardEntry]
    ranges: list[RangeCount]
    skipped: Mapping[str, int]
    noted: Mapping[str, int]
    listed: list[JsonObject]
    encoder: str

    def save(self, folder: Path, unit: int) -> None:
        """Write the result, which marks the unit as done."""
        content = {
            "shards": [asdict(shard) for shard in self.shards],
            "given": self.ranges,
            "skipped": self.skipped,
            "noted": self.noted,
            "listed": self.listed,
            "encoder": self.encoder,
        }
        write_atomically(result_path(folder, unit), json.dumps(content))

    @classmethod
    def load(cls, folder: Path, unit: int) -> UnitResult:
        content = json.loads(result_path(folder, unit).read_bytes())
        return cls(
            shards=[ShardEntry(**shard) for shard in content["shards"]],
            ranges=[RangeCount(*values) for values in content["given"]],
            skipped=content["skipped"],
            noted=content["noted"],
            listed=content["listed"],
            encoder=content["encoder"],
        )


def result_path(folder: Path, unit: int) -> Path:
    """Return the path of a unit's result."""
    return folder / RESULTS / f"{unit:05d}.json"

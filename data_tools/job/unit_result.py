"""What a finished unit leaves in the folder of an unfinished preparation.

units/00042.json            result of the unit, which is done when this file exists
parts/train-00042-000.bin   shards of the unit, which become shards of the corpus in the end
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from llada.data.manifest import ShardEntry
from llada.files import write_json
from llada.types import JsonObject

RESULTS = "units"
"""Folder of the results of units."""
UNIT_SHARDS = "parts"
"""Folder of the shards of units."""


class RangeCount(NamedTuple):
    """The number of documents that an input range gave.

    Attributes:
        source: index of the source in the plan.
        documents: number of documents.
        left_out: number of things left out, by reason; only if the range gave no document.
    """

    source: int
    documents: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class UnitResult:
    """The outcome of one unit.

    Attributes:
        shards: entries of its shards, in the order in which they were written.
        given: documents that each of its input ranges gave, in order.
        skipped: number of documents and lines left out, by reason.
        noted: number of documents counted and kept, by reason.
        listed: entries of the list of what is left out.
        encoder: name of the encoder.
    """

    shards: list[ShardEntry]
    given: list[RangeCount]
    skipped: Mapping[str, int]
    noted: Mapping[str, int]
    listed: list[JsonObject]
    encoder: str

    def save(self, folder: Path, unit: int) -> None:
        """Write the result, which marks the unit as done."""
        content = {
            "shards": [asdict(shard) for shard in self.shards],
            "given": self.given,
            "skipped": self.skipped,
            "noted": self.noted,
            "listed": self.listed,
            "encoder": self.encoder,
        }
        write_json(result_path(folder, unit), content)

    @classmethod
    def load(cls, folder: Path, unit: int) -> UnitResult:
        content = json.loads(result_path(folder, unit).read_bytes())
        return cls(
            shards=[ShardEntry(**shard) for shard in content["shards"]],
            given=[RangeCount(*values) for values in content["given"]],
            skipped=content["skipped"],
            noted=content["noted"],
            listed=content["listed"],
            encoder=content["encoder"],
        )


def result_path(folder: Path, unit: int) -> Path:
    """Return the path of a unit's result."""
    return folder / RESULTS / f"{unit:05d}.json"

"""How a preparation is shared out: units of work, each a run of consecutive documents in the sorted
list of sources.

Where units begin and end follows from the sources and `--unit-bytes` alone, never from the number
of workers or tasks, so every way of running a preparation writes the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.readers.input_file import Extent, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import measure
from data_tools.readers.report import Report
from llada.errors import UserError
from llada.files import write_atomically

LARGEST_UNIT, SMALLEST_UNIT = 256 << 20, 4 << 20
"""Bytes of text of a unit where `--unit-bytes` is not given: a 64th of the whole within these
bounds.
"""
_FEW = 64
PLAN = "plan.json"


class InputRange(NamedTuple):
    """A slice of the source with this index."""

    source: int
    start: int
    stop: int

    @property
    def slice(self) -> Slice:
        return Slice(self.start, self.stop)


@dataclass(frozen=True)
class WorkPlan:
    """What is read, in which units, with which settings.

    Attributes:
        settings: all that decides what is written, as JSON.
        sources: in order.
        units: the pieces of every unit, in order.
        text_bytes: about how much text every unit has.
        skipped: files left out while the sources were found, by reason.
        listed: and which of them could not be read.
    """

    settings: dict[str, Any]
    sources: list[InputFile]
    units: list[list[InputRange]]
    text_bytes: list[int]
    skipped: dict[str, int]
    listed: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """sha256 over settings and sources."""
        return digest_of(self.settings, self.sources)

    def save(self, folder: Path) -> None:
        write_atomically(folder / PLAN, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> WorkPlan | None:
        """The plan of an unfinished preparation; None when there is none. Raises UserError for one
        that is damaged.
        """
        try:
            content = json.loads((folder / PLAN).read_bytes())
            content["sources"] = [InputFile(**source) for source in content["sources"]]
            content["units"] = [[InputRange(*piece) for piece in unit] for unit in content["units"]]
            return cls(**content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{folder / PLAN}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{folder / PLAN}: damaged, or of another version of this tool; remove '{folder}'"
                " to start over"
            ) from None


def digest_of(settings: dict[str, Any], sources: Sequence[InputFile]) -> str:
    content = json.dumps(
        [settings, [asdict(source) for source in sources]], sort_keys=True, allow_nan=False
    )
    return hashlib.sha256(content.encode()).hexdigest()


def make_plan(
    settings: dict[str, Any],
    sources: Sequence[InputFile],
    options: ReadOptions,
    unit_bytes: int | None,
    report: Report,
) -> WorkPlan:
    """Measure the sources and cut them.

    Args:
        settings: recorded.
        sources: from `find_sources`.
        options: how to read.
        unit_bytes: of text in a unit; None: see LARGEST_UNIT.
        report: of `find_sources`; goes on.

    Raises:
        UserError: a source that cannot be read, sources that hold nothing.
    """
    extents = [measure(source, options, report) or Extent(0, 0) for source in sources]
    total = sum(extent.text_bytes for extent in extents)
    size = unit_bytes or min(LARGEST_UNIT, max(SMALLEST_UNIT, total // _FEW))
    units, text_bytes = cut(extents, size)
    return WorkPlan(settings, list(sources), units, text_bytes, dict(report.skipped), report.listed)


def cut(extents: Sequence[Extent], size: int) -> tuple[list[list[InputRange]], list[int]]:
    """Pieces of units of `size` bytes of text, the last one smaller, and the text of each. A unit
    takes a position that does not fit as a whole, so it may be larger by less than one position.
    """
    units: list[list[InputRange]] = []
    filled: list[int] = []
    for index, extent in enumerate(extents):
        position = 0
        while position < extent.length:
            if not units or filled[-1] >= size:
                units.append([])
                filled.append(0)
            stop, text = _take(extent, position, size - filled[-1])
            units[-1].append(InputRange(index, position, stop))
            filled[-1] += text
            position = stop
    return units, filled


def _take(extent: Extent, position: int, room: int) -> tuple[int, int]:
    """How far the positions from `position` on fill `room`, and the text that is in them."""
    if extent.sizes is None:
        # A position may hold less than a byte only where there is no text at all: then all of them
        # fit.
        wanted = -(-room * extent.length // max(extent.text_bytes, 1))
        stop = min(extent.length, position + wanted)
        return stop, (stop - position) * extent.text_bytes // extent.length
    stop, text = position, 0
    while stop < extent.length and text < room:
        text += extent.sizes[stop]
        stop += 1
    return stop, text

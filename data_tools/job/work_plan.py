"""The plan of a preparation: its units of work, which are runs of documents in input order.

Where units begin and end depends on the sources and `--unit-bytes` alone, and not on the number of
workers or tasks, so every way of running a preparation writes the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.readers.input_file import Extent, InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import measure
from data_tools.readers.report import Report
from llada.arithmetic import ceil_div
from llada.errors import UserError
from llada.files import write_json
from llada.types import JsonObject

PLAN = "plan.json"

# Without --unit-bytes a unit is a 64th of the text, within these bounds in bytes: there are enough
# units for all workers, and an interruption loses little work.
_DEFAULT_UNITS = 64
MIN_UNIT_BYTES = 4 << 20
MAX_UNIT_BYTES = 256 << 20


class InputRange(NamedTuple):
    """Positions start..stop-1 of one source.

    Attributes:
        source: index of the source in the plan.
        start, stop: start and stop of the `Slice`.
    """

    source: int
    start: int
    stop: int

    @property
    def slice(self) -> Slice:
        return Slice(self.start, self.stop)


@dataclass(frozen=True)
class WorkPlan:
    """What is read, in which units, with which settings. Its fields are the keys of plan.json.

    Attributes:
        settings: all settings that decide what is written, as JSON values.
        sources: input files, in order.
        units: input ranges of each unit, in order.
        text_bytes: estimated bytes of text in each unit [units].
        skipped: number of files left out when the sources were listed, by reason.
        listed: entries of the list of what is left out, for files that could not be read.
    """

    settings: JsonObject
    sources: list[InputFile]
    units: list[list[InputRange]]
    text_bytes: list[int]
    skipped: dict[str, int]
    listed: list[JsonObject]

    @property
    def digest(self) -> str:
        """Digest of settings and sources; see `digest_of`."""
        return digest_of(self.settings, self.sources)

    def save(self, folder: Path) -> None:
        write_json(folder / PLAN, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> WorkPlan | None:
        """Return the plan of an unfinished preparation, or None if there is none.

        Raises:
            UserError: the plan is damaged or cannot be read.
        """
        try:
            content = json.loads((folder / PLAN).read_bytes())
            content["sources"] = [InputFile(**source) for source in content["sources"]]
            units = []
            for unit in content["units"]:
                units.append([InputRange(*values) for values in unit])
            content["units"] = units
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


def digest_of(settings: JsonObject, sources: Sequence[InputFile]) -> str:
    """Return the sha256 over settings and sources, by which a preparation recognizes its own work.

    Sources carry their size and time of modification, so a changed file changes the digest.
    """
    content = json.dumps(
        [settings, [asdict(source) for source in sources]], sort_keys=True, allow_nan=False
    )
    return hashlib.sha256(content.encode()).hexdigest()


def make_plan(
    settings: JsonObject,
    sources: Sequence[InputFile],
    options: ReadOptions,
    unit_bytes: int | None,
    report: Report,
) -> WorkPlan:
    """Measure the sources and cut them into units.

    Args:
        settings: settings that the plan records.
        sources: sources from `find_sources`.
        options: how sources are read.
        unit_bytes: bytes of text in a unit; None for a 64th of the whole, within bounds.
        report: report that `find_sources` has filled; sources that cannot be read are added.

    Raises:
        UserError: a named source cannot be read.
    """
    # A source that is left out keeps its index. Its extent is empty, so it is in no unit.
    extents = [measure(source, options, report) or Extent(0, 0) for source in sources]
    if unit_bytes is None:
        total_bytes = sum(extent.text_bytes for extent in extents)
        unit_bytes = max(MIN_UNIT_BYTES, total_bytes // _DEFAULT_UNITS)
        unit_bytes = min(MAX_UNIT_BYTES, unit_bytes)
    units, text_bytes = cut(extents, unit_bytes)
    return WorkPlan(settings, list(sources), units, text_bytes, dict(report.skipped), report.listed)


def cut(extents: Sequence[Extent], unit_bytes: int) -> tuple[list[list[InputRange]], list[int]]:
    """Cut sources into units of `unit_bytes` of text; the last unit is smaller.

    Source 0 is plain JSON Lines of 250 bytes (250 positions of a byte each). Source 1 is a table
    with two row groups of 80 and 120 bytes. In units of 100 bytes:

        unit 0   bytes 0..99 of source 0
        unit 1   bytes 100..199 of source 0
        unit 2   bytes 200..249 of source 0, row group 0 of source 1      130 bytes
        unit 3   row group 1 of source 1                                  120 bytes

    A position is never divided: unit 2 takes the whole of row group 0, although it has room for
    only 50 more bytes. So a unit exceeds `unit_bytes` by less than one position.

    Args:
        extents: extents of the sources.
        unit_bytes: bytes of text with which a unit is full.

    Returns:
        The input ranges of each unit, and the bytes of text in each unit.
    """
    units: list[list[InputRange]] = []
    text_bytes: list[int] = []
    for source, extent in enumerate(extents):
        position = 0
        while position < extent.length:
            if not units or text_bytes[-1] >= unit_bytes:
                units.append([])
                text_bytes.append(0)
            stop, taken = _take(extent, position, room=unit_bytes - text_bytes[-1])
            units[-1].append(InputRange(source, position, stop))
            text_bytes[-1] += taken
            position = stop
    return units, text_bytes


def _take(extent: Extent, start: int, room: int) -> tuple[int, int]:
    """Return where a range from `start` that fills `room` bytes ends, and the bytes in it."""
    if extent.sizes is None:
        # All positions hold the same number of bytes: take as many as fill the room, rounded up. In
        # a source without text, that is all of them.
        positions = ceil_div(room * extent.length, max(extent.text_bytes, 1))
        stop = min(extent.length, start + positions)
        return stop, (stop - start) * extent.text_bytes // extent.length
    stop = start
    text_bytes = 0
    while stop < extent.length and text_bytes < room:
        text_bytes += extent.sizes[stop]
        stop += 1
    return stop, text_bytes

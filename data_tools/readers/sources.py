"""What `--input` names: files, folders, patterns and Hugging Face datasets, as a sorted list of
sources.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_tools.readers.json_arrays import holds_array
from llada.errors import UserError

if TYPE_CHECKING:
    from data_tools.readers.reading import ReadOptions, Report

_PROSE = ".txt .text .md .rst .tex .org .adoc .html .htm"
_CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .mjs .ts .tsx .jsx .go .rs .rb"
    " .php .pl .pm .sh .bash .sql .lua .r .jl .swift .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp"
    " .el .scm .vim .f90 .asm .s .m .css"
)
TEXT_EXTENSIONS = frozenset(f"{_PROSE} {_CODE}".split())
"""Read as one document each when found in a folder."""
COMPRESSED = (".gz", ".zst")
HUB = "hf:"
"""Prefix of an input that the `datasets` library loads."""
TEXT, JSONL, ARRAY, PARQUET, ARROW, DATASET = (
    "text",
    "jsonl",
    "json array",
    "parquet",
    "arrow",
    "dataset",
)
"""Formats of sources."""
_FORMATS = {".jsonl": JSONL, ".json": JSONL, ".parquet": PARQUET, ".arrow": ARROW}


@dataclass(frozen=True)
class InputFile:
    """One file, or one split of a dataset.

    Attributes:
        path: as given or found; of a dataset, with its prefix.
        format: one of the formats above.
        named: on the command line, so that a problem with it is the user's mistake.
        bytes: on the disk; 0 for a dataset.
        stamp: changes when the content does: the time of modification in ns, a dataset's
            fingerprint.
    """

    path: str
    format: str
    named: bool
    bytes: int
    stamp: str

    @property
    def is_compressed(self) -> bool:
        return Path(self.path).suffix.lower() in COMPRESSED


class Slice(NamedTuple):
    """Positions start..stop-1 of a source: bytes, row groups, record batches or rows; 0..1 is a
    whole file.
    """

    start: int
    stop: int


class Extent(NamedTuple):
    """How a source can be cut.

    Attributes:
        length: positions it has.
        text_bytes: about how much text it holds.
        sizes: text of every position; None: the same for all.
    """

    length: int
    text_bytes: int
    sizes: list[int] | None = None


def extension(path: Path) -> str:
    """In lower case, without that of the compression: a.TXT.gz -> .txt."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def parse_extensions(values: Sequence[str] | None) -> frozenset[str] | None:
    """`py`, `.py` or `py,md` -> {".py", ".md"}; None stays None."""
    if not values:
        return None
    parts = [part.strip().lower() for value in values for part in value.split(",")]
    found = frozenset(extension(Path("x." + part.lstrip("."))) for part in parts if part.strip("."))
    if not found:
        raise UserError(
            f"--ext: {' '.join(values)!r} names no extension; give some as in --ext py,md"
        )
    return found


def find_sources(
    inputs: Sequence[str | Path], options: ReadOptions, report: Report
) -> list[InputFile]:
    """Every source of the inputs: inputs in the given order, what a folder or a pattern holds
    sorted by path.

    Args:
        inputs: files, folders, patterns (`*`, `**`, `?`, `[...]`) and `hf:` names.
        options: how to read.
        report: what is passed over is counted here.

    Raises:
        UserError: nothing given, an input that is missing, empty or unreadable, a pattern that
            matches nothing, a file read twice.
    """
    if not inputs:
        raise UserError("--input: give at least one file or folder")
    if "" in map(str, inputs):
        raise UserError("--input: '' names no file or folder")
    places = [
        given if given.startswith(HUB) else os.path.realpath(given) for given in map(str, inputs)
    ]
    counts = Counter(places)
    for given, place in zip(inputs, places, strict=True):
        if counts[place] > 1:
            raise UserError(f"--input: '{given}' is given twice; its documents would be read twice")
    found: list[InputFile] = []
    owners: dict[tuple[int, int] | str, str] = {}
    for given in map(str, inputs):
        for source, identity in _of_input(given, options, report):
            if identity not in owners:
                owners[identity] = source.path
                found.append(source)
            elif source.named:
                raise UserError(
                    f"--input: '{given}' is read already as {owners[identity]}; its documents would"
                    " be read twice"
                )
            else:
                report.skipped["files read already under another name"] += 1
    return found


_Found = tuple[InputFile, tuple[int, int] | str]
"""A source and what makes it the same as another: device and inode of a file."""


def _of_input(given: str, options: ReadOptions, report: Report) -> Iterator[_Found]:
    if given.startswith(HUB):
        from data_tools.readers.tables import dataset_stamp

        yield InputFile(given, DATASET, True, 0, dataset_stamp(given, options)), given
        return
    if glob.has_magic(given) and not os.path.lexists(given):
        matches = sorted(glob.glob(given, recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise UserError(f"--input: no file matches '{given}'")
        for path in files:
            yield _file(path, path.stat(), options, named=False)
        return
    yield from _of_path(Path(given), options, report)


def _of_path(path: Path, options: ReadOptions, report: Report) -> Iterator[_Found]:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--input: no file or folder '{path}'") from None
    except OSError as error:
        raise UserError(f"--input: {path}: cannot be read ({error.strerror})") from None
    if stat.S_ISREG(status.st_mode):
        if not status.st_size:
            raise UserError(f"--input: {path} is empty")
        yield _file(path, status, options, named=True)
    elif stat.S_ISDIR(status.st_mode):
        for file in sorted(_walk(path, report)):
            if _wanted(file, options):
                yield _file(file, file.stat(), options, named=False)
            else:
                report.skipped["files with another extension"] += 1
    else:
        raise UserError(f"--input: '{path}' is neither a file nor a folder")


def _file(path: Path, status: os.stat_result, options: ReadOptions, named: bool) -> _Found:
    format = _FORMATS.get(extension(path), TEXT)
    if extension(path) == ".json" and holds_array(str(path)):
        format = ARRAY
    if format in (PARQUET, ARROW) and path.suffix.lower() in COMPRESSED:
        raise UserError(f"--input: {path}: unpack it first; {format} files are compressed inside")
    if options.structured and format == TEXT:
        raise UserError(
            f"--input: {path} is neither JSON Lines nor a JSON array (.jsonl, .json, also with .gz"
            " or .zst) nor .parquet nor .arrow, which conversations are read from"
        )
    return InputFile(str(path), format, named, status.st_size, str(status.st_mtime_ns)), (
        status.st_dev,
        status.st_ino,
    )


def _wanted(file: Path, options: ReadOptions) -> bool:
    own = extension(file)
    # A plain .json in a folder is more often a configuration than documents: it has to be asked
    # for.
    if own in _FORMATS and (own != ".json" or file.suffix.lower() in COMPRESSED):
        return True
    if options.structured:
        return False
    return own in (TEXT_EXTENSIONS if options.extensions is None else options.extensions)


def _walk(folder: Path, report: Report) -> Iterator[Path]:
    """Regular files below a folder; hidden ones and __pycache__ left out. Links to folders are
    counted and not followed.
    """

    def unreadable(error: OSError) -> None:
        if error.filename is None or Path(error.filename) == folder:
            raise UserError(f"--input: {folder}: cannot be read ({error.strerror})") from None
        report.skipped["folders unreadable"] += 1

    for root, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        ]
        report.skipped.update(
            "links to folders" for name in folders if os.path.islink(os.path.join(root, name))
        )
        for name in files:
            if name.startswith("."):
                continue
            path = Path(root, name)
            if path.is_file():
                yield path
            else:  # a link to nothing, a pipe, a socket: opening it could wait for ever
                report.skipped["files unreadable"] += 1

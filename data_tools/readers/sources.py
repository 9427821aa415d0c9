"""What `--input` names: files, folders, patterns and Hugging Face datasets, resolved to a sorted
list of input files.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from data_tools.readers.formats import (
    DATASET,
    FORMATS,
    NAMES_BY_EXTENSION,
    format_of,
    list_extensions,
)
from data_tools.readers.hf_datasets import dataset_stamp
from data_tools.readers.input_file import COMPRESSED, HUB, InputFile, extension
from data_tools.readers.options import ReadOptions
from data_tools.readers.report import Report
from llada.errors import UserError

_PROSE = ".txt .text .md .rst .tex .org .adoc .html .htm"
_CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .mjs .ts .tsx .jsx .go .rs .rb"
    " .php .pl .pm .sh .bash .sql .lua .r .jl .swift .cs .fs .hs .ml .mli .ex .exs .erl .clj .lisp"
    " .el .scm .vim .f90 .asm .s .m .css"
)
TEXT_EXTENSIONS = frozenset(f"{_PROSE} {_CODE}".split())
"""Extensions of the text files that are read in folders."""

Identity: TypeAlias = tuple[int, int] | str
"""What equal sources share: device and inode of a file, or the name of a dataset."""


def parse_extensions(values: Sequence[str] | None) -> frozenset[str] | None:
    """Parse `--ext`: `py`, `.py` or `py,md` -> {".py", ".md"}; None stays None.

    Raises:
        UserError: no value names an extension.
    """
    if not values:
        return None
    extensions = set()
    for value in values:
        for item in value.split(","):
            name = item.strip().lower().lstrip(".")
            if name:
                extensions.add(extension(Path(f"x.{name}")))
    if not extensions:
        raise UserError(
            f"--ext: {' '.join(values)!r} names no extension; give some as in --ext py,md"
        )
    return frozenset(extensions)


def find_sources(
    inputs: Sequence[str | Path], options: ReadOptions, report: Report
) -> list[InputFile]:
    """Return the sources of all inputs, in the order of the inputs; those of a folder or a pattern
    are sorted by path.

    Args:
        inputs: files, folders, patterns (`*`, `**`, `?`, `[...]`) and `hf:` names.
        options: how inputs are read.
        report: counts what is left out.

    Raises:
        UserError: no input, an input that is missing, empty or unreadable, a pattern that matches
            nothing, a file named twice.
    """
    names = [str(name) for name in inputs]
    _check_names(names)
    sources: list[InputFile] = []
    seen: dict[Identity, str] = {}  # path under which a source is read
    for name in names:
        for source, identity in _sources_of(name, options, report):
            if identity not in seen:
                seen[identity] = source.path
                sources.append(source)
            elif source.named:
                raise UserError(
                    f"--input: '{name}' is read already as {seen[identity]}; its documents would"
                    " be read twice"
                )
            else:
                report.skipped["files read already under another name"] += 1
    return sources


def _check_names(names: list[str]) -> None:
    """Refuse inputs that are missing, empty strings, or the same file or folder twice."""
    if not names:
        raise UserError("--input: give at least one file or folder")
    if "" in names:
        raise UserError("--input: '' is not a valid file or folder name")
    real_paths = []
    for name in names:
        if name.startswith(HUB):
            real_paths.append(name)
        else:
            real_paths.append(os.path.realpath(name))
    counts = Counter(real_paths)
    for name, real_path in zip(names, real_paths, strict=True):
        if counts[real_path] > 1:
            raise UserError(f"--input: '{name}' is given twice; its documents would be read twice")


def _sources_of(
    name: str, options: ReadOptions, report: Report
) -> Iterator[tuple[InputFile, Identity]]:
    """Yield the sources of one input."""
    if name.startswith(HUB):
        yield InputFile(name, DATASET, True, 0, dataset_stamp(name, options)), name
    # A file whose name happens to contain `*` or `[` is not a pattern.
    elif glob.has_magic(name) and not os.path.lexists(name):
        yield from _matching(name, options)
    else:
        yield from _file_or_folder(Path(name), options, report)


def _matching(pattern: str, options: ReadOptions) -> Iterator[tuple[InputFile, Identity]]:
    matches = sorted(glob.glob(pattern, recursive=True))
    files = [Path(match) for match in matches if os.path.isfile(match)]
    if not files:
        raise UserError(f"--input: no file matches '{pattern}'")
    for path in files:
        yield _input_file(path, path.stat(), options, named=False)


def _file_or_folder(
    path: Path, options: ReadOptions, report: Report
) -> Iterator[tuple[InputFile, Identity]]:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--input: no file or folder '{path}'") from None
    except OSError as error:
        raise UserError(f"--input: {path}: cannot be read ({error.strerror})") from None
    if stat.S_ISREG(status.st_mode):
        if not status.st_size:
            raise UserError(f"--input: {path} is empty")
        yield _input_file(path, status, options, named=True)
    elif stat.S_ISDIR(status.st_mode):
        for file in sorted(_walk(path, report)):
            if _is_read_in_folders(file, options):
                yield _input_file(file, file.stat(), options, named=False)
            else:
                report.skipped["files with another extension"] += 1
    else:
        raise UserError(f"--input: '{path}' is neither a file nor a folder")


def _input_file(
    path: Path, status: os.stat_result, options: ReadOptions, named: bool
) -> tuple[InputFile, Identity]:
    """Describe a file. Raises UserError if it cannot be read, or not as records with fields."""
    name = format_of(path)
    format = FORMATS[name]
    is_compressed = path.suffix.lower() in COMPRESSED
    if is_compressed and not format.may_be_compressed:
        raise UserError(f"--input: {path}: unpack it first; {name} files are compressed inside")
    if options.text_field is None and not format.has_fields:
        raise UserError(
            f"--input: {path}: conversations are not read from {name} files; allowed extensions:"
            f" {list_extensions()}"
        )
    source = InputFile(str(path), name, named, status.st_size, str(status.st_mtime_ns))
    return source, (status.st_dev, status.st_ino)


def _is_read_in_folders(file: Path, options: ReadOptions) -> bool:
    own = extension(file)
    if own in NAMES_BY_EXTENSION:
        # A plain .json in a folder is more often a configuration than documents: it is read only
        # where --input or --ext names it.
        is_plain_json = own == ".json" and file.suffix.lower() not in COMPRESSED
        if not is_plain_json:
            return True
    if options.text_field is None:
        return False
    if options.extensions is None:
        return own in TEXT_EXTENSIONS
    return own in options.extensions


def _walk(folder: Path, report: Report) -> Iterator[Path]:
    """Yield the regular files below a folder, without hidden ones and __pycache__.

    Links to folders are counted and not followed.
    """

    def unreadable(error: OSError) -> None:
        if error.filename is None or Path(error.filename) == folder:
            raise UserError(f"--input: {folder}: cannot be read ({error.strerror})") from None
        report.skipped["folders unreadable"] += 1

    for root, folders, files in os.walk(folder, onerror=unreadable):
        # os.walk descends into the folders that remain in the list.
        folders[:] = [
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        ]
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                report.skipped["links to folders"] += 1
        for name in files:
            if name.startswith("."):
                continue
            path = Path(root, name)
            if path.is_file():
                yield path
            else:  # a dangling link, a pipe or a socket, which could block whoever opens it
                report.skipped["files unreadable"] += 1

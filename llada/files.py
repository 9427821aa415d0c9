"""Files that are there whole or not at all: temporary names, flushed to disk, renamed."""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from llada.errors import RunError, UserError

_CHUNK = 1 << 24
T = TypeVar("T")


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def prefetch(calls: Iterable[Callable[[], T]], depth: int = 2) -> Iterator[T]:
    """Results of calls in their order; up to `depth` of the next ones are computed in a thread
    meanwhile.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[T]] = deque()
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def flushed_meanwhile(folder: Path) -> Iterator[None]:
    """While the block writes large files into `folder`, a thread has the system write them to disk,
    which would else wait for the end.

    Raises OSError at the end of the block if the disk failed: the system tells that once, so a
    later sync of the file might not.
    """
    ended, errors = threading.Event(), list[OSError]()

    def flush() -> None:
        while not ended.wait(0.2) and not errors:
            for path in folder.iterdir():
                try:
                    with open(path, "rb") as file:
                        os.fdatasync(file.fileno())
                except FileNotFoundError:  # renamed meanwhile
                    continue
                except OSError as error:
                    errors.append(error)

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


def refuse_inside(output: str | Path, source: Path, setting: str = "OUT") -> None:
    """Raises UserError where `output` would lie inside the folder that is read."""
    if source.resolve() in Path(os.path.realpath(output)).parents:
        raise UserError(
            f"{setting}: '{output}' lies inside {source}, which is only read; choose a place"
            " outside"
        )


def require_space(output: str | Path, needed: int, setting: str) -> None:
    """Raises UserError unless the disk that `output` will lie on has `needed` bytes left."""
    folder = Path(os.path.realpath(output)).parent
    while not os.path.isdir(folder):  # also one that may not be looked into
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = usage.free
    # what has no size, as /proc, is no disk: making the folder says what is wrong
    if usage.total and free < needed:
        raise UserError(
            f"{setting}: '{output}' needs {readable_size(needed)}, and {folder} has"
            f" {readable_size(free)} left"
        )


def readable_size(count: float) -> str:
    """A number of bytes for people, with three digits: 870 bytes, 1.05 MB, 14.2 GB."""
    size, unit = count, "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without its subfolders: name -> content."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and xxh3_64 (hexadecimal) of a file."""
    # Here, not above: the batch job imports this module with the standard library alone.
    import xxhash

    digest, size = xxhash.xxh3_64(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is either there whole or not at all; after an error nothing of
    it is left.
    """
    # another process may be writing the same file
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def final_path(output: str | Path, setting: str) -> Path:
    """Where something new will lie, links followed. Raises UserError for what can be no name of a
    file or folder.
    """
    final = Path(os.path.realpath(output))
    if not str(output) or not final.name:
        raise UserError(f"{setting}: '{output}' names no file or folder to make")
    try:
        # the longest name that is used on the way
        os.lstat(final.with_name(f".{final.name}.partial-{'0' * 8}"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be made ({error.strerror})") from None
    return final


def make_writable(output: Path, setting: str) -> None:
    """Make the folder of a file that is written much later, and see whether a file can be made in
    it. Raises UserError.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name[:100]}."):
            pass
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be made ({error.strerror})") from None


@contextmanager
def new_file(output: str | Path, force: bool, setting: str = "--output") -> Iterator[BinaryIO]:
    """A file to write, under a temporary name beside `output` whose name it takes when the block
    ends; after any error nothing is left.

    Args:
        output: must not exist, unless `force`; a file that is replaced stays until the end. Missing
            parent folders are made.
        force: replace a file.
        setting: what the user calls `output`, for messages.

    Raises:
        UserError: an output that may not be made or replaced, or that another command made
            meanwhile.
        RunError: an operating system's error while writing.
    """
    final = final_path(output, setting)
    if os.path.lexists(output) and not (force and final.is_file()):
        raise UserError(
            f"{setting}: '{output}'"
            f" exists{'; --force replaces it' if final.is_file() else ' and is not a file'}"
        )
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    with _new_parents(output, final, setting):
        try:
            try:
                file = open(partial, "wb")  # noqa: SIM115 (closed below, whatever happens)
            except OSError as error:
                raise UserError(
                    f"{setting}: '{output}' cannot be made ({error.strerror})"
                ) from None
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(partial, final)
            else:
                _name_new_file(partial, output, final, setting)
            sync_folder(final.parent)
        except OSError as error:
            raise RunError(
                f"{output}: cannot be written ({error}); nothing of it is left"
            ) from error
        finally:
            with suppress(OSError):  # what went wrong with the folder is said already
                partial.unlink(missing_ok=True)


def _name_new_file(partial: Path, output: str | Path, final: Path, setting: str) -> None:
    """Give a finished file a name that is still free. Raises UserError if another command took it
    meanwhile.
    """
    try:
        os.link(partial, final)  # unlike a rename, it replaces nothing
    except FileExistsError:
        raise UserError(taken_meanwhile(output, setting)) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(final):
            raise UserError(taken_meanwhile(output, setting)) from None
        os.rename(partial, final)


@contextmanager
def new_folder(
    output: str | Path, force: bool, what: str, names: Sequence[str], setting: str = "--output"
) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends; after any error
    nothing of it is left.

    Args:
        output: must not exist, unless `force`. Missing parent folders are made.
        force: replace what is there if it is empty or holds only `names`, the first of them
            included. It stays until the end.
        what: what such a folder is, for messages.
        names: patterns.
        setting: what the user calls `output`, for messages.

    Raises:
        UserError: an output that may not be made or replaced, or that another command made
            meanwhile.
        RunError: an operating system's error while writing.
    """
    final = final_path(output, setting)
    replaces = os.path.lexists(output)
    if replaces:
        check_replaceable(Path(output), final, force, what, names, setting)
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    done = False
    with _new_parents(output, final, setting):
        try:
            try:
                partial.mkdir()
            except OSError as error:
                raise UserError(
                    f"{setting}: '{output}' cannot be made ({error.strerror})"
                ) from None
            yield partial
            sync_tree(partial)
            if replaces:
                swap(partial, final)
            else:
                name_new_folder(partial, output, final, setting)
            sync_folder(final.parent)
            done = True
        except OSError as error:
            raise RunError(
                f"{output}: cannot be written ({error}); nothing of it is left"
            ) from error
        finally:
            if not done:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _new_parents(output: str | Path, final: Path, setting: str) -> Iterator[None]:
    """Make the missing parent folders of `final`; after an error in the block they are removed
    again.
    """
    created: list[Path] = []
    try:
        try:
            for parent in [folder for folder in reversed(final.parents) if not folder.exists()]:
                parent.mkdir(exist_ok=True)
                created.append(parent)
        except OSError as error:
            raise UserError(f"{setting}: '{output}' cannot be made ({error.strerror})") from None
        yield
    except BaseException:
        for folder in reversed(created):
            with suppress(OSError):  # someone else uses it by now
                folder.rmdir()
        raise


def name_new_folder(partial: Path, output: str | Path, final: Path, setting: str) -> None:
    """Give a finished folder a name that is still free. Raises UserError if another command took it
    meanwhile.
    """
    try:
        os.rename(partial, final)  # replaces nothing but an empty folder
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise UserError(taken_meanwhile(output, setting)) from None
        raise


def taken_meanwhile(output: str | Path, setting: str) -> str:
    """The refusal of an output that was free when the command began."""
    return (
        f"{setting}: '{output}' was made by another command while this one ran, and stays as it is"
    )


def check_replaceable(
    output: Path, final: Path, force: bool, what: str, names: Sequence[str], setting: str
) -> None:
    """Raises UserError unless `output`, which exists as `final`, may be replaced;
    see `new_folder`.
    """
    if not force:
        raise UserError(f"{setting}: '{output}' exists; --force replaces {what}")
    try:
        found = sorted(os.listdir(final)) if os.path.isdir(final) else None
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be read ({error.strerror})") from None
    if found is None:
        raise UserError(
            f"{setting}: '{output}' is not a folder; --force replaces only {what} or an empty"
            " folder"
        )
    other = [
        name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
    ]
    if other or (found and names[0] not in found):
        why = f"it holds '{other[0]}'" if other else f"it has no {names[0]}"
        raise UserError(
            f"{setting}: '{output}' is not {what} ({why}); --force replaces only that or an empty"
            " folder"
        )


def swap(partial: Path, final: Path) -> None:
    """Rename, with what was there before kept until the new one stands."""
    old = final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}")
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)

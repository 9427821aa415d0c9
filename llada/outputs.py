"""The outputs of a command: files and folders that appear complete, and replace nothing unasked.

An output is written under a temporary name beside its own and renamed at the end. Every function
takes `setting`, what the user calls the output (such as "--output"), for its messages.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from llada.errors import RunError, UserError
from llada.files import sync_folder, sync_tree
from llada.formatting import readable_size

# -- checks before anything is written -------------------------------------------------------------


def refuse_inside(output: str | Path, source: Path, setting: str = "OUT") -> None:
    """Raise UserError if `output` would lie inside the folder that is read."""
    if source.resolve() in Path(os.path.realpath(output)).parents:
        raise UserError(
            f"{setting}: '{output}' lies inside {source}, which is only read; choose a folder"
            " outside"
        )


def require_space(output: str | Path, needed: int, setting: str) -> None:
    """Raise UserError unless the disk of `output` has `needed` bytes left."""
    folder = Path(os.path.realpath(output)).parent
    # The folder may not exist yet: look at the first one above it that does. `os.path.isdir` is
    # also false for a folder that may not be looked into.
    while not os.path.isdir(folder):
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    # A total of 0 is no disk (/proc, for one). Making the folder there fails with a better message.
    if usage.total and usage.free < needed:
        raise UserError(
            f"{setting}: '{output}' needs {readable_size(needed)}, and {folder} has"
            f" {readable_size(usage.free)} left"
        )


def require_writable(output: Path, setting: str) -> None:
    """Make the folder of a file that is written much later, and try to make a file in it.

    Raises:
        UserError: one of the two fails.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{output.name[:100]}."):
            pass
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be created ({error.strerror})") from None


def check_replaceable(
    output: Path, final: Path, force: bool, description: str, names: Sequence[str], setting: str
) -> None:
    """Raise UserError unless `output`, which exists, may be replaced; see `new_folder`."""
    if not force:
        raise UserError(f"{setting}: '{output}' exists; --force replaces {description}")
    if not os.path.isdir(final):
        raise UserError(
            f"{setting}: '{output}' is not a folder; --force replaces only {description} or an"
            " empty folder"
        )
    try:
        entries = sorted(os.listdir(final))
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be read ({error.strerror})") from None
    if not entries:
        return

    # Anything that such a folder never contains means that it is something else, and so does the
    # absence of the one file that it always contains.
    foreign = [
        name for name in entries if not any(fnmatch.fnmatchcase(name, entry) for entry in names)
    ]
    reason = None
    if foreign:
        reason = f"it contains '{foreign[0]}'"
    elif names[0] not in entries:
        reason = f"it has no {names[0]}"
    if reason is not None:
        raise UserError(
            f"{setting}: '{output}' is not {description} ({reason}); --force replaces only that or"
            " an empty folder"
        )


def final_path(output: str | Path, setting: str) -> Path:
    """The path that `output` will have, links followed.

    Raises:
        UserError: a name that no file or folder can have.
    """
    final = Path(os.path.realpath(output))
    if not str(output) or not final.name:
        raise UserError(f"{setting}: '{output}' is not a valid file or folder name")
    try:
        # The longest name used on the way: the system refuses it now if it is too long.
        os.lstat(final.with_name(f".{final.name}.partial-{'0' * 8}"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be created ({error.strerror})") from None
    return final


# -- a file ----------------------------------------------------------------------------------------


@contextmanager
def new_file(output: str | Path, force: bool, setting: str = "--output") -> Iterator[BinaryIO]:
    """A file to write, which gets the name `output` when the block ends.

    Until then it has a temporary name beside `output`; after any error nothing of it is left.

    Args:
        output: must not exist, unless `force`; a file that is replaced stays until the end. Missing
            parent folders are made.
        force: replace a file.
        setting: what the user calls `output`.

    Raises:
        UserError: an output that cannot be created or may not be replaced, or that another command
            made in the meantime.
        RunError: an error of the operating system while writing.
    """
    final = final_path(output, setting)
    if os.path.lexists(output):
        if not final.is_file():
            raise UserError(f"{setting}: '{output}' exists and is not a file")
        if not force:
            raise UserError(f"{setting}: '{output}' exists; --force replaces it")
    partial = _partial_path(final)
    with _new_parents(output, final, setting):
        try:
            with _open_new(partial, output, setting) as file:
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
            # A failure here follows another one, which is reported already.
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _open_new(partial: Path, output: str | Path, setting: str) -> BinaryIO:
    try:
        return open(partial, "wb")
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be created ({error.strerror})") from None


def _name_new_file(partial: Path, output: str | Path, final: Path, setting: str) -> None:
    """Give a finished file its name. Raises UserError if another command took the name."""
    try:
        os.link(partial, final)  # unlike a rename, a link replaces nothing
    except FileExistsError:
        raise UserError(taken_in_the_meantime(output, setting)) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(final):
            raise UserError(taken_in_the_meantime(output, setting)) from None
        os.rename(partial, final)


# -- a folder --------------------------------------------------------------------------------------


@contextmanager
def new_folder(
    output: str | Path,
    force: bool,
    description: str,
    names: Sequence[str],
    setting: str = "--output",
) -> Iterator[Path]:
    """A folder to fill, which gets the name `output` when the block ends.

    Until then it has a temporary name beside `output`; after any error nothing of it is left.

    Args:
        output: must not exist, unless `force`. Missing parent folders are made.
        force: replace an existing folder that is empty, or contains `names[0]` and nothing that no
            pattern of `names` matches. It stays until the end.
        description: noun for such a folder, as "a corpus".
        names: patterns of the entries of such a folder. The first is a plain name that it always
            holds.
        setting: what the user calls `output`.

    Raises:
        UserError: an output that cannot be created or may not be replaced, or that another command
            made in the meantime.
        RunError: an error of the operating system while writing.
    """
    final = final_path(output, setting)
    replaces = os.path.lexists(output)
    if replaces:
        check_replaceable(Path(output), final, force, description, names, setting)
    partial = _partial_path(final)
    done = False
    with _new_parents(output, final, setting):
        try:
            _make_new(partial, output, setting)
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


def _make_new(partial: Path, output: str | Path, setting: str) -> None:
    try:
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{setting}: '{output}' cannot be created ({error.strerror})") from None


def name_new_folder(partial: Path, output: str | Path, final: Path, setting: str) -> None:
    """Give a finished folder its name. Raises UserError if another command took the name."""
    try:
        os.rename(partial, final)  # replaces nothing but an empty folder
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise UserError(taken_in_the_meantime(output, setting)) from None
        raise


def swap(partial: Path, final: Path) -> None:
    """Put `partial` in the place of `final`, which is removed only once `partial` is there."""
    old = final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}")
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


# -- both ------------------------------------------------------------------------------------------


def taken_in_the_meantime(output: str | Path, setting: str) -> str:
    """The message about an output that did not exist when the command began, and now does."""
    return (
        f"{setting}: '{output}' was made by another command while this one ran, and stays as it is"
    )


def _partial_path(final: Path) -> Path:
    """A temporary name for an output; hidden, and random since commands may run side by side."""
    return final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")


@contextmanager
def _new_parents(output: str | Path, final: Path, setting: str) -> Iterator[None]:
    """Make the missing parent folders of `final`, and remove them after an error in the block."""
    created: list[Path] = []
    try:
        try:
            for parent in [folder for folder in reversed(final.parents) if not folder.exists()]:
                parent.mkdir(exist_ok=True)
                created.append(parent)
        except OSError as error:
            raise UserError(f"{setting}: '{output}' cannot be created ({error.strerror})") from None
        yield
    except BaseException:
        for folder in reversed(created):
            with suppress(OSError):  # another command uses the folder by now
                folder.rmdir()
        raise

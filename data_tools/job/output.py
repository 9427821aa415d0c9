"""The folder of a corpus while it is made: OUTPUT.partial, which keeps finished units until it
takes its name.

Any number of processes with the same inputs and settings may work in it. Those with others are kept
out: the folder appears with its plan in it, by one rename, and every process compares the plan with
its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.filters.dedup import DUPLICATES, HASHES
from data_tools.job.work_plan import PLAN, WorkPlan
from data_tools.job.worker import ENTRIES, PARTS
from llada.data.manifest import CORPUS_FILES, MANIFEST, Manifest
from llada.errors import RunError, UserError
from llada.files import sync_folder, sync_tree
from llada.outputs import (
    check_replaceable,
    final_path,
    name_new_folder,
    swap,
    taken_in_the_meantime,
)
from llada.tokenizer import Tokenizer

_TRIES = 100
_WORKING = (ENTRIES, PARTS, HASHES, DUPLICATES)


class Output:
    """Where a corpus goes.

    Args:
        output: as given.
        force: replace what is there.
        shared: other tasks work on the same corpus.

    Raises:
        UserError: an output that can be no folder.
    """

    def __init__(self, output: str | Path, force: bool, shared: bool) -> None:
        self.given, self._force, self._shared = output, force, shared
        self.final = final_path(output, "--output")
        self.partial = self.final.with_name(f"{self.final.name}.partial")
        self._replaces = False
        self._in_use: BinaryIO | None = None

    def finished(self, digest: str, settings: dict[str, Any]) -> Manifest | None:
        """The manifest if the corpus is there already, made of the same inputs with the same
        settings. With `force`, it is made again, unless other tasks may just have finished it.
        Raises UserError if something else is there that may not be replaced.
        """
        if not os.path.lexists(self.given):
            return None
        manifest = _manifest(self.final)
        if manifest is not None and manifest.plan == digest and (self._shared or not self._force):
            return manifest
        if manifest is not None and not self._force:
            theirs = {
                **manifest.options,
                "kind": manifest.kind,
                "tokenizer": manifest.tokenizer_fingerprint,
            }
            raise UserError(
                f"--output: '{self.given}' exists, a corpus prepared"
                f" {_difference(theirs, settings)}; --force replaces a prepared corpus"
            )
        check_replaceable(
            Path(self.given), self.final, self._force, "a prepared corpus", CORPUS_FILES, "--output"
        )
        self._replaces = True
        return None

    def unfinished(self, digest: str, settings: dict[str, Any]) -> WorkPlan | None:
        """The plan of a preparation that was interrupted, of the same inputs and settings. Raises
        UserError for another's, unless `force`, which discards it.
        """
        if not self.partial.exists():
            return None
        plan = WorkPlan.load(self.partial)
        if plan is None:
            if self.partial.is_dir() and not any(self.partial.iterdir()):
                return None
            raise UserError(
                f"--output: '{self.partial}' is in the way: it is no unfinished preparation; move"
                " it away"
            )
        if plan.digest == digest:
            return plan
        if not self._force:
            raise UserError(
                f"--output: '{self.partial}' holds an unfinished preparation"
                f" {_difference(plan.settings, settings)}; --force discards it and starts over"
            )
        if self._shared or _is_in_use(self.partial / PLAN):
            raise UserError(
                f"--force: '{self.partial}' is of other inputs or settings, and other processes may"
                " be at work in it; end them and remove it first"
            )
        shutil.rmtree(self.partial)
        return None

    def finished_by_another(self, digest: str) -> Manifest | None:
        """The manifest of the same corpus if another process has made it while this one worked on
        it too.
        """
        manifest = None if self.partial.exists() else _manifest(self.final)
        if manifest is None or manifest.plan != digest:
            return None
        # that this process has left, if they were renamed with the rest
        _remove_partial_files(self.final)
        return manifest

    def is_written(self, digest: str) -> bool:
        """Everything is there but the name."""
        manifest = _manifest(self.partial)
        return manifest is not None and manifest.plan == digest

    @contextmanager
    def working(self, plan: WorkPlan, tokenizer: Tokenizer) -> Iterator[Path]:
        """The unfinished folder with the plan, and a copy of the tokenizer. It stays after an error
        if a unit is finished in it.

        Raises:
            UserError: it cannot be made.
            RunError: an operating system's error while writing.
        """
        created = self._make(plan, tokenizer)
        try:
            yield self.partial
        except OSError as error:
            self._give_up(created)
            raise RunError(
                f"{self.given}: cannot be written ({error}){self._kept(plan)}"
            ) from error
        except UserError as error:
            self._give_up(created)
            kept = (
                f"; {self._done():,} of {len(plan.units):,} units are kept in '{self.partial}',"
                " --force discards them"
            )
            raise UserError(f"{error}{kept if self._done() else ''}") from None
        except BaseException as error:
            self._give_up(created)
            if isinstance(error, KeyboardInterrupt):
                error.args = (self._kept(plan),)
            raise
        finally:
            self._leave()

    def _make(self, plan: WorkPlan, tokenizer: Tokenizer) -> list[Path]:
        """Begin the folder, or join those that work in it; returns the parent folders that had to
        be made.
        """
        created = [folder for folder in self.partial.parents if not folder.exists()]
        begun = False
        try:
            if not (self.partial / PLAN).exists():
                begun = self._begin(plan, tokenizer)
            self._in_use = _shared_lock(self.partial / PLAN)
        except OSError as error:
            _remove_empty(created)
            raise UserError(f"--output: '{self.given}' cannot be made ({error.strerror})") from None
        theirs = WorkPlan.load(self.partial)
        if theirs is None or theirs.digest != plan.digest:
            self._leave()
            what = "it" if theirs is None else f"it {_difference(theirs.settings, plan.settings)}"
            raise UserError(
                f"--output: '{self.given}': another command is preparing {what}; choose another"
                " folder"
            )
        # it came after `finished` looked, before this folder kept others out
        if os.path.lexists(self.given) and not self._replaces:
            self._leave()
            if begun:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(taken_in_the_meantime(self.given, "--output"))
        return created

    def _begin(self, plan: WorkPlan, tokenizer: Tokenizer) -> bool:
        """Make the folder with all it needs under another name, then rename it; False if another
        process was faster.
        """
        own = self.partial.with_name(f".{self.partial.name}-{uuid.uuid4().hex[:8]}")
        try:
            for folder in _WORKING:
                (own / folder).mkdir(parents=True)
            tokenizer.save(own / "tokenizer")
            plan.save(own)
            sync_tree(own)
            try:
                name_new_folder(own, self.partial, self.partial, "--output")
            except UserError:
                return False
            sync_folder(self.partial.parent)
            return True
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _leave(self) -> bool:
        """Stop working in the folder; whether no other process is known to."""
        if self._in_use is None:
            return True
        alone = _is_only_user(self._in_use)
        self._in_use.close()
        self._in_use = None
        return alone

    def _kept(self, plan: WorkPlan) -> str:
        if (self.partial / MANIFEST).exists():
            return f"; all is written and kept in '{self.partial}': the same command ends it"
        done = self._done()
        kept = (
            f"; {done:,} of {len(plan.units):,} units are finished and kept in '{self.partial}':"
            " the same command goes on"
        )
        return kept if done else ""

    def _done(self) -> int:
        folder = self.partial / ENTRIES
        return sum(path.suffix == ".json" for path in folder.iterdir()) if folder.is_dir() else 0

    def _give_up(self, created: list[Path]) -> None:
        """Leave nothing behind, if nothing is worth keeping."""
        if not self._leave() or self._shared or (self.partial / MANIFEST).exists():
            return
        results = [
            path
            for name in (ENTRIES, HASHES, DUPLICATES)
            for path in (self.partial / name).glob("[0-9]*")
        ]
        if any(path.suffix in (".json", ".npy") for path in results):
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        _remove_empty(created)

    def publish(self) -> Manifest:
        """Remove what only the work needed, and take the name."""
        for name in _WORKING:
            _remove(self.partial / name)
        _remove_partial_files(self.partial)
        for path in self.partial.glob(f"{PLAN}?*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.partial / PLAN).unlink(missing_ok=True)
        sync_folder(self.partial)
        if self._replaces:
            swap(self.partial, self.final)
        else:
            self._take_free_name()
        sync_folder(self.final.parent)
        return Manifest.load(self.final)

    def _take_free_name(self) -> None:
        try:
            name_new_folder(self.partial, self.given, self.final, "--output")
        except UserError as taken:
            raise UserError(
                f"{taken}; this corpus is whole in '{self.partial}': move one away and run the same"
                " command again"
            ) from None


def _shared_lock(path: Path) -> BinaryIO:
    """The file, with a lock that any number of processes may hold as long as they keep it open;
    without one where the file system has no locks.
    """
    file = open(path, "r+b")  # noqa: SIM115 (open while this process works; for writing, which locks on network file systems need)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def _is_only_user(file: BinaryIO) -> bool:
    """Whether no other process holds a lock on the file, as far as the file system tells."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


def _is_in_use(path: Path) -> bool:
    with open(path, "r+b") as file:
        return not _is_only_user(file)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # someone else uses it by now
            folder.rmdir()


def _remove(folder: Path) -> None:
    """Also while another process still adds files: once the folder is gone, it cannot."""
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise RunError(f"{folder}: cannot be removed")


def _remove_partial_files(folder: Path) -> None:
    """Of killed workers."""
    for path in folder.glob("*.partial-*"):
        path.unlink(missing_ok=True)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.load(folder)
    except UserError:
        return None


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Which settings are not the same, else the inputs."""
    keys = sorted(
        key for key in {*theirs, *ours} - {"evaluation"} if theirs.get(key) != ours.get(key)
    )
    changed = [f"{key} {theirs.get(key)!r}, now {ours.get(key)!r}" for key in keys]
    return (
        f"with other settings ({'; '.join(changed)})"
        if changed
        else "of other inputs, or ones that have changed since"
    )

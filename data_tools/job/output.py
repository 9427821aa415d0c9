"""The output folder of a preparation: OUTPUT.partial keeps finished units, and becomes OUTPUT.

Any number of processes with the same inputs and settings may work in OUTPUT.partial. Others are
kept out: the folder appears by one rename with its plan inside, and every process compares that
plan with its own.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_tools.filters.dedup import DUPLICATES, HASHES
from data_tools.job.locks import is_locked, is_only_holder, lock_shared
from data_tools.job.unit_result import RESULTS, UNIT_SHARDS
from data_tools.job.work_plan import PLAN, WorkPlan
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
from llada.types import JsonObject

_REMOVE_ATTEMPTS = 100
_WORK_FOLDERS = (RESULTS, UNIT_SHARDS, HASHES, DUPLICATES)
"""Folders that only the work needs, and that are not in the finished corpus."""


class OutputFolder:
    """The output of a preparation.

    Args:
        output: folder to make, as the user wrote it.
        force: whether to replace a prepared corpus there, or to discard another unfinished
            preparation.
        shared: whether other tasks work on the same corpus.

    Attributes:
        output: folder to make, as the user wrote it, for messages.
        final: path of the finished corpus.
        partial: path of the corpus while it is made.

    Raises:
        UserError: a folder cannot have this name.
    """

    def __init__(self, output: str | Path, force: bool, shared: bool) -> None:
        self.output = output
        self.final = final_path(output, "--output")
        self.partial = self.final.with_name(f"{self.final.name}.partial")
        self._force = force
        self._shared = shared
        self._replaces = False
        self._plan_lock: BinaryIO | None = None

    # -- earlier work ------------------------------------------------------------------------------

    def find_finished(self, digest: str, settings: JsonObject) -> Manifest | None:
        """Return the manifest of a finished corpus made of the same inputs with the same settings.

        With `force` such a corpus is made again, unless other tasks share the work: then one of
        them may just have finished it.

        Args:
            digest: digest of inputs and settings.
            settings: settings of this preparation, for the message about another corpus.

        Raises:
            UserError: the output exists and may not be replaced.
        """
        if not os.path.lexists(self.output):
            return None
        manifest = _load_manifest(self.final)
        if manifest is not None:
            if manifest.plan == digest and (self._shared or not self._force):
                return manifest
            if not self._force:
                its_settings = {
                    **manifest.options,
                    "kind": manifest.kind,
                    "tokenizer": manifest.tokenizer_fingerprint,
                }
                raise UserError(
                    f"--output: '{self.output}' exists, a corpus prepared"
                    f" {_difference(its_settings, settings)}; --force replaces a prepared corpus"
                )
        check_replaceable(
            Path(self.output),
            self.final,
            self._force,
            "a prepared corpus",
            CORPUS_FILES,
            "--output",
        )
        self._replaces = True
        return None

    def find_unfinished(self, digest: str, settings: JsonObject) -> WorkPlan | None:
        """Return the plan of an interrupted preparation of the same inputs and settings.

        With `force`, a preparation of other inputs or settings is removed.

        Args:
            digest: digest of inputs and settings.
            settings: settings of this preparation, for the message about another one.

        Raises:
            UserError: the folder exists, is something else, and is not removed.
        """
        if not self.partial.exists():
            return None
        plan = WorkPlan.load(self.partial)
        if plan is None:
            # An empty folder does not matter: a rename replaces it.
            if self.partial.is_dir() and not any(self.partial.iterdir()):
                return None
            raise UserError(
                f"--output: '{self.partial}' exists and is not an unfinished preparation; move it"
                " or choose another output"
            )
        if plan.digest == digest:
            return plan
        if not self._force:
            raise UserError(
                f"--output: '{self.partial}' contains an unfinished preparation"
                f" {_difference(plan.settings, settings)}; --force discards it and starts over"
            )
        # If several tasks have --force, one would remove what another has just begun.
        if self._shared or is_locked(self.partial / PLAN):
            raise UserError(
                f"--force: '{self.partial}' was made from other inputs or settings, and other"
                " processes may be using it; stop them and remove it first"
            )
        shutil.rmtree(self.partial)
        return None

    def finished_by_another(self, digest: str) -> Manifest | None:
        """Return the manifest if another process has finished the same corpus."""
        if self.partial.exists():
            return None
        manifest = _load_manifest(self.final)
        if manifest is None or manifest.plan != digest:
            return None
        # Temporary files of this process may have been renamed with the folder.
        _remove_temporary_files(self.final)
        return manifest

    def is_written(self, digest: str) -> bool:
        """Return whether the corpus is complete except for its final name."""
        manifest = _load_manifest(self.partial)
        return manifest is not None and manifest.plan == digest

    # -- work in the folder ------------------------------------------------------------------------

    @contextmanager
    def working(self, plan: WorkPlan, tokenizer: Tokenizer) -> Iterator[Path]:
        """Make or join OUTPUT.partial, and hold a lock on its plan while the block runs.

        After an error the folder stays if it contains finished work. The messages of errors then
        say so; after an interrupt, `describe_kept` does.

        Args:
            plan: plan of the preparation.
            tokenizer: tokenizer to save with the corpus.

        Raises:
            UserError: the folder cannot be created, or another preparation uses it.
            RunError: the operating system refused to write.
        """
        created_parents = self._make(plan, tokenizer)
        try:
            with self._cleaned_up(created_parents):
                yield self.partial
        except OSError as error:
            raise RunError(
                f"{self.output}: cannot be written ({error}){self.describe_kept(plan)}"
            ) from error
        except UserError as error:
            kept = ""
            finished = self._count_finished()
            if finished:
                kept = (
                    f"; {finished:,} of {len(plan.units):,} units are kept in '{self.partial}',"
                    " --force discards them"
                )
            raise UserError(f"{error}{kept}") from None

    @contextmanager
    def _cleaned_up(self, created_parents: list[Path]) -> Iterator[None]:
        """Release the lock after the block, and clean the folder up if the block raised."""
        try:
            yield
        except BaseException:
            self._clean_up(created_parents)
            raise
        finally:
            self._unlock()

    def _make(self, plan: WorkPlan, tokenizer: Tokenizer) -> list[Path]:
        """Make the folder or join the processes in it; return the parents that were made."""
        created_parents = [folder for folder in self.partial.parents if not folder.exists()]
        began = False
        try:
            if not (self.partial / PLAN).exists():
                began = self._begin(plan, tokenizer)
            self._plan_lock = lock_shared(self.partial / PLAN)
        except OSError as error:
            _remove_empty(created_parents)
            raise UserError(
                f"--output: '{self.output}' cannot be created ({error.strerror})"
            ) from None
        # Under the lock, the plan stays what it is: no process with --force removes the folder.
        other = WorkPlan.load(self.partial)
        if other is None or other.digest != plan.digest:
            self._unlock()
            prepared = "it"
            if other is not None:
                prepared = f"it {_difference(other.settings, plan.settings)}"
            raise UserError(
                f"--output: '{self.output}': another command is preparing {prepared}; choose"
                " another folder"
            )
        # Another command may have finished a corpus after `find_finished` and before this folder
        # kept others out.
        if os.path.lexists(self.output) and not self._replaces:
            self._unlock()
            if began:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(taken_in_the_meantime(self.output, "--output"))
        return created_parents

    def _begin(self, plan: WorkPlan, tokenizer: Tokenizer) -> bool:
        """Make the folder and its content under another name, then rename it.

        Returns:
            Whether this process made it; False if another one was faster.
        """
        own = self.partial.with_name(f".{self.partial.name}-{uuid.uuid4().hex[:8]}")
        try:
            for name in _WORK_FOLDERS:
                (own / name).mkdir(parents=True)
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

    def _unlock(self) -> bool:
        """Release the lock on the plan; return whether no other process is known to hold one."""
        if self._plan_lock is None:
            return True
        is_alone = is_only_holder(self._plan_lock)
        self._plan_lock.close()
        self._plan_lock = None
        return is_alone

    def describe_kept(self, plan: WorkPlan) -> str:
        """Return the end of a message: what is kept, and how to continue; "" if nothing is kept."""
        if (self.partial / MANIFEST).exists():
            return (
                f"; everything is written and kept in '{self.partial}': run the same command to"
                " finish"
            )
        finished = self._count_finished()
        if not finished:
            return ""
        return (
            f"; {finished:,} of {len(plan.units):,} units are finished and kept in"
            f" '{self.partial}': run the same command to continue"
        )

    def _count_finished(self) -> int:
        """Count the results of units."""
        folder = self.partial / RESULTS
        if not folder.is_dir():
            return 0
        return sum(path.suffix == ".json" for path in folder.iterdir())

    def _clean_up(self, created_parents: list[Path]) -> None:
        """Remove the folder after an error, unless it is in use or contains finished work."""
        if not self._unlock() or self._shared or (self.partial / MANIFEST).exists():
            return
        for name in (RESULTS, HASHES, DUPLICATES):
            for path in (self.partial / name).glob("[0-9]*"):
                # Results, hashes or duplicates, and not their temporary files.
                if path.suffix in (".json", ".npy"):
                    return
        shutil.rmtree(self.partial, ignore_errors=True)
        _remove_empty(created_parents)

    # -- the finished corpus -----------------------------------------------------------------------

    def publish(self) -> Manifest:
        """Remove what only the work needed, and rename the folder to OUTPUT.

        Raises:
            UserError: OUTPUT exists by now; the corpus stays in OUTPUT.partial.
        """
        for name in _WORK_FOLDERS:
            _remove_used_folder(self.partial / name)
        _remove_temporary_files(self.partial)
        # Temporary files of the plan begin with its name.
        for path in self.partial.glob(f"{PLAN}?*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        # The plan keeps out commands with other settings, so it is removed last.
        (self.partial / PLAN).unlink(missing_ok=True)
        sync_folder(self.partial)
        if self._replaces:
            swap(self.partial, self.final)
        else:
            self._rename_to_free_name()
        sync_folder(self.final.parent)
        return Manifest.load(self.final)

    def _rename_to_free_name(self) -> None:
        try:
            name_new_folder(self.partial, self.output, self.final, "--output")
        except UserError as taken:
            raise UserError(
                f"{taken}; this corpus is complete in '{self.partial}': move either of them and run"
                " the same command again"
            ) from None


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders from the innermost to the outermost, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):  # in use by now
            folder.rmdir()


def _remove_used_folder(folder: Path) -> None:
    """Remove a folder to which other processes may still add files.

    Raises:
        RunError: it still exists after many attempts.
    """
    for _ in range(_REMOVE_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
    raise RunError(f"{folder}: cannot be removed")


def _remove_temporary_files(folder: Path) -> None:
    """Remove unfinished files that killed workers have left."""
    for path in folder.glob("*.partial-*"):
        path.unlink(missing_ok=True)


def _load_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.load(folder)
    except UserError:
        return None


def _difference(theirs: JsonObject, ours: JsonObject) -> str:
    """Describe how another preparation differs from this one."""
    changed: list[str] = []
    for key in sorted({*theirs, *ours}):
        # "evaluation" contains checksums of files, which tell a reader nothing.
        if key != "evaluation" and theirs.get(key) != ours.get(key):
            changed.append(f"{key} {theirs.get(key)!r}, now {ours.get(key)!r}")
    if changed:
        return f"with other settings ({'; '.join(changed)})"
    return "of other inputs, or of inputs that have changed since"

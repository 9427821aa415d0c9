"""One run folder, one process that writes to it: RUN/lock names the holder, who keeps touching it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llada.errors import TryAgain, UserError

NAME = "lock"


class RunLock:
    """Holds a run folder until `release`.

    A lock whose holder is gone is taken over: at once where that can be told (a dead process of this host, an earlier attempt of the
    same Slurm job), else when it has not been touched for `stale` seconds of the file server's clock.

    Args:
        folder: of the run; exists.
        beat: seconds between touches.
        stale: seconds without a touch after which the holder counts as gone.
        stopped: true once this process is asked to stop, which ends the waiting.

    Raises:
        UserError: the holder is alive and is named; or the lock is a folder, or a file that no run wrote.
        TryAgain: asked to stop while waiting.
        OSError: the lock cannot be written; nothing of it is left.
    """

    def __init__(self, folder: Path, beat: float = 10.0, stale: float = 60.0, stopped: Callable[[], bool] = lambda: False) -> None:
        self._folder, self._path = folder, folder / NAME
        self._beat, self._stale, self._stopped = beat, stale, stopped
        self._own = _this_process()
        self._announced = False
        while not self._create():
            self._wait_for_holder()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others use the folder."""
        self._ended.set()
        self._thread.join()
        if _read(self._path) == self._own:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            file = open(self._path, "x", encoding="utf-8")  # noqa: SIM115 (closed below, where a full disk may show)
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(self._own))
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _wait_for_holder(self) -> None:
        """Return when the lock may be tried again."""
        self._refuse_foreign()
        holder = _read(self._path)
        touched = self._touched()
        while holder is not None and touched is not None and not _gone(holder, self._own):
            if self._now() - touched > self._stale * 1e9:
                break
            if self._stopped():
                raise TryAgain(f"stopped while waiting for {self._path}, held by {_describe(holder)}; run the same command again")
            time.sleep(min(1.0, self._beat / 4))
            self._announce(holder)
            again, holder = self._touched(), _read(self._path)
            if again is not None and again != touched:
                raise UserError(
                    f"run.dir: '{self._folder}' is in use by {_describe(holder)}; stop that first, or choose another run.dir"
                ) from None
            touched = again
        if touched is not None and _read(self._path) == holder:
            self._remove(holder)

    def _refuse_foreign(self) -> None:
        """Raises UserError for a lock that no run can have left, which must not be deleted."""
        if self._path.is_dir():
            what = "a folder"
        elif self._path.is_symlink():
            what = "a link"
        elif self._path.exists() and not self._path.is_file():
            what = "a pipe, a socket or a device"
        elif _is_foreign(self._path):
            what = "a file that no run wrote"
        else:
            return
        raise UserError(f"run.dir: '{self._path}' is {what}, and a run keeps its lock there; move it away, or choose another run.dir")

    def _announce(self, holder: dict[str, Any]) -> None:
        """Say once what is waited for."""
        if not self._announced:
            print(
                f"waiting for {self._path}, held by {_describe(holder)}; it counts as left behind after {self._stale:.0f} s without a sign",
                file=sys.stderr,
                flush=True,
            )
        self._announced = True

    def _remove(self, stale: dict[str, Any] | None) -> None:
        """Remove a lock whose holder is gone; of several processes that saw it, one does."""
        aside = self._folder / f"{NAME}.{uuid.uuid4().hex[:8]}"
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != stale:  # another was faster, and this is its new lock: back with it
            with suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink()

    def _touched(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _now(self) -> int:
        """Nanoseconds since 1970 by the file server's clock, which is the one that dates the touches."""
        probe = self._folder / f"{NAME}.{uuid.uuid4().hex[:8]}"
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()

    def _keep(self) -> None:
        while not self._ended.wait(self._beat):
            if _read(self._path) not in (self._own, None):
                print(
                    f"failed: {self._folder} was taken over by {_describe(_read(self._path))} while this process did not answer",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # going on would write the same files as the new holder
            try:
                os.utime(self._path)
            except OSError:
                continue  # a file server that is away for a moment; the next touch tries again


def holder(folder: Path, stale: float = 60.0) -> str | None:
    """Who holds a run folder, in words; None: nobody who is known to be alive."""
    found = _alive(folder, stale)
    return None if found is None else _describe(found)


def holding_process(folder: Path, stale: float = 60.0) -> tuple[str, int] | None:
    """Host and number of the process that holds a run folder; None: nobody who is known to be alive."""
    found = _alive(folder, stale)
    return None if found is None else (str(found.get("host")), int(found.get("pid", 0)))


def _alive(folder: Path, stale: float) -> dict[str, Any] | None:
    path = folder / NAME
    found = _read(path)
    if not found or _gone(found, _this_process()):
        return None
    try:
        return found if time.time() - path.stat().st_mtime < stale else None
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "attempt": os.environ.get("LLADA_ATTEMPT"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _born(pid: int) -> str | None:
    """When a process of this host started, in a form that no later process with its number has."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{ticks}"
    except (OSError, IndexError):
        return None


def _gone(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a holder is known to have ended."""
    if own["job"] is not None and holder.get("job") == own["job"] and None not in (own["attempt"], holder.get("attempt")):
        return bool(holder["attempt"] != own["attempt"])  # Slurm starts a job again only when all of it has ended
    if holder.get("host") != own["host"]:
        return False
    pid = holder.get("pid")
    if pid == own["pid"] or not isinstance(pid, int):
        return True
    born = _born(pid)
    return (born is None and own["born"] is not None) or holder.get("born") != born


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _is_foreign(path: Path) -> bool:
    """Whether a file holds something else than a lock, a torn one or the nothing that a crash leaves."""
    try:
        content = path.read_bytes().strip(b"\0 \r\n\t")
    except OSError:
        return False
    return bool(content) and not content.startswith(b"{")


def _describe(holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    if "pid" not in holder:
        return "a process that it does not name"
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid', '?')} on host {holder.get('host', '?')} since {holder.get('since', '?')}"

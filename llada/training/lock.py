"""RUN/lock: one process at a time writes to a run folder. It names the holder, who touches it.

On the same host, or in the same Slurm job, a dead holder is detected at once: its process does not
exist, or it is an earlier attempt. On other hosts, the only sign is the time of its last touch.
"""

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
from typing import Any, TypeAlias

from llada.errors import TryAgain, UserError

NAME = "lock"

Holder: TypeAlias = dict[str, Any]
"""Content of a lock: host, pid, born, job, attempt and since; empty where it cannot be read."""


class RunLock:
    """Holds a run folder until `release`.

    A lock whose holder is gone is taken over: at once where that can be told (a dead process of
    this host, an earlier attempt of the same Slurm job), else when it has not been touched for
    `stale` seconds of the file server's clock.

    Args:
        folder: the run folder, which exists.
        beat: seconds between touches.
        stale: seconds without a touch after which the holder counts as gone.
        stopped: true once this process is asked to stop, which ends the waiting.

    Raises:
        UserError: the holder is alive and is named; or the lock is a folder, or a file that no run
            wrote.
        TryAgain: asked to stop while waiting.
        OSError: the lock cannot be written; nothing of it is left.
    """

    def __init__(
        self,
        folder: Path,
        beat: float = 10.0,
        stale: float = 60.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder = folder
        self._path = folder / NAME
        self._beat = beat
        self._stale = stale
        self._stopped = stopped
        self._own = _this_process()
        self._announced = False
        while not self._create():
            self._wait_for_holder()
        # Touched by a thread of its own: a long step must not look like a dead process.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others use the folder."""
        self._ended.set()
        self._thread.join()
        if _read(self._path) == self._own:  # else another process has taken it over
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the lock; return whether it was free."""
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
        """Return when the lock may be tried again.

        Raises:
            UserError: the holder touches the lock, so it is alive; or no run wrote the lock.
            TryAgain: asked to stop.
        """
        self._refuse_foreign()
        holder = _read(self._path)
        touched = self._touched()
        while holder is not None and touched is not None and not _has_ended(holder, self._own):
            if self._now() - touched > self._stale * 1e9:
                break
            if self._stopped():
                raise TryAgain(
                    f"stopped while waiting for {self._path}, held by {_describe(holder)}; run the"
                    " same command again"
                )
            time.sleep(min(1.0, self._beat / 4))
            self._announce(holder)
            # A touch while this waited proves that the holder is alive, whatever the clocks say.
            touched_again = self._touched()
            holder = _read(self._path)
            if touched_again is not None and touched_again != touched:
                raise UserError(
                    f"run.dir: '{self._folder}' is in use by {_describe(holder)}; stop that first,"
                    " or choose another run.dir"
                ) from None
            touched = touched_again
        # Only if it is still the same holder's.
        if touched is not None and _read(self._path) == holder:
            self._remove(holder)

    def _refuse_foreign(self) -> None:
        """Raise UserError for a lock that no run can have left, which must not be deleted."""
        if self._path.is_dir():
            description = "a folder"
        elif self._path.is_symlink():
            description = "a link"
        elif self._path.exists() and not self._path.is_file():
            description = "a pipe, a socket or a device"
        elif _is_foreign(self._path):
            description = "a file that no run wrote"
        else:
            return
        raise UserError(
            f"run.dir: '{self._path}' is {description}, and a run keeps its lock there; move it"
            " away, or choose another run.dir"
        )

    def _announce(self, holder: Holder) -> None:
        """Print, once, what is waited for."""
        if not self._announced:
            print(
                f"waiting for {self._path}, held by {_describe(holder)}; it is treated as stale"
                f" after {self._stale:.0f} s without a heartbeat",
                file=sys.stderr,
                flush=True,
            )
        self._announced = True

    def _remove(self, stale: Holder | None) -> None:
        """Remove a lock whose holder is gone; of several processes that saw it, one does."""
        renamed = self._folder / f"{NAME}.{uuid.uuid4().hex[:8]}"
        try:
            os.rename(self._path, renamed)
        except FileNotFoundError:
            return
        if _read(renamed) != stale:
            # Another process was faster, and this is its new lock: put it back.
            with suppress(FileExistsError):
                os.link(renamed, self._path)
        renamed.unlink()

    def _touched(self) -> int | None:
        """Return when the lock was last touched, nanoseconds since 1970; None: it is gone."""
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _now(self) -> int:
        """Return nanoseconds since 1970 by the file server's clock, which dates the touches."""
        probe = self._folder / f"{NAME}.{uuid.uuid4().hex[:8]}"
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()

    def _keep(self) -> None:
        """Touch the lock until it is released; end the process if another one took it over."""
        while not self._ended.wait(self._beat):
            holder = _read(self._path)
            if holder not in (self._own, None):
                print(
                    f"failed: {self._folder} was taken over by {_describe(holder)} while this"
                    " process did not answer",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # going on would write the same files as the new holder
            try:
                os.utime(self._path)
            except OSError:
                # The file server may be unreachable for a moment; the next touch tries again.
                continue


def describe_holder(folder: Path, stale: float = 60.0) -> str | None:
    """Describe who holds a run folder; None if no live holder is known."""
    alive = _living_holder(folder, stale)
    if alive is None:
        return None
    return _describe(alive)


def holding_process(folder: Path, stale: float = 60.0) -> tuple[str, int] | None:
    """Return host and process id of who holds a run folder.

    None if no live holder is known.
    """
    alive = _living_holder(folder, stale)
    if alive is None:
        return None
    return str(alive.get("host")), int(alive.get("pid", 0))


def _living_holder(folder: Path, stale: float) -> Holder | None:
    path = folder / NAME
    content = _read(path)
    if not content or _has_ended(content, _this_process()):
        return None
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    if age >= stale:
        return None
    return content


def _this_process() -> Holder:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "attempt": os.environ.get("LLADA_ATTEMPT"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _born(pid: int) -> str | None:
    """Return when a process of this host started: boot and clock ticks since.

    No later process with the same number has the same value. None: there is no such process, or no
    /proc.
    """
    try:
        # Field 22 of /proc/PID/stat. Fields are counted behind the last parenthesis, since the
        # command's name before it may contain spaces.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return f"{boot}:{ticks}"


def _has_ended(holder: Holder, own: Holder) -> bool:
    """Return whether a holder is known to have ended.

    Args:
        holder: content of the lock.
        own: what this process would write.
    """
    same_job = own["job"] is not None and holder.get("job") == own["job"]
    if same_job and own["attempt"] is not None and holder.get("attempt") is not None:
        # Slurm starts a job again only when all of it has ended.
        return bool(holder["attempt"] != own["attempt"])
    if holder.get("host") != own["host"]:
        return False
    pid = holder.get("pid")
    if pid == own["pid"] or not isinstance(pid, int):
        return True  # this process does not hold it, so an earlier one with its number did
    born = _born(pid)
    if born is None and own["born"] is not None:
        return True  # this host tells when processes started, and there is no such process
    return holder.get("born") != born


def _read(path: Path) -> Holder | None:
    """Return the content of a lock; empty if it cannot be read, None if there is none."""
    try:
        # To open a pipe would wait for its writer.
        if path.exists() and not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_foreign(path: Path) -> bool:
    """Return whether a file contains something else than a lock.

    A torn lock, and the zeros that a crash may leave, are no foreign content.
    """
    try:
        content = path.read_bytes().strip(b"\0 \r\n\t")
    except OSError:
        return False
    return bool(content) and not content.startswith(b"{")


def _describe(holder: Holder | None) -> str:
    if holder is None or "pid" not in holder:
        return "a process that it does not name"
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return (
        f"{job}process {holder['pid']} on host {holder.get('host', '?')} since"
        f" {holder.get('since', '?')}"
    )

"""Python programs in processes of their own: forked from a process with all imports, or fresh."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.forkserver import HEADER, MODULES

SERVER = "LLADA_TESTS_FORKSERVER"
"""Environment variable with the address of the fork server (tests/forkserver.py), which is the name
of an abstract Unix socket.
"""
PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL
ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def fork_server(modules: tuple[str, ...] = MODULES) -> Iterator[str]:
    """Run a fork server that imports `modules` for the time of the block; yields its address."""
    with socket.socket(socket.AF_UNIX) as listener:
        address = f"llada-tests-{os.getpid()}-{time.monotonic_ns()}"
        listener.bind(f"\0{address}")
        listener.listen(128)
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.forkserver",
            str(listener.fileno()),
            *modules,
        ]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=PIPE,
            stdout=DEVNULL,
            pass_fds=[listener.fileno()],
        )
    try:
        yield address
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


class Forked:
    """A forked program, with the part of the interface of subprocess.Popen that tests use.

    Its streams are text.

    Args:
        arguments: what follows `python -W ignore`.
        address: of the fork server.
        stdin, stdout, stderr: PIPE, DEVNULL, STDOUT, a file, or None for this process's own.

    Raises:
        Declined: the environment needs another interpreter.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        address: str,
        cwd: str | Path,
        env: dict[str, str],
        stdin: Any,
        stdout: Any,
        stderr: Any,
    ) -> None:
        self.args = [sys.executable, "-W", "ignore", *arguments]
        self.returncode: int | None = None
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self._readers: dict[str, _Reader] = {}
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(f"\0{address}")
        self._answers = self._connection.makefile("r")
        descriptors = self._open(stdin, stdout, stderr)
        request = {
            "arguments": [str(word) for word in arguments],
            "directory": str(cwd),
            "environment": env,
        }
        text = json.dumps(request).encode()
        try:
            socket.send_fds(self._connection, [HEADER.pack(len(text))], descriptors)
            self._connection.sendall(text)
        finally:
            for stream in descriptors:
                os.close(stream)
        answer = json.loads(self._answers.readline() or '{"failed": "the fork server ended"}')
        if "pid" not in answer:
            self._close()
            if "differs" in answer:
                raise Declined(answer["differs"])
            raise RuntimeError(answer["failed"])
        self.pid: int = answer["pid"]

    def _open(self, stdin: Any, stdout: Any, stderr: Any) -> list[int]:
        """The program's descriptors 0 to 2; of a pipe, the other end becomes our attribute."""
        descriptors = []
        for number, (name, stream) in enumerate(
            (("stdin", stdin), ("stdout", stdout), ("stderr", stderr))
        ):
            if stream == PIPE:
                read, write = os.pipe()
                if name == "stdin":
                    self.stdin = open(write, "w")  # noqa: SIM115
                    descriptors.append(read)
                else:
                    setattr(self, name, open(read))  # noqa: SIM115
                    descriptors.append(write)
            elif stream == DEVNULL:
                descriptors.append(os.open(os.devnull, os.O_RDWR))
            elif stream == subprocess.STDOUT:
                descriptors.append(os.dup(descriptors[1]))
            elif stream is None:
                descriptors.append(os.dup(number))
            else:
                descriptors.append(os.dup(stream.fileno()))
        return descriptors

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        if self.returncode is None:
            ready, _, _ = select.select([self._connection], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            line = self._answers.readline()
            if line:
                self.returncode = json.loads(line)["code"]
            else:  # the server ended, and its programs with it
                self.returncode = -signal.SIGKILL
            self._answers.close()
            self._connection.close()
        return self.returncode

    def communicate(
        self, input: str | None = None, timeout: float | None = None
    ) -> tuple[str, str]:
        """Write `input`, read both streams to their ends, and wait.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; another call continues where this
                one stopped.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            self._readers = {name: _Reader(getattr(self, name)) for name in ("stdout", "stderr")}
        if self.stdin is not None and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input or "")
        for reader in self._readers.values():
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self._readers["stdout"].text, self._readers["stderr"].text

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _close(self) -> None:
        self._answers.close()
        self._connection.close()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()


class Declined(Exception):
    """The fork server cannot change the start-up variable of this name."""


class _Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self._stream = stream
        self.start()

    def run(self) -> None:
        if self._stream is not None:
            with self._stream:
                self.text = self._stream.read()


Process = Forked | subprocess.Popen[str]


def start(
    *arguments: str,
    cwd: str | Path,
    env: dict[str, str],
    fresh: bool = False,
    stdin: Any = DEVNULL,
    stdout: Any = PIPE,
    stderr: Any = PIPE,
) -> Process:
    """Start `python -W ignore ARGUMENTS`.

    Args:
        fresh: use a new interpreter; for tests of start-up, imports and signals, and of what
            differs from one process to the next. Otherwise fork, unless `env` has other start-up
            variables than the fork server.
    """
    address = os.environ.get(SERVER)
    if address and not fresh:
        with contextlib.suppress(Declined):
            return Forked(arguments, address, cwd, env, stdin, stdout, stderr)
    command = [sys.executable, "-W", "ignore", *(str(word) for word in arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr, text=True
    )

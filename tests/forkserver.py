"""A process that has imported torch, Megatron-Core and transformers, and forks test programs.

Importing all that takes seconds, a fork a tenth of one. The server itself only imports: it starts
no thread and computes nothing, since threads do not survive a fork. It imports at the first
request, serves any number of programs at once, and ends when its standard input is closed, which
the test run holds open. Its programs end with it.

A program gets its own arguments, working directory, environment and standard streams, and the exit
code that it would have had. What a fork cannot give it is another interpreter: a request with other
start-up variables (see STARTUP) is declined, and tests of start-up itself use a new process
(tests/processes.py).

The client sends the length in four bytes, with the three streams attached, then the request as
JSON. The answer is a line `{"pid": N}`, or `{"differs": NAME}` with the variable that cannot be
changed, or `{"failed": TEXT}` if an import failed. When the program has ended, another line
follows: `{"code": N}`, negative for a signal.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "llada.cli",
    "llada.hf.exporting",
    "llada.hf.importing",
    "llada.sampling.commands",
    "llada.training.loop",
    "data_tools.documents.text",
    "data_tools.job.build",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "omegaconf",
    "pytest",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
)
STARTUP = (
    "CUDA_",
    "GLIBC_",
    "HF_",
    "HOME",
    "KMP_",
    "LANG",
    "LC_",
    "LD_",
    "LLADA_DEVICE",
    "MALLOC_",
    "MKL_",
    "MPL",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "TORCH",
    "TRANSFORMERS_",
    "TZ",
    "XDG_",
)
"""Variables with these beginnings are read when the interpreter starts or a library is imported."""
HEADER = struct.Struct("!I")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """A program to run.

    Attributes:
        arguments: what follows `python -W ignore`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        directory: working directory.
        environment: all variables.
    """

    arguments: list[str]
    directory: str
    environment: dict[str, str]


class Server:
    """Forks programs for clients of `listener`."""

    def __init__(self, listener: socket.socket, modules: tuple[str, ...]) -> None:
        self._listener = listener
        self._pid = os.getpid()
        self._children: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._started_with = dict(os.environ)
        self._path = list(sys.path)
        self._modules = modules
        self._wakeup = socket.socketpair()

    def serve(self) -> tuple[Request, list[int]] | None:
        """Serve until standard input ends, then return None.

        In a forked program, return its request and its streams instead.
        """
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        if any(key.fileobj is not self._listener for key, _ in self._selector.select()):
            return None
        failure = self._prepare()
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == sys.stdin.fileno():
                    return None
                if key.fileobj is self._listener:
                    forked = self._accept(failure)
                    if forked is not None:
                        return forked
                elif key.fileobj is self._wakeup[0]:
                    self._wakeup[0].recv(4096)
                    self._reap()
                else:
                    self._abandon(key.data)

    def _prepare(self) -> str | None:
        """Import the modules. Returns the traceback of a failure, else None."""
        try:
            # Otherwise numpy's OpenBLAS starts its threads at import.
            os.environ["OPENBLAS_NUM_THREADS"] = "1"
            for module in self._modules:
                importlib.import_module(module)
            del os.environ["OPENBLAS_NUM_THREADS"]
            threads = [
                Path(f"/proc/self/task/{thread}/comm").read_text()
                for thread in os.listdir("/proc/self/task")
            ]
            assert len(threads) == 1, f"an import started threads: {threads}"
        except Exception:
            return traceback.format_exc()
        gc.collect()
        gc.freeze()  # a collection in a program would otherwise copy every page
        for end in self._wakeup:
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ)
        return None

    def _accept(self, failure: str | None) -> tuple[Request, list[int]] | None:
        connection, _ = self._listener.accept()
        header, streams, _, _ = socket.recv_fds(connection, HEADER.size, 3)
        if len(header) < HEADER.size:
            connection.close()
            return None
        with connection.makefile("rb") as incoming:
            request = Request(**json.loads(incoming.read(*HEADER.unpack(header))))
        declined = {"failed": failure} if failure else self._declined(request.environment)
        pid = 0 if declined else os.fork()
        if not declined and pid == 0:
            connection.close()
            self._leave()
            return request, streams
        for stream in streams:
            os.close(stream)
        _answer(connection, declined or {"pid": pid})
        if declined:
            connection.close()
        else:
            self._children[pid] = connection
            self._selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def _declined(self, environment: dict[str, str]) -> dict[str, str]:
        """The answer to a request with a start-up variable that this process cannot change.

        Both the value at the start of the server and the one that its imports set are fine. Empty
        if there is no such variable.
        """
        for name in sorted(environment.keys() | self._started_with.keys()):
            if not name.startswith(STARTUP) or name == "PYTHONPATH":
                continue
            possible = (self._started_with.get(name), os.environ.get(name))
            if environment.get(name) not in possible:
                return {"differs": name}
        return {}

    def _reap(self) -> None:
        for pid, connection in list(self._children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._forget(pid)
                _answer(connection, {"code": os.waitstatus_to_exitcode(status)})
                connection.close()

    def _abandon(self, pid: int) -> None:
        """Kill a program whose client is gone."""
        connection = self._forget(pid)
        connection.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def _forget(self, pid: int) -> socket.socket:
        connection = self._children.pop(pid)
        self._selector.unregister(connection)
        return connection

    def _leave(self) -> None:
        """Give up everything of the server, in a program that was just forked."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._pid:
            os._exit(1)  # the server ended before this process could ask to end with it
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for held in (self._listener, *self._wakeup, *self._children.values()):
            held.close()

    def environment(self, requested: dict[str, str]) -> dict[str, str]:
        """The environment of a program: as requested, plus what the imports have set."""
        imported = {
            name: value
            for name, value in os.environ.items()
            if self._started_with.get(name) != value
        }
        return {**imported, **requested}

    def search_path(self, first: str, environment: dict[str, str]) -> list[str]:
        """sys.path of a program: `first`, then PYTHONPATH, then the installation."""
        own = [
            entry for entry in self._started_with.get("PYTHONPATH", "").split(os.pathsep) if entry
        ]
        installed = [entry for entry in self._path[1:] if entry not in own]
        return [
            first,
            *(entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry),
            *installed,
        ]


def _answer(connection: socket.socket, answer: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the client is gone: the selector will say so
        connection.sendall(json.dumps(answer).encode() + b"\n")


def become(server: Server, request: Request, streams: list[int]) -> NoReturn:
    """Run the program of a request in this process, and end it as the interpreter would."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = (
        _opened_streams()
    )
    environment = server.environment(request.environment)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request.directory)
    first, *others = request.arguments
    kind = ""
    if first in ("-m", "-c"):
        kind = first
        first, *others = others
    name = first  # of a module or a file, or code
    words = others
    # The first entry of sys.path, as the interpreter sets it.
    folder = {"-m": os.getcwd(), "-c": "", "": os.path.dirname(os.path.abspath(name))}[kind]
    sys.path[:] = server.search_path(folder, environment)
    sys.path_importer_cache.clear()
    sys.argv[:] = [kind or name, *words]
    sys.orig_argv[1:] = ["-W", "ignore", *request.arguments]
    sys.modules["__main__"] = types.ModuleType("__main__")
    if "numpy" in sys.modules:
        # Otherwise all forks would draw the same numbers.
        sys.modules["numpy"].random.seed()
    _end(_run(kind, name))


def _opened_streams() -> list[io.TextIOWrapper]:
    """Text streams on the descriptors 0 to 2, opened as the interpreter does."""
    opened = []
    for number, before in enumerate((sys.__stdin__, sys.__stdout__, sys.__stderr__)):
        assert isinstance(before, io.TextIOWrapper)
        raw = io.FileIO(number, "wb" if number else "rb", closefd=False)
        raw.name = before.name  # type: ignore[misc]
        unbuffered = before.write_through  # python -u
        buffer: Any = (
            raw if unbuffered else (io.BufferedWriter if number else io.BufferedReader)(raw)
        )
        lines = not unbuffered and (number == 2 or os.isatty(number))
        opened.append(
            io.TextIOWrapper(
                buffer,
                before.encoding,
                before.errors,
                line_buffering=lines,
                write_through=unbuffered,
            )
        )
        opened[-1].mode = before.mode
    return opened


def _run(kind: str, name: str) -> int:
    """Run a program to its end. Returns its exit code."""
    try:
        if kind == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(name, "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as exit_:
        return _code(exit_)
    except BaseException as error:
        # The traceback without the frame of this function.
        tail = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(tail), tail)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        return 1
    return 0


def _code(exit_: SystemExit) -> int:
    if exit_.code is None:
        return 0
    if isinstance(exit_.code, int):
        return exit_.code & 0xFF
    print(exit_.code, file=sys.stderr)
    return 1


def _end(code: int) -> NoReturn:
    """End the process as the interpreter does, but without destroying the modules.

    That would take a second and change nothing.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(
            f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}",
            file=sys.stderr,
        )
        code = 120
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve on a listening socket: `python -W ignore -m tests.forkserver FD [MODULE ...]`."""
    # Ctrl-C is for the test run, which then closes standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server(socket.socket(fileno=int(sys.argv[1])), tuple(sys.argv[2:]))
    forked = server.serve()
    if forked is not None:
        become(server, *forked)
    os._exit(0)  # programs that still run end with it


if __name__ == "__main__":
    main()

"""A forked program behaves as one that was started afresh, and says what it cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import PIPE, ROOT, SERVER, Forked, fork_server, start
from tests.workplace import Workplace


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """A fork server of this module's own, that imports next to nothing."""
    with pytest.MonkeyPatch.context() as patch, fork_server(modules=("decimal",)) as address:
        patch.setenv(SERVER, address)
        yield


def outcome(
    fresh: bool, *arguments: str, folder: Path, given: str | None = None, **environment: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = start(
        *arguments, cwd=folder, env={**os.environ, **environment}, fresh=fresh, stdin=PIPE
    )
    assert isinstance(process, subprocess.Popen if fresh else Forked)
    out, error = process.communicate(given, timeout=60)
    assert process.poll() == process.returncode
    return process.returncode, out, error


PROGRAMS = {
    "nothing": "",
    "exit code": "import sys; sys.exit(75)",
    "exit code above a byte": "import sys; sys.exit(256 + 3)",
    "no exit code": "import sys; sys.exit()",
    "a message": "import sys; print('said'); sys.exit('why')",
    "ctrl-c": "import signal; signal.raise_signal(signal.SIGINT)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "crash": "import ctypes; ctypes.string_at(0)",
    "arguments": "import sys; print(sys.argv, __name__)",
    "input": "import sys; print(sys.stdin.read().upper())",
    "directory": "import os, sys; print(os.getcwd(), sys.path[0])",
    "environment": (
        "import os; print(os.environ['COLOUR'], os.popen('echo $COLOUR').read(),"
        " os.environ.get('ABSENT'))"
    ),
    "path": "import sys; print([entry for entry in sys.path[:3]])",
    "warnings": "import sys, warnings; warnings.warn('unheard'); print(sys.warnoptions)",
    "exit handlers": "import atexit; atexit.register(print, 'bye'); print('hi')",
    "threads": "import threading; threading.Timer(0.05, print, ['from a thread']).start()",
    "streams": (
        "import sys; print(*((s.name, s.mode, s.errors, s.line_buffering) for s in (sys.stdin,"
        " sys.stdout, sys.stderr)))"
    ),
    "unflushed": "import os, sys; sys.stdout.write('kept'); sys.stderr.write('said')",
    "a closed pipe": "import os, sys; os.close(1); print('lost')",
    "signals": (
        "import signal; print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM,"
        " signal.SIGPIPE, signal.SIGCHLD)])"
    ),
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd'))[:4])",
    "group": "import os; print(os.getpgrp(), os.getsid(0))",
    "another program": (
        "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(6 * 7)'],"
        " capture_output=True).stdout)"
    ),
    "a pool": "import multiprocessing as m; print(m.get_context('fork').Pool(2).map(abs, [-1, 2]))",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_is_like_a_new_process(name: str, tmp_path: Path) -> None:
    variables = {"COLOUR": "green", "PYTHONPATH": f"{tmp_path}/first"}
    both = [
        outcome(
            fresh, "-c", PROGRAMS[name], "one", "two", folder=tmp_path, given="words\n", **variables
        )
        for fresh in (False, True)
    ]
    assert both[0] == both[1]


def test_an_exception_ends_it_with_its_traceback(tmp_path: Path) -> None:
    for fresh in (False, True):
        code, out, error = outcome(fresh, "-c", "print('before')\n1 / 0", folder=tmp_path)
        assert (code, out) == (1, "before\n")
        assert error.startswith("Traceback (most recent call last):") and error.endswith(
            "\nZeroDivisionError: division by zero\n"
        )


def test_modules_and_files_are_run_as_python_runs_them(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    code = (
        "import sys\nfrom {0} import word\nprint(word, __name__, sys.argv[1:], sys.path[0] =="
        " sys.argv[2], __spec__ and __spec__.name)\n"
    )
    (tmp_path / "package" / "__main__.py").write_text(code.format("package.words"))
    (tmp_path / "package" / "words.py").write_text("word = 'inside'")
    (tmp_path / "package" / "script.py").write_text(code.format("words"))
    for command, folder in (
        (("-m", "package"), tmp_path),
        (("package/script.py",), tmp_path / "package"),
    ):
        both = [
            outcome(fresh, *command, "x", str(folder), folder=tmp_path) for fresh in (False, True)
        ]
        assert both[0] == both[1] and both[0][0] == 0, both
        assert both[0][1].startswith("inside __main__ ['x', ") and "True" in both[0][1]


def test_it_is_forked_from_what_is_imported(tmp_path: Path) -> None:
    _, imported, _ = outcome(
        False,
        "-c",
        "import sys; print('decimal' in sys.modules, 'llada' in sys.modules)",
        folder=tmp_path,
    )
    assert imported == "True False\n"


def test_other_start_up_variables_start_a_new_process(tmp_path: Path) -> None:
    for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        process = start(
            "-c",
            f"import os; print(os.environ['{name}'])",
            cwd=tmp_path,
            env={**os.environ, name: "7"},
        )
        assert isinstance(process, subprocess.Popen)
        assert process.communicate(timeout=60)[0] == "7\n"


def test_it_is_waited_for_and_signalled(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9)); print('ready',"
        " flush=True); signal.pause()"
    )
    process = start("-c", code, cwd=tmp_path, env=dict(os.environ))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 9
    process.send_signal(signal.SIGUSR1)  # as for Popen: nobody is there
    assert process.communicate() == ("", "")
    process = start("-c", code, cwd=tmp_path, env=dict(os.environ))
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_what_torch_says_of_a_missing_gpu_is_no_line_of_ours(tmp_path: Path) -> None:
    code = (
        "import sys; print('No CUDA runtime is found, using CUDA_HOME=/usr\\nerror: ours',"
        " file=sys.stderr)"
    )
    assert Workplace(tmp_path).run(command=("-c", code)).stderr == "error: ours\n"


def test_many_at_once_end_in_their_own_time(tmp_path: Path) -> None:
    ends: dict[int, int] = {}

    def one(number: int) -> None:
        ends[number] = outcome(
            False,
            "-c",
            f"import time; time.sleep({(7 - number) / 50}); raise SystemExit({number})",
            folder=tmp_path,
        )[0]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == {number: number for number in range(8)}


CLIENT = """
import os, sys
from tests.processes import start, fork_server, SERVER
with fork_server(modules=()) as address:
    os.environ[SERVER] = address
    program = start("-c", "import signal; signal.pause()", cwd=".", env=dict(os.environ))
    print(program.pid, os.getppid(), flush=True)
    sys.stdin.read()
"""


def test_nothing_outlives_the_test_run(tmp_path: Path) -> None:
    """A killed client: its program and the server end by themselves."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True
    )
    assert client.stdout is not None
    program, _ = client.stdout.readline().split()
    server = Path(f"/proc/{program}/stat").read_text().rsplit(")", 1)[1].split()[1]
    client.kill()
    client.communicate()
    wait_until_gone(program)
    wait_until_gone(server)


def wait_until_gone(pid: str) -> None:
    limit = threading.Event()
    for _ in range(600):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except OSError:
            return
        limit.wait(0.1)
    raise AssertionError(f"process {pid} is still there")


def test_a_server_whose_import_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fork_server(modules=("no_such_module",)) as address:
        monkeypatch.setenv(SERVER, address)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
                start("-c", "", cwd=tmp_path, env=dict(os.environ))


def test_a_module_that_starts_a_thread_is_not_imported_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "restless.py").write_text(
        "import threading, signal\nthreading.Thread(target=signal.pause, daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with fork_server(modules=("restless",)) as address:
        monkeypatch.setenv(SERVER, address)
        with pytest.raises(RuntimeError, match="an import started threads"):
            start("-c", "", cwd=tmp_path, env=dict(os.environ))

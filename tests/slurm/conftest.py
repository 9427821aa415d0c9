"""One Slurm cluster, one corpus and one uninterrupted run for all tests of this folder.

A test marked with @scenario runs beside the others on an island of nodes of its own; it needs more
patience than processor time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs
from data_tools.readers.report import Report
from launch import status as watch
from llada import events
from llada.cli import app
from llada.errors import UserError
from llada.tokenizer import train_byte_level_bpe
from tests.preparation import prepare
from tests.slurm.cluster import Cluster, missing, until
from tests.workplace import CONFIG, Workplace

PROFILE: dict[str, Any] = {
    "time": "10",
    "signal_seconds": 20,
    "numa_binding": False,
    "requeue": {"backoff": 1.0, "grace": 120.0, "start_timeout": 60.0},
    "preflight": {
        "enabled": False,
        "gpus": 0,
        "matmul_size": 128,
        "allreduce_mb": 0.5,
        "min_disk_gb": 0.1,
        "slow_factor": 1000.0,
    },
    "cpu_jobs": {"cpus": 1},
}
STEPS = 20
ISLANDS = 4
Curve = list[dict[str, Any]]


@dataclass(frozen=True)
class Place(Workplace):
    """A folder with a corpus, configs and a profile, and the `llada` command in it, whose Slurm is
    a cluster of the tests.

    Attributes:
        cluster: of the tests.
        island: whose nodes and partitions these are.
        alone: held while a command runs in this process, whose output it catches.
        whole: the curve of a run that nothing happens to.
    """

    cluster: Cluster
    island: int = 0
    alone: threading.Lock = field(default_factory=threading.Lock)
    whole: Future[Curve] = field(default_factory=Future)

    # -- the island --------------------------------------------------------------------------------

    @property
    def main(self) -> str:
        return f"main{self.island or ''}"

    @property
    def scavenge(self) -> str:
        """The partition that is preempted."""
        return f"scavenge{self.island or ''}"

    def node(self, number: int) -> str:
        """Name of one of the island's nodes."""
        return f"n{self.cluster.nodes_of(self.island)[number]}"

    def kill_node(self, number: int) -> None:
        self.cluster.kill_node(self.cluster.nodes_of(self.island)[number])

    def inside(self, number: int, *words: str) -> None:
        self.cluster.inside(self.cluster.nodes_of(self.island)[number], *words)

    def queue(self) -> str:
        """The island's jobs."""
        return self.cluster.run("squeue", "--noheader", f"--partition={self.main},{self.scavenge}")

    def clear(self) -> None:
        """Cancel the jobs that are left, and wait until every node is idle."""
        until(self._no_jobs, 120, f"no job on {self.main}", self.queue, pause=1.0)
        self.cluster.revive(self.island)

    def _no_jobs(self) -> bool:
        """Cancels those that are left: one that is being put back into the queue comes back after
        the first time.
        """
        for partition in (self.main, self.scavenge):
            self.cluster.run("scancel", "--user=root", f"--partition={partition}", check=False)
        return not self.queue()

    # -- commands ----------------------------------------------------------------------------------

    def write(self, name: str, **sections: Any) -> str:
        """A config of a run of two ranks that share every matrix: when one is gone, the other
        notices.
        """
        content = {
            **CONFIG,
            "run": {"dir": name, "threads": 1, "hang_timeout": 300.0},
            "train": {"steps": STEPS},
            "validation": {"every": 10, "windows": 8},
            "checkpoint": {"every": 5},
            "parallel": {"tensor": 2, "sequence": True},
            **sections,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return f"{name}.yaml"

    def profile(self, name: str = "profile", **settings: Any) -> str:
        merged = {
            key: {**PROFILE.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in settings.items()
        }
        path = f"{name}-{self.main}.yaml"
        (self.folder / path).write_text(
            yaml.safe_dump({"partition": self.main, **PROFILE, **merged})
        )
        return path

    def llada(self, *words: str) -> str:
        """Output of a command; a user's mistake is raised as such."""
        with self.alone:
            result = CliRunner().invoke(app, list(words), catch_exceptions=True)
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, f"{words}: {result.output} {result.exception!r}"
        return result.output

    def launch(
        self,
        name: str,
        *words: str,
        profile: str | None = None,
        nodes: int = 2,
        per_node: int = 1,
        **sections: Any,
    ) -> str:
        """Submit a run; the job's id."""
        cluster = [
            "--cluster",
            profile or self.profile(),
            "--nodes",
            str(nodes),
            "--gpus-per-node",
            str(per_node),
        ]
        self.llada("launch", self.write(name, **sections), *cluster, *words)
        sent = watch.latest(self.folder / name)
        assert sent is not None
        return sent.jobs[0]

    # -- what is seen of a run ---------------------------------------------------------------------

    def status(self, run: str) -> watch.Status:
        return watch.status(self.folder / run)

    def events(self, run: str, name: str | None = None) -> list[dict[str, Any]]:
        return [line for line in events.read(self.folder / run) if name in (None, line["event"])]

    def steps(self, run: str) -> int:
        """The last step in metrics.jsonl."""
        path = self.folder / run / "metrics.jsonl"
        raw = path.read_bytes().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in raw if line.endswith(b"}")), default=0)

    def wait_step(self, run: str, step: int, seconds: float = 60) -> None:
        until(
            lambda: self.steps(run) >= step,
            seconds,
            f"step {step} of {run}",
            lambda: self.story(run),
        )

    def wait_event(
        self, run: str, name: str, count: int = 1, seconds: float = 60
    ) -> dict[str, Any]:
        until(
            lambda: len(self.events(run, name)) >= count,
            seconds,
            f"{count} x {name} of {run}",
            lambda: self.story(run),
        )
        return self.events(run, name)[count - 1]

    def wait_state(self, run: str, state: str, seconds: float = 90) -> watch.Status:
        until(
            lambda: self.status(run).state == state,
            seconds,
            f"{run} {state}",
            lambda: self.story(run),
            pause=1.0,
        )
        return self.status(run)

    def story(self, run: str) -> str:
        """Everything that may explain a failed test."""
        told = [str(line) for line in self.events(run) if line["event"] != "step"]
        logs = [
            f"{path}:\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted((self.folder / run).glob("logs/**/*.log"))
        ]
        return "\n".join([*told, str(self.status(run)), *logs])

    # -- what is done to it ------------------------------------------------------------------------

    def ranks(self, run: str) -> dict[int, int]:
        """rank -> process, of the training processes of a run on all nodes."""
        found = {}
        marker = f"{self.folder / run}/launch/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if (
                    marker in b" ".join(words)
                    and b"pretrain" in words
                    and b"launch.job.rank" not in words
                    and b"srun" not in words[0]
                ):
                    values = dict(
                        pair.split(b"=", 1)
                        for pair in (entry / "environ").read_bytes().split(b"\0")
                        if b"=" in pair
                    )
                    if words[1:2] and words[1].endswith(b"/code"):
                        found[int(values[b"RANK"])] = int(entry.name)
            except (OSError, KeyError):
                continue
        return found

    @contextmanager
    def paused(self, run: str, ranks: int = 2) -> Iterator[None]:
        """Nobody takes a step meanwhile."""
        until(lambda: len(self.ranks(run)) == ranks, 60, f"{ranks} ranks of {run}")
        pids = self.ranks(run).values()
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    continue


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(str(item.fspath)).is_relative_to(Path(__file__).parent)]
    reason = missing(accounting=True) if own else None
    # Scenarios first: the other tests change what belongs to the whole process. Of them first those
    # that have to wait for the clock.
    beside = sorted(
        (item for item in own if hasattr(getattr(item, "obj", None), "body")),
        key=lambda item: "time_limit" not in item.name,
    )
    items[:] = [*beside, *(item for item in items if item not in beside)]
    for item in own:
        item.add_marker(pytest.mark.slurm)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"slurm: {reason}"))


@pytest.fixture(scope="session")
def disk() -> Iterator[Path]:
    """A folder that every node sees. Pytest's own may lie in /dev/shm, of which each node has one
    of its own.
    """
    with tempfile.TemporaryDirectory(prefix="llada-slurm-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def corpus(disk: Path) -> Path:
    """A folder with a tokenizer and a corpus."""
    folder = disk / "runs"
    folder.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = train_byte_level_bpe(read_inputs([library / "json"], ReadOptions(), Report()), 512)
    tokenizer.save(folder / "tokenizer")
    prepare(
        [library / "json", library / "email"],
        folder / "tokenizer",
        folder / "corpus",
        validation_fraction=0.15,
    )
    return folder


@contextmanager
def at(cluster: Cluster, folder: Path) -> Iterator[None]:
    """The commands of this process talk to a cluster, from a folder."""
    before = os.getcwd(), os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.conf)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before[0])
        if before[1] is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before[1]


@pytest.fixture(scope="session")
def cluster(disk: Path) -> Iterator[Cluster]:
    """Islands of three nodes of eight cores and four GPUs, without accounting."""
    cluster = Cluster(disk / "cluster", islands=ISLANDS)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def place(cluster: Cluster, corpus: Path) -> Iterator[Place]:
    """The corpus's folder and the first island, with every node idle and no job left; for tests
    that run alone.
    """
    with at(cluster, corpus):
        place = Place(corpus, cluster)
        yield place
        place.clear()


# -- tests side by side ----------------------------------------------------------------------------

Body = Callable[[Place], None]


def scenario(body: Body) -> Callable[[Scenarios], None]:
    """A test whose body runs beside others'; what pytest calls tells how it ended."""

    def test(scenarios: Scenarios) -> None:
        scenarios.result(body)

    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.body = body  # type: ignore[attr-defined]
    return test


class Scenarios:
    """Runs the bodies, as many at once as there are islands, in the order of the tests.

    Args:
        cluster, folder: for all of them.
        bodies: of the tests that were selected.
    """

    def __init__(self, cluster: Cluster, folder: Path, bodies: list[Body]) -> None:
        self._cluster, self._folder = cluster, folder
        self._alone = threading.Lock()
        self._over = threading.Event()
        self._whole: Future[Curve] = Future()
        self._ends: dict[Body, Future[None]] = {
            body: Future() for body in [self._run_whole, *bodies]
        }
        self._waiting: SimpleQueue[Body] = SimpleQueue()
        for body in self._ends:
            self._waiting.put(body)
        for island in range(cluster.islands):
            # Daemons: after Ctrl-C nobody waits for what they wait for.
            threading.Thread(target=self._work, args=(island,), daemon=True).start()

    def result(self, body: Body) -> None:
        """What a body raised is raised here."""
        self._ends[body].result()

    def wait(self) -> None:
        """Until every body has ended. Meanwhile pytest must not go on to another test: it would
        take over the output of the commands.
        """
        wait(self._ends.values())

    def close(self) -> None:
        """Start no further one."""
        self._over.set()

    def _work(self, island: int) -> None:
        """Run one body after the other on an island."""
        place = Place(self._folder, self._cluster, island, self._alone, self._whole)
        while not self._over.is_set():
            try:
                body = self._waiting.get_nowait()
            except Empty:
                return
            try:
                body(place)
                place.clear()
                self._ends[body].set_result(None)
            except BaseException as error:  # whatever it is, the test raises it
                self._ends[body].set_exception(error)
                with suppress(Exception):  # the next one will tell
                    place.clear()

    def _run_whole(self, place: Place) -> None:
        """An uninterrupted run of the same config, without a launcher: each rank started by srun
        itself.
        """
        try:
            words = [
                "srun",
                f"--partition={place.main}",
                "--nodes=2",
                "--ntasks-per-node=1",
                sys.executable,
                "-W",
                "ignore",
            ]
            root = str(Path(__file__).parents[2])
            environment = {
                **self._cluster.environment(),
                "MASTER_ADDR": place.node(0),
                "MASTER_PORT": "29500",
                "PYTHONPATH": root,
            }
            words += ["-m", "llada", "pretrain", place.write("whole")]
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr[-3000:]
            self._whole.set_result(place.lines("whole"))
        except BaseException as error:
            self._whole.set_exception(error)
            raise


@pytest.fixture(scope="session")
def scenarios(
    request: pytest.FixtureRequest, cluster: Cluster, corpus: Path
) -> Iterator[Scenarios]:
    """All selected scenarios, through."""
    bodies = [
        item.obj.body
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item.obj, "body")
    ]
    with at(cluster, corpus):
        running = Scenarios(cluster, corpus, bodies)
        try:
            running.wait()
            yield running
        finally:
            running.close()

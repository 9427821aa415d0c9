"""An island of a test cluster, and what tests do with a run on it: launch, watch, disturb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from launch.status import RunStatus, latest_submission, read_status
from llada import events
from llada.cli import app
from llada.errors import UserError
from tests.slurm.cluster import Cluster, until
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
"""Of every run, unless a test asks for others."""
Curve = list[dict[str, Any]]
"""metrics.jsonl without what is measured."""


@dataclass(frozen=True)
class Island(Workplace):
    """An island of a test cluster: nodes and partitions of its own, and a folder to launch from.

    The folder has a corpus, configs and profiles; the `llada` command in it talks to the cluster.

    Attributes:
        cluster: of the tests.
        index: of the island, from 0.
        console: held while a command runs in this process, whose output it catches.
        uninterrupted: the curve of a run that nothing happens to.
    """

    cluster: Cluster
    index: int = 0
    console: threading.Lock = field(default_factory=threading.Lock)
    uninterrupted: Future[Curve] = field(default_factory=Future)

    # -- the island --------------------------------------------------------------------------------

    @property
    def main(self) -> str:
        return f"main{self.index or ''}"

    @property
    def scavenge(self) -> str:
        """The partition that is preempted."""
        return f"scavenge{self.index or ''}"

    def node(self, number: int) -> str:
        """Name of one of the island's nodes."""
        return f"n{self.cluster.nodes_of(self.index)[number]}"

    def kill_node(self, number: int) -> None:
        self.cluster.kill_node(self.cluster.nodes_of(self.index)[number])

    def inside(self, number: int, *words: str) -> None:
        self.cluster.inside(self.cluster.nodes_of(self.index)[number], *words)

    def queue(self) -> str:
        """The island's jobs."""
        return self.cluster.run("squeue", "--noheader", f"--partition={self.main},{self.scavenge}")

    def clear(self) -> None:
        """Cancel the jobs that are left, and wait until every node is idle."""
        until(self._no_jobs, 120, f"no job on {self.main}", self.queue, pause=1.0)
        self.cluster.revive(self.index)

    def _no_jobs(self) -> bool:
        """Cancel the jobs that are left; returns whether none was.

        A job that is being requeued comes back after the first time.
        """
        for partition in (self.main, self.scavenge):
            self.cluster.run("scancel", "--user=root", f"--partition={partition}", check=False)
        return not self.queue()

    # -- commands ----------------------------------------------------------------------------------

    def write(self, name: str, **sections: Any) -> str:
        """Write the config of a run of two ranks; returns its path.

        The ranks share every matrix, so that when one is gone, the other notices.
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
        with self.console:
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
        sent = latest_submission(self.folder / name)
        assert sent is not None
        return sent.jobs[0]

    def launch_local(self, name: str) -> subprocess.Popen[str]:
        """Start a run of two ranks on this machine; its output can be read from the process."""
        words = ["-W", "ignore", "-m", "llada", "launch", self.write(name)]
        options = ["--local", "--gpus-per-node", "2"]
        return subprocess.Popen(
            [sys.executable, *words, *options],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    # -- what is seen of a run ---------------------------------------------------------------------

    def status(self, run: str) -> RunStatus:
        return read_status(self.folder / run)

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
            lambda: self.evidence(run),
        )

    def wait_event(
        self, run: str, name: str, count: int = 1, seconds: float = 60
    ) -> dict[str, Any]:
        until(
            lambda: len(self.events(run, name)) >= count,
            seconds,
            f"{count} x {name} of {run}",
            lambda: self.evidence(run),
        )
        return self.events(run, name)[count - 1]

    def wait_state(self, run: str, state: str, seconds: float = 90) -> RunStatus:
        until(
            lambda: self.status(run).state == state,
            seconds,
            f"{run} {state}",
            lambda: self.evidence(run),
            pause=1.0,
        )
        return self.status(run)

    def evidence(self, run: str) -> str:
        """Return everything that may explain a failed test."""
        lines = [str(line) for line in self.events(run) if line["event"] != "step"]
        logs = [
            f"{path}:\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted((self.folder / run).glob("logs/**/*.log"))
        ]
        return "\n".join([*lines, str(self.status(run)), *logs])

    # -- what is done to it ------------------------------------------------------------------------

    def ranks(self, run: str) -> dict[int, int]:
        """rank -> process, of the training processes of a run on all nodes."""
        processes = {}
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
                        processes[int(values[b"RANK"])] = int(entry.name)
            except (OSError, KeyError):
                continue
        return processes

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


@contextmanager
def commands_talk_to(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Let the commands of this process talk to a cluster, from a folder."""
    folder_before = os.getcwd()
    conf_before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.conf)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(folder_before)
        if conf_before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = conf_before

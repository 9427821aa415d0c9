"""One Slurm cluster, one corpus and one uninterrupted run for all tests of this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data_tools.prepare import prepare
from data_tools.readers import ReadOptions, Report, read
from launch import watch
from llada import events
from llada.cli import app
from llada.errors import UserError
from llada.tokenizer import train_byte_level_bpe
from tests.slurm.cluster import Cluster, missing, until
from tests.workplace import CONFIG, Workplace

PROFILE: dict[str, Any] = {
    "partition": "main",
    "time": "10",
    "signal_seconds": 20,
    "numa_binding": False,
    "requeue": {"backoff": 1.0, "grace": 8.0, "start_timeout": 60.0},
    "preflight": {"enabled": False, "gpus": 0, "matmul_size": 128, "allreduce_mb": 0.5, "min_disk_gb": 0.1, "slow_factor": 1000.0},
    "cpu_jobs": {"cpus": 1},
}
STEPS = 20


@dataclass(frozen=True)
class Place(Workplace):
    """A folder with a corpus, configs and a profile, and the `llada` command in it, whose Slurm is a cluster of the tests."""

    cluster: Cluster

    def write(self, name: str, **sections: Any) -> str:
        """A config of a run of two ranks that share every matrix: when one is gone, the other notices."""
        content = {
            **CONFIG,
            "run": {"dir": name, "threads": 1, "hang_timeout": 60.0},
            "train": {"steps": STEPS},
            "validation": {"every": 10, "windows": 8},
            "checkpoint": {"every": 5},
            "parallel": {"tensor": 2, "sequence": True},
            **sections,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        return f"{name}.yaml"

    def profile(self, name: str = "profile", **settings: Any) -> str:
        merged = {key: {**PROFILE.get(key, {}), **value} if isinstance(value, dict) else value for key, value in settings.items()}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump({**PROFILE, **merged}))
        return f"{name}.yaml"

    def llada(self, *words: str) -> str:
        """Output of a command; a user's mistake is raised as such."""
        result = CliRunner().invoke(app, list(words), catch_exceptions=True)
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, f"{words}: {result.output} {result.exception!r}"
        return result.output

    def launch(self, name: str, *words: str, profile: str | None = None, nodes: int = 2, per_node: int = 1, **sections: Any) -> str:
        """Submit a run; the job's id."""
        cluster = ["--cluster", profile or self.profile(), "--nodes", str(nodes), "--gpus-per-node", str(per_node)]
        self.llada("launch", self.write(name, **sections), *cluster, *words)
        sent = watch.latest(self.folder / name)
        assert sent is not None
        return sent.jobs[0]

    # -- what is seen of a run -----------------------------------------------------------------------------------------

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
        until(lambda: self.steps(run) >= step, seconds, f"step {step} of {run}", lambda: self.story(run))

    def wait_event(self, run: str, name: str, count: int = 1, seconds: float = 60) -> dict[str, Any]:
        until(lambda: len(self.events(run, name)) >= count, seconds, f"{count} x {name} of {run}", lambda: self.story(run))
        return self.events(run, name)[count - 1]

    def wait_state(self, run: str, state: str, seconds: float = 90) -> watch.Status:
        until(lambda: self.status(run).state == state, seconds, f"{run} {state}", lambda: self.story(run), pause=1.0)
        return self.status(run)

    def story(self, run: str) -> str:
        """Everything that may explain a failed test."""
        told = [str(line) for line in self.events(run) if line["event"] != "step"]
        logs = [f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in sorted((self.folder / run).glob("logs/**/*.log"))]
        return "\n".join([*told, str(self.status(run)), *logs])

    # -- what is done to it --------------------------------------------------------------------------------------------

    def ranks(self, run: str) -> dict[int, int]:
        """rank -> process, of the training processes of a run on all nodes."""
        found = {}
        marker = f"{self.folder / run}/launch/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if marker in b" ".join(words) and b"pretrain" in words and b"launch.rank" not in words and b"srun" not in words[0]:
                    values = dict(pair.split(b"=", 1) for pair in (entry / "environ").read_bytes().split(b"\0") if b"=" in pair)
                    if words[1:2] and words[1].endswith(b"/code"):
                        found[int(values[b"RANK"])] = int(entry.name)
            except (OSError, KeyError):
                continue
        return found

    @contextmanager
    def paused(self, run: str, ranks: int = 2) -> Iterator[None]:
        """Nobody takes a step meanwhile."""
        until(lambda: len(self.ranks(run)) == ranks, 30, f"{ranks} ranks of {run}")
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
    for item in own:
        item.add_marker(pytest.mark.slurm)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"slurm: {reason}"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a corpus."""
    folder = tmp_path_factory.mktemp("slurm")
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = train_byte_level_bpe(read([library / "json"], ReadOptions(), Report()), 512)
    tokenizer.save(folder / "tokenizer")
    prepare([library / "json", library / "email"], folder / "tokenizer", folder / "corpus", validation_fraction=0.15)
    return folder


@contextmanager
def at(cluster: Cluster, folder: Path) -> Iterator[Place]:
    """The commands of this process talk to a cluster, from a folder."""
    before = os.getcwd(), os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.conf)
    os.chdir(folder)
    try:
        yield Place(folder, cluster)
    finally:
        os.chdir(before[0])
        if before[1] is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before[1]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of eight cores and four GPUs, without accounting."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def place(cluster: Cluster, corpus: Path) -> Iterator[Place]:
    """The corpus's folder, with every node of the cluster idle and no job left."""
    with at(cluster, corpus) as place:
        yield place
        cluster.run("scancel", "--user=root", check=False)
        cluster.revive()


@pytest.fixture(scope="session")
def whole(cluster: Cluster, corpus: Path) -> list[dict[str, Any]]:
    """The curve of an uninterrupted run of the same config, without a launcher: each rank started by srun itself."""
    with at(cluster, corpus) as place:
        config = place.write("whole")
        place.cluster.run("srun", "--nodes=1", "--ntasks=1", "true")

        words = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-W", "ignore", "-m", "llada", "pretrain", config]
        root = str(Path(__file__).parents[2])
        environment = {**cluster.environment(), "MASTER_ADDR": "n0", "MASTER_PORT": "29500", "PYTHONPATH": root}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return place.lines("whole")

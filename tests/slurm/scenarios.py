"""Tests that run side by side, each on an island of nodes of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from tests.slurm.cluster import Cluster
from tests.slurm.island import Curve, Island

Body = Callable[[Island], None]


def scenario(body: Body) -> Callable[[Scenarios], None]:
    """Make a test whose body runs beside others; what pytest calls reports how the body ended."""

    def test(scenarios: Scenarios) -> None:
        scenarios.result(body)

    test.__name__ = body.__name__
    test.__doc__ = body.__doc__
    test.__module__ = body.__module__
    test.body = body  # type: ignore[attr-defined]
    return test


class Scenarios:
    """Runs the bodies, as many at once as there are islands, in the order of the tests.

    Args:
        cluster, folder: for all of them.
        bodies: of the tests that were selected.
    """

    def __init__(self, cluster: Cluster, folder: Path, bodies: list[Body]) -> None:
        self._cluster = cluster
        self._folder = folder
        self._console = threading.Lock()
        self._over = threading.Event()
        self._uninterrupted: Future[Curve] = Future()
        self._ends: dict[Body, Future[None]] = {
            body: Future() for body in [self._run_uninterrupted, *bodies]
        }
        self._waiting: SimpleQueue[Body] = SimpleQueue()
        for body in self._ends:
            self._waiting.put(body)
        for index in range(cluster.islands):
            # Daemons: after Ctrl-C nobody waits for what they wait for.
            threading.Thread(target=self._work, args=(index,), daemon=True).start()

    def result(self, body: Body) -> None:
        """Raise what a body raised."""
        self._ends[body].result()

    def wait(self) -> None:
        """Wait until every body has ended.

        Meanwhile pytest must not start another test: it would capture the output of the commands.
        """
        wait(self._ends.values())

    def close(self) -> None:
        """Start no further body."""
        self._over.set()

    def _work(self, index: int) -> None:
        """Run one body after the other on an island."""
        island = Island(self._folder, self._cluster, index, self._console, self._uninterrupted)
        while not self._over.is_set():
            try:
                body = self._waiting.get_nowait()
            except Empty:
                return
            try:
                body(island)
                island.clear()
                self._ends[body].set_result(None)
            except BaseException as error:
                # Whatever it is, the test raises it.
                self._ends[body].set_exception(error)
                # An island that cannot be cleared fails the next body.
                with suppress(Exception):
                    island.clear()

    def _run_uninterrupted(self, island: Island) -> None:
        """Run the same config without a launcher, each rank started by srun itself."""
        try:
            words = [
                "srun",
                f"--partition={island.main}",
                "--nodes=2",
                "--ntasks-per-node=1",
                sys.executable,
                "-W",
                "ignore",
            ]
            root = str(Path(__file__).parents[2])
            environment = {
                **self._cluster.environment(),
                "MASTER_ADDR": island.node(0),
                "MASTER_PORT": "29500",
                "PYTHONPATH": root,
            }
            words += ["-m", "llada", "pretrain", island.write("whole")]
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr[-3000:]
            self._uninterrupted.set_result(island.lines("whole"))
        except BaseException as error:
            self._uninterrupted.set_exception(error)
            raise

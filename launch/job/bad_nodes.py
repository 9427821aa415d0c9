"""Which nodes a run does without, judged from what the tests measured. Standard library only."""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.job.records import AttemptEnd, RankExit
from launch.job.spec import read_record

FINDING_FILE = "rank_{:05d}.finding.json"


@dataclass(frozen=True)
class Rules:
    """What the nodes are tested for; see `launch.profile.Preflight` for the settings.

    Attributes:
        join_seconds: for every rank to start and reach the first node.
        seconds: for the ranks to connect, and for every all-reduce.
        gpus: that torch must see on a node.
        min_gpu_memory_gb: free on every GPU.
        min_disk_gb: free where the run writes.
        max_clock_skew: seconds.
        slow_factor: how many times slower than the median a node may be.
        matmul_size: rows and columns of the matrices.
        allreduce_mb: size of the all-reduce.
    """

    join_seconds: float
    seconds: float
    gpus: int
    min_gpu_memory_gb: float
    min_disk_gb: float
    max_clock_skew: float
    slow_factor: float
    matmul_size: int
    allreduce_mb: float

    @classmethod
    def of_settings(cls, settings: dict[str, float], join_seconds: float) -> Rules:
        """Make the rules from the settings in a job's description."""
        return cls(
            join_seconds=join_seconds,
            seconds=settings["seconds"],
            gpus=int(settings["gpus"]),
            min_gpu_memory_gb=settings["min_gpu_memory_gb"],
            min_disk_gb=settings["min_disk_gb"],
            max_clock_skew=settings["max_clock_skew"],
            slow_factor=settings["slow_factor"],
            matmul_size=int(settings["matmul_size"]),
            allreduce_mb=settings["allreduce_mb"],
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rules:
        return cls(**json.loads(text))


class Finding(NamedTuple):
    """What one rank measured; None: the test did not end.

    Attributes:
        host, rank: where.
        disk_free_gb: of the run's file system.
        disk_error: why a file could not be written and read there.
        gpus: that torch sees.
        gpu_memory_gb: free on this rank's GPU.
        matmul_seconds: of a matrix product.
        connected: reached the first node.
        joined: met all the other ranks.
        clock: seconds since 1970, read by all ranks within milliseconds of each other.
        local_gbps, network_gbps: bus bandwidth of an all-reduce within the host, and with its
            neighbours.
    """

    host: str
    rank: int
    disk_free_gb: float | None = None
    disk_error: str | None = None
    gpus: int | None = None
    gpu_memory_gb: float | None = None
    matmul_seconds: float | None = None
    connected: bool = False
    joined: bool = False
    clock: float | None = None
    local_gbps: float | None = None
    network_gbps: float | None = None


class Verdict(NamedTuple):
    """What becomes of the nodes.

    Attributes:
        bad: host -> what is wrong with it.
        problem: why the tests failed where no host is known to be at fault; None: they did not.
        measured: host -> figures.
        lines: for the console.
    """

    bad: dict[str, str]
    problem: str | None
    measured: dict[str, dict[str, float]]
    lines: list[str]


Findings = dict[str, list[Finding]]
"""Host -> findings of its ranks."""


def judge(
    folder: Path, hosts: list[str], ranks_per_host: int, rules: Rules, end: AttemptEnd
) -> Verdict:
    """Decide which nodes are bad.

    Args:
        folder: with the findings.
        hosts: of the job, in the order of the ranks.
        ranks_per_host: on every host.
        rules: what the nodes are tested for.
        end: how the ranks of the test ended.
    """
    findings = _read_findings(folder, hosts, ranks_per_host)
    bad = _bad_alone(findings, ranks_per_host, rules, end)
    # A host is compared with the others only when all had the time for every test.
    if not bad and _cut_short_by(end) is None:
        bad = _bad_among_others(findings, rules)
    problem = None
    if not bad and not end.finished:
        bad, problem = _blame_failures(hosts, ranks_per_host, end)
    measured = {host: _figures(of_host) for host, of_host in findings.items()}
    lines = []
    for host, figures in measured.items():
        shown = [f"{name} {value:.3g}" for name, value in figures.items()]
        lines.append(f"{host}: {', '.join(shown)}")
    lines += [f"{host} is bad: {why}" for host, why in bad.items()]
    if problem is not None:
        lines.append(problem)
    return Verdict(bad, problem, measured, lines)


def _read_findings(folder: Path, hosts: list[str], ranks_per_host: int) -> Findings:
    findings: Findings = {host: [] for host in hosts}
    for rank in range(len(hosts) * ranks_per_host):
        record: dict[str, Any] | None = read_record(folder / FINDING_FILE.format(rank))
        if record is not None:
            findings[hosts[rank // ranks_per_host]].append(Finding(**record))
    return findings


def _hosts_given_time(hosts: list[str], ranks_per_host: int, end: AttemptEnd) -> set[str]:
    """The hosts whose ranks had the time for every test.

    The first failure cuts the tests of slower ranks short. What those did not measure says nothing
    about their hosts.
    """
    culprit = _cut_short_by(end)
    if culprit is not None:
        return {hosts[culprit.rank // ranks_per_host]}
    # Where ranks could not start, the others are ended soon after, or they waited in vain.
    if 0 < len(end.absent) < len(hosts):
        return set(end.absent)
    return set(hosts)


def _cut_short_by(end: AttemptEnd) -> RankExit | None:
    """The rank whose failure ended the tests of slower ones; None: no rank failed by itself."""
    first = end.first_failure
    if not end.killed or first is None:
        return None
    # When the time was over and no rank failed, all of them were made to end.
    was_ended = first.blames_another or first.code == -signal.SIGKILL
    if was_ended:
        return None
    return first


def _blame_failures(
    hosts: list[str], ranks_per_host: int, end: AttemptEnd
) -> tuple[dict[str, str], str | None]:
    """Explain tests that failed without a finding that says why.

    Returns:
        The host at fault, if it is a single one; otherwise what was printed, as a problem.
    """
    killed_by_us = [rank for rank in end.exits if end.killed and rank.code == -signal.SIGKILL]
    failed = [rank for rank in end.exits if rank.code != 0 and rank not in killed_by_us]
    # When a rank crashes, all others soon fail for want of it: the crash counts, or a host that
    # failed alone.
    crashed = [rank for rank in failed if rank.code < 0 and not end.killed]
    blamed = crashed or failed
    blamed_hosts = {hosts[rank.rank // ranks_per_host] for rank in blamed}
    if len(blamed_hosts) == 1 and len(hosts) > 1:
        return {blamed_hosts.pop(): str(blamed[0])}, None
    if blamed:
        return {}, str(blamed[0])
    return {}, f"the tests did not finish ({end.launcher_line})"


# -- a host by itself ------------------------------------------------------------------------------


def _bad_alone(
    findings: Findings, ranks_per_host: int, rules: Rules, end: AttemptEnd
) -> dict[str, str]:
    """Hosts that are bad whatever the others are like."""
    given_time = _hosts_given_time(list(findings), ranks_per_host, end)
    bad = {}
    for host, of_host in findings.items():
        had_time = host in given_time
        why = None
        if had_time and len(of_host) < ranks_per_host:
            why = f"{ranks_per_host - len(of_host)} of {ranks_per_host} ranks did not start"
        for finding in of_host:
            why = why or _fault(finding, rules, had_time)
        if why is None:
            continue
        if host in end.absent and end.launcher_line:
            why = f"{why} ({end.launcher_line})"
        bad[host] = why
    return bad


def _fault(finding: Finding, rules: Rules, had_time: bool) -> str | None:
    """What is wrong with a rank's host, from its own finding alone."""
    if finding.disk_error is not None:
        return f"the run folder cannot be written ({finding.disk_error})"
    if finding.disk_free_gb is not None and finding.disk_free_gb < rules.min_disk_gb:
        return (
            f"{finding.disk_free_gb:.1f} GB free where the run writes, preflight.min_disk_gb is"
            f" {rules.min_disk_gb:g}"
        )
    if finding.gpus is not None and finding.gpus < rules.gpus:
        return f"torch sees {finding.gpus} GPUs, {rules.gpus} are required"
    if finding.gpu_memory_gb is not None and finding.gpu_memory_gb < rules.min_gpu_memory_gb:
        return (
            f"rank {finding.rank}: {finding.gpu_memory_gb:.1f} GB of GPU memory free,"
            f" preflight.min_gpu_memory_gb is {rules.min_gpu_memory_gb:g}"
        )
    if had_time and finding.matmul_seconds is None:
        return f"rank {finding.rank} did not finish a matrix product"
    return None


# -- a host among the others -----------------------------------------------------------------------


def _bad_among_others(findings: Findings, rules: Rules) -> dict[str, str]:
    """Hosts that differ from the others: connections, clock, speed, bandwidth.

    The measure is the median of the hosts, which one bad host does not move.
    """
    # Without a connection, nothing after it was tested.
    unconnected = _unconnected(findings, rules)
    if unconnected:
        return unconnected
    # Where a host is bad in several ways, the last one is named.
    return {
        **_off_clocks(findings, rules),
        **_slow_products(findings, rules),
        **_slow_links(findings, "local_gbps", "within the node", rules),
        **_slow_links(findings, "network_gbps", "with other nodes", rules),
    }


def _unconnected(findings: Findings, rules: Rules) -> dict[str, str]:
    for name, failed in (
        ("connected", "did not reach the first node"),
        ("joined", "did not connect to the other ranks"),
    ):
        hosts = []
        for host, of_host in findings.items():
            if not all(getattr(finding, name) for finding in of_host):
                hosts.append(host)
        # Where all hosts fail alike, none of them is to blame.
        if hosts and len(hosts) < len(findings):
            return {host: f"{failed} in {rules.join_seconds:g} s" for host in hosts}
    return {}


def _off_clocks(findings: Findings, rules: Rules) -> dict[str, str]:
    clocks = _by_host(findings, "clock", statistics.median)
    if not clocks:
        return {}
    median = statistics.median_low(clocks.values())
    bad = {}
    for host, clock in clocks.items():
        if abs(clock - median) > rules.max_clock_skew:
            bad[host] = (
                f"its clock is off by {clock - median:+.1f} s, preflight.max_clock_skew is"
                f" {rules.max_clock_skew:g}"
            )
    return bad


def _slow_products(findings: Findings, rules: Rules) -> dict[str, str]:
    # A run waits for its slowest rank.
    times = _by_host(findings, "matmul_seconds", max)
    if not times:
        return {}
    # median_low: of two hosts, the faster one is the measure.
    median = statistics.median_low(times.values())
    bad = {}
    for host, seconds in times.items():
        if seconds > rules.slow_factor * median:
            bad[host] = (
                f"a matrix product takes {seconds * 1e3:.3g} ms, {seconds / median:.1f} times the"
                " median"
            )
    return bad


def _slow_links(findings: Findings, name: str, where: str, rules: Rules) -> dict[str, str]:
    speeds = _by_host(findings, name, min)
    if not speeds:
        return {}
    median = statistics.median_high(speeds.values())
    bad = {}
    for host, speed in speeds.items():
        if speed * rules.slow_factor < median:
            bad[host] = (
                f"an all-reduce {where} runs at {speed:.3g} GB/s, the median is {median:.3g}"
            )
    return bad


Aggregate = Callable[[list[float]], float]


def _by_host(findings: Findings, name: str, aggregate: Aggregate) -> dict[str, float]:
    """One number for each host that measured something, from the numbers of its ranks."""
    numbers = {}
    for host, of_host in findings.items():
        values = _values(of_host, name)
        if values:
            numbers[host] = aggregate(values)
    return numbers


def _values(findings: list[Finding], name: str) -> list[float]:
    values = [getattr(finding, name) for finding in findings]
    return [value for value in values if value is not None]


def _figures(findings: list[Finding]) -> dict[str, float]:
    """The figures of a host for the event and the console: those of its worst rank."""
    worst: dict[str, Aggregate] = {
        "matmul_seconds": max,
        "local_gbps": min,
        "network_gbps": min,
        "disk_free_gb": min,
        "gpu_memory_gb": min,
    }
    figures = {}
    for name, aggregate in worst.items():
        values = _values(findings, name)
        if values:
            figures[name] = round(aggregate(values), 6)
    return figures

"""Finds the bad nodes in the results of the node tests. Standard library only."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from launch.job.failure import Failure, preflight_key
from launch.job.findings import FINDING_FILE, Finding, Rules
from launch.job.records import AttemptEnd, RankExit
from launch.job.spec import read_record


class Fault(NamedTuple):
    """What is wrong with a host.

    Attributes:
        test: the test that failed: a field of `Finding`, "started" if ranks did not start, or
            "exit" and the code if a rank failed without a finding that says why.
        why: human-readable reason, with what was measured.
    """

    test: str
    why: str


class Verdict(NamedTuple):
    """Result of the node tests.

    Attributes:
        bad: host -> what is wrong with it.
        problem: the failure of the tests if no host is known to be bad; None: they did not fail.
        measured: host -> its figures.
        lines: lines for the console.
    """

    bad: dict[str, Fault]
    problem: Failure | None
    measured: dict[str, dict[str, float]]
    lines: list[str]


Findings = dict[str, list[Finding]]
"""Host -> findings of its ranks."""


def judge(
    folder: Path, hosts: list[str], ranks_per_host: int, rules: Rules, end: AttemptEnd
) -> Verdict:
    """Decide which nodes are bad.

    Args:
        folder: folder with the findings.
        hosts: hosts of the job, in the order of the ranks.
        ranks_per_host: number of ranks per host.
        rules: what the nodes are tested for.
        end: how the ranks of the tests ended.
    """
    findings = _read_findings(folder, hosts, ranks_per_host)
    bad = _bad_alone(findings, ranks_per_host, rules, end)
    # Hosts are compared only if all of them had time for every test.
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
    lines += [f"{host} is bad: {fault.why}" for host, fault in bad.items()]
    if problem is not None:
        lines.append(problem.reason)
    return Verdict(bad, problem, measured, lines)


def _read_findings(folder: Path, hosts: list[str], ranks_per_host: int) -> Findings:
    findings: Findings = {host: [] for host in hosts}
    for rank in range(len(hosts) * ranks_per_host):
        record = read_record(folder / FINDING_FILE.format(rank))
        if record is not None:
            findings[hosts[rank // ranks_per_host]].append(Finding(**record))
    return findings


def _hosts_given_time(hosts: list[str], ranks_per_host: int, end: AttemptEnd) -> set[str]:
    """The hosts whose ranks had time for every test.

    The first failure cuts the tests of slower ranks short. What these ranks did not measure says
    nothing about their hosts.
    """
    culprit = _cut_short_by(end)
    if culprit is not None:
        return {hosts[culprit.rank // ranks_per_host]}
    # Some hosts have ranks that did not start. The others were ended soon after, or waited in vain.
    if 0 < len(end.absent) < len(hosts):
        return set(end.absent)
    return set(hosts)


def _cut_short_by(end: AttemptEnd) -> RankExit | None:
    """The rank whose failure ended the tests of slower ones; None: no rank failed by itself."""
    first = end.first_failure
    if not end.killed or first is None:
        return None
    # If no rank failed before the time limit, all of them were ended by the supervisor.
    was_ended = first.blames_another or first.code == -signal.SIGKILL
    if was_ended:
        return None
    return first


def _blame_failures(
    hosts: list[str], ranks_per_host: int, end: AttemptEnd
) -> tuple[dict[str, Fault], Failure | None]:
    """Explain tests that failed although no finding says why.

    Returns:
        The bad host and why, if the failures are all on one host; otherwise a problem.
    """
    failed = []
    for rank_exit in end.exits:
        killed_by_supervisor = end.killed and rank_exit.code == -signal.SIGKILL
        if rank_exit.code != 0 and not killed_by_supervisor:
            failed.append(rank_exit)
    crashed = [rank_exit for rank_exit in failed if rank_exit.code < 0]
    blamed = failed
    if crashed and not end.killed:
        # When a rank crashes, the others soon fail too, because they lost it.
        blamed = crashed
    if not blamed:
        # No key: nothing says that the next tests will not finish either.
        return {}, Failure("preflight", f"the tests did not finish ({end.launcher_line})")
    failed_tests = set()
    for rank_exit in blamed:
        host = hosts[rank_exit.rank // ranks_per_host]
        failed_tests.add((host, f"exit {rank_exit.code}"))
    blamed_hosts = {host for host, _ in failed_tests}
    if len(blamed_hosts) == 1 and len(hosts) > 1:
        fault = Fault(f"exit {blamed[0].code}", str(blamed[0]))
        return {blamed_hosts.pop(): fault}, None
    return {}, Failure("preflight", str(blamed[0]), preflight_key(failed_tests))


# -- a host by itself ------------------------------------------------------------------------------


def _bad_alone(
    findings: Findings, ranks_per_host: int, rules: Rules, end: AttemptEnd
) -> dict[str, Fault]:
    """Hosts that are bad whatever the others are like."""
    given_time = _hosts_given_time(list(findings), ranks_per_host, end)
    bad = {}
    for host, of_host in findings.items():
        fault = _fault_of_host(of_host, ranks_per_host, rules, had_time=host in given_time)
        if fault is None:
            continue
        if host in end.absent and end.launcher_line:
            fault = fault._replace(why=f"{fault.why} ({end.launcher_line})")
        bad[host] = fault
    return bad


def _fault_of_host(
    findings: list[Finding], ranks_per_host: int, rules: Rules, had_time: bool
) -> Fault | None:
    """The first thing that is wrong with a host, from its own findings alone."""
    missing = ranks_per_host - len(findings)
    if had_time and missing:
        return Fault("started", f"{missing} of {ranks_per_host} ranks did not start")
    for finding in findings:
        fault = _fault(finding, rules, had_time)
        if fault is not None:
            return fault
    return None


def _fault(finding: Finding, rules: Rules, had_time: bool) -> Fault | None:
    """The first thing that is wrong with a rank's host, from the finding of this rank alone."""
    if finding.disk_error is not None:
        return Fault("disk_error", f"the run folder cannot be written ({finding.disk_error})")
    if finding.disk_free_gb is not None and finding.disk_free_gb < rules.min_disk_gb:
        return Fault(
            "disk_free_gb",
            f"{finding.disk_free_gb:.1f} GB free where the run writes, preflight.min_disk_gb is"
            f" {rules.min_disk_gb:g}",
        )
    if finding.gpus is not None and finding.gpus < rules.gpus:
        return Fault("gpus", f"torch sees {finding.gpus} GPUs, {rules.gpus} are required")
    if finding.gpu_memory_gb is not None and finding.gpu_memory_gb < rules.min_gpu_memory_gb:
        return Fault(
            "gpu_memory_gb",
            f"rank {finding.rank}: {finding.gpu_memory_gb:.1f} GB of GPU memory free,"
            f" preflight.min_gpu_memory_gb is {rules.min_gpu_memory_gb:g}",
        )
    if had_time and finding.matmul_seconds is None:
        return Fault("matmul_seconds", f"rank {finding.rank} did not finish a matrix product")
    return None


# -- a host among the others -----------------------------------------------------------------------


def _bad_among_others(findings: Findings, rules: Rules) -> dict[str, Fault]:
    """Hosts that differ from the others: connections, clock, speed, bandwidth.

    They are compared with the median of the hosts, which a single bad host does not move.
    """
    unconnected = _unconnected(findings, rules)
    if unconnected:
        # Without a connection, the later tests did not run.
        return unconnected
    # For a host that is bad in several ways, the last one counts.
    return {
        **_off_clocks(findings, rules),
        **_slow_products(findings, rules),
        **_slow_links(findings, _LOCAL_GBPS, "within the node", rules),
        **_slow_links(findings, _NETWORK_GBPS, "with other nodes", rules),
    }


def _unconnected(findings: Findings, rules: Rules) -> dict[str, Fault]:
    not_connected = []
    not_joined = []
    for host, of_host in findings.items():
        if not all(finding.connected for finding in of_host):
            not_connected.append(host)
        if not all(finding.joined for finding in of_host):
            not_joined.append(host)
    # If all hosts fail alike, none of them is to blame.
    if 0 < len(not_connected) < len(findings):
        fault = Fault("connected", f"did not reach the first node in {rules.join_seconds:g} s")
        return dict.fromkeys(not_connected, fault)
    if 0 < len(not_joined) < len(findings):
        fault = Fault("joined", f"did not connect to the other ranks in {rules.join_seconds:g} s")
        return dict.fromkeys(not_joined, fault)
    return {}


def _off_clocks(findings: Findings, rules: Rules) -> dict[str, Fault]:
    clocks = _by_host(findings, _CLOCK)
    if not clocks:
        return {}
    median = statistics.median_low(clocks.values())
    bad = {}
    for host, clock in clocks.items():
        if abs(clock - median) > rules.max_clock_skew:
            bad[host] = Fault(
                _CLOCK.name,
                f"its clock is off by {clock - median:+.1f} s, preflight.max_clock_skew is"
                f" {rules.max_clock_skew:g}",
            )
    return bad


def _slow_products(findings: Findings, rules: Rules) -> dict[str, Fault]:
    times = _by_host(findings, _MATMUL_SECONDS)
    if not times:
        return {}
    # Of two hosts, median_low takes the faster one.
    median = statistics.median_low(times.values())
    bad = {}
    for host, seconds in times.items():
        if seconds > rules.slow_factor * median:
            bad[host] = Fault(
                _MATMUL_SECONDS.name,
                f"a matrix product takes {seconds * 1e3:.3g} ms, {seconds / median:.1f} times the"
                " median",
            )
    return bad


def _slow_links(
    findings: Findings, bandwidth: Measure, where: str, rules: Rules
) -> dict[str, Fault]:
    speeds = _by_host(findings, bandwidth)
    if not speeds:
        return {}
    # Of two hosts, median_high takes the faster one.
    median = statistics.median_high(speeds.values())
    bad = {}
    for host, speed in speeds.items():
        if speed * rules.slow_factor < median:
            bad[host] = Fault(
                bandwidth.name,
                f"an all-reduce {where} runs at {speed:.3g} GB/s, the median is {median:.3g}",
            )
    return bad


# -- one number per host ---------------------------------------------------------------------------


class Measure(NamedTuple):
    """A number that every rank measures.

    Attributes:
        name: name of the number in events and on the console.
        of_rank: the number of one rank; None: it was not measured.
        of_host: the number of a host, from those of its ranks.
    """

    name: str
    of_rank: Callable[[Finding], float | None]
    of_host: Callable[[list[float]], float]


_CLOCK = Measure("clock", lambda finding: finding.clock, statistics.median)
# A run waits for its slowest rank, so the worst rank stands for its host.
_MATMUL_SECONDS = Measure("matmul_seconds", lambda finding: finding.matmul_seconds, max)
_LOCAL_GBPS = Measure("local_gbps", lambda finding: finding.local_gbps, min)
_NETWORK_GBPS = Measure("network_gbps", lambda finding: finding.network_gbps, min)
_DISK_FREE_GB = Measure("disk_free_gb", lambda finding: finding.disk_free_gb, min)
_GPU_MEMORY_GB = Measure("gpu_memory_gb", lambda finding: finding.gpu_memory_gb, min)
_FIGURES = (_MATMUL_SECONDS, _LOCAL_GBPS, _NETWORK_GBPS, _DISK_FREE_GB, _GPU_MEMORY_GB)
"""What the event and the console show of a host."""


def _number_of_host(findings: list[Finding], measure: Measure) -> float | None:
    """The number of a host; None: none of its ranks measured it."""
    values = []
    for finding in findings:
        value = measure.of_rank(finding)
        if value is not None:
            values.append(value)
    if not values:
        return None
    return measure.of_host(values)


def _by_host(findings: Findings, measure: Measure) -> dict[str, float]:
    """The numbers of all hosts that have one."""
    numbers = {}
    for host, of_host in findings.items():
        number = _number_of_host(of_host, measure)
        if number is not None:
            numbers[host] = number
    return numbers


def _figures(findings: list[Finding]) -> dict[str, float]:
    """The figures of a host for the event and the console."""
    figures = {}
    for measure in _FIGURES:
        number = _number_of_host(findings, measure)
        if number is not None:
            figures[measure.name] = round(number, 6)
    return figures

"""Which nodes a run does without, from what the tests found. Standard library only."""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from launch.job.attempt import Exit, StepEnd
from launch.job.spec import read_record

FINDINGS = "rank_{:05d}.finding.json"


class Finding(NamedTuple):
    """What one rank found; None: the test did not end.

    Attributes:
        host, rank: where.
        disk_free_gb: of the run's file system.
        disk_error: why a file could not be written and read there.
        gpus: that torch sees.
        gpu_memory_gb: free on this rank's GPU.
        matmul_seconds: of a matrix product.
        connected: reached the first node.
        joined: met all the others.
        clock: seconds since 1970 at a moment that is the same for all but for milliseconds.
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
        bad: host -> why.
        problem: the tests failed, but no host is known to be at fault.
        measured: host -> figures.
        lines: for the console.
    """

    bad: dict[str, str]
    problem: str | None
    measured: dict[str, dict[str, float]]
    lines: list[str]


def judge(
    folder: Path, hosts: list[str], per_host: int, rules: dict[str, Any], end: StepEnd
) -> Verdict:
    """What becomes of the nodes.

    Args:
        folder: with the findings.
        hosts: of the job, in the order of the ranks.
        per_host: ranks on each.
        rules: see `launch.profile.Preflight`.
        end: how the ranks of the test ended.
    """
    found: dict[str, list[Finding]] = {host: [] for host in hosts}
    for rank in range(len(hosts) * per_host):
        record = read_record(folder / FINDINGS.format(rank))
        if record is not None:
            found[hosts[rank // per_host]].append(Finding(**record))
    culprit = _cut_short_by(end)
    blamable = hosts if culprit is None else [hosts[culprit.rank // per_host]]
    bad = {
        host: why
        for host in hosts
        if (why := _alone(found[host], per_host, rules, host in blamable))
    }
    bad |= {
        host: f"{bad[host]} ({end.launcher[1]})"
        for host in end.absent
        if host in bad and end.launcher[1]
    }
    if not bad and culprit is None:
        bad = _compared(found, rules)
    problem = None
    if not bad and not end.finished:
        bad, problem = _failed(hosts, per_host, end)
    measured = {host: _figures(findings) for host, findings in found.items()}
    lines = [
        f"{host}: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        for host, figures in measured.items()
    ]
    told = [f"{host} is bad: {why}" for host, why in bad.items()] + ([problem] if problem else [])
    return Verdict(bad, problem, measured, lines + told)


def _cut_short_by(end: StepEnd) -> Exit | None:
    """The rank whose failure ended the tests of slower ones, which then tell nothing of their
    hosts; None: all had their time.
    """
    first = end.first_failure
    if not end.killed or first is None:
        return None
    # as all are when nobody failed and the time was over
    was_ended = first.blames_another or first.code == -signal.SIGKILL
    return None if was_ended else first


def _failed(hosts: list[str], per_host: int, end: StepEnd) -> tuple[dict[str, str], str | None]:
    """Of tests that did not end well, without a finding that says why: the host that did it, if it
    is one; else what was said.
    """
    failed = [
        one
        for one in end.exits
        if one.code != 0 and not (end.killed and one.code == -signal.SIGKILL)
    ]
    # Where a rank dies, all others soon fail for want of it: the deadly one counts, or a host that
    # failed alone.
    deadly = [one for one in failed if one.code < 0 and not end.killed]
    blamed = deadly or failed
    of_hosts = {hosts[one.rank // per_host] for one in blamed}
    if len(of_hosts) == 1 and len(hosts) > 1:
        return {of_hosts.pop(): str(blamed[0])}, None
    return {}, str(blamed[0]) if blamed else f"the tests did not end ({end.launcher[1]})"


def _alone(
    findings: list[Finding], per_host: int, rules: dict[str, Any], had_time: bool
) -> str | None:
    """What is wrong with a host whatever the others are like; tests that are not done count where
    they had their time.
    """
    if had_time and len(findings) < per_host:
        return f"{per_host - len(findings)} of {per_host} ranks did not start"
    for one in findings:
        if one.disk_error is not None:
            return f"the run's folder cannot be written ({one.disk_error})"
        if one.disk_free_gb is not None and one.disk_free_gb < rules["min_disk_gb"]:
            return (
                f"{one.disk_free_gb:.1f} GB left where the run writes, preflight.min_disk_gb is"
                f" {rules['min_disk_gb']:g}"
            )
        if one.gpus is not None and one.gpus < rules["gpus"]:
            return f"torch sees {one.gpus} GPUs, {rules['gpus']} are asked for"
        if one.gpu_memory_gb is not None and one.gpu_memory_gb < rules["min_gpu_memory_gb"]:
            least = rules["min_gpu_memory_gb"]
            return (
                f"rank {one.rank}: {one.gpu_memory_gb:.1f} GB of GPU memory free,"
                f" preflight.min_gpu_memory_gb is {least:g}"
            )
        if had_time and one.matmul_seconds is None:
            return f"rank {one.rank} did not get through a matrix product"
    return None


def _compared(found: dict[str, list[Finding]], rules: dict[str, Any]) -> dict[str, str]:
    """Hosts that differ from the others: clock, speed, bandwidth. The measure is the median, which
    one bad node does not move.
    """
    bad: dict[str, str] = {}
    for name, what in (
        ("connected", "did not reach the first node"),
        ("joined", "did not meet the others"),
    ):
        strangers = [
            host
            for host, findings in found.items()
            if not all(getattr(one, name) for one in findings)
        ]
        if strangers and len(strangers) < len(found):
            return {host: f"{what} in {rules['join_seconds']:g} s" for host in strangers}
    clocks = _by_host(found, "clock", statistics.median)
    if clocks:
        middle = statistics.median_low(clocks.values())
        for host, clock in clocks.items():
            if abs(clock - middle) > rules["max_clock_skew"]:
                bad[host] = (
                    f"its clock is off by {clock - middle:+.1f} s, preflight.max_clock_skew is"
                    f" {rules['max_clock_skew']:g}"
                )
    factor = rules["slow_factor"]
    times = _by_host(found, "matmul_seconds", max)
    if times:
        usual = statistics.median_low(times.values())
        for host, seconds in times.items():
            if seconds > factor * usual:
                bad[host] = (
                    f"a matrix product takes {seconds * 1e3:.3g} ms, {seconds / usual:.1f} times"
                    " the usual"
                )
    for name, what in (("local_gbps", "within the node"), ("network_gbps", "with other nodes")):
        speeds = _by_host(found, name, min)
        if speeds:
            usual = statistics.median_high(speeds.values())
            for host, speed in speeds.items():
                if speed * factor < usual:
                    bad[host] = (
                        f"an all-reduce {what} runs at {speed:.3g} GB/s, the usual is {usual:.3g}"
                    )
    return bad


def _by_host(
    found: dict[str, list[Finding]], name: str, choose: Callable[[list[float]], float]
) -> dict[str, float]:
    values = {
        host: [value for one in findings if (value := getattr(one, name)) is not None]
        for host, findings in found.items()
    }
    return {host: choose(several) for host, several in values.items() if several}


def _figures(findings: list[Finding]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, choose in (
        ("matmul_seconds", max),
        ("local_gbps", min),
        ("network_gbps", min),
        ("disk_free_gb", min),
        ("gpu_memory_gb", min),
    ):
        several = [value for one in findings if (value := getattr(one, name)) is not None]
        if several:
            figures[name] = round(choose(several), 6)
    return figures


def to_environment(rules: dict[str, Any]) -> str:
    """The rules as the ranks of the test read them."""
    return json.dumps(rules)

"""What becomes of a run, for every way in which its ranks can end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.job.bad_nodes import Fault, Verdict
from launch.job.failure import classify
from launch.job.policy import (
    Decision,
    FailuresInARow,
    Situation,
    decide,
    explain_verdict,
    failures_in_a_row,
    restart,
)
from launch.job.records import AttemptEnd, RankExit
from launch.job.spec import Restarts
from llada.failures import FailureKind

LIMITS = Restarts(limit=2, backoff=60.0)


def rank_exit(
    rank: int,
    host: str,
    time: float,
    code: int,
    message: str | None,
    reported: FailureKind | None = None,
) -> RankExit:
    """The end of a rank that reported this kind of failure."""
    return RankExit(rank, host, time, code, message, kind=classify(code, message, reported))


def ends(*codes: int, message: str | None = None, **fields: Any) -> AttemptEnd:
    """All ranks ended, in the order of their numbers."""
    exits = [
        rank_exit(rank, f"n{rank // 2}", float(rank), code, message if code else None)
        for rank, code in enumerate(codes)
    ]
    return AttemptEnd(exits, fields.pop("ranks", len(codes)), **fields)


def test_finished_only_when_every_rank_is() -> None:
    assert decide(ends(0, 0), Situation(), LIMITS).event == "finished"
    assert (
        decide(
            ends(0, 0), Situation(signal="SIGTERM", stopped_by_user=True, state="cancelled"), LIMITS
        ).event
        == "finished"
    )
    assert decide(ends(0, ranks=2), Situation(), LIMITS).event == "requeued"


def test_a_clean_stop_is_no_failure_and_never_counts() -> None:
    decision = decide(ends(75, 75), Situation(signal="SIGUSR1", progress=True, failures=99), LIMITS)
    assert (decision.event, decision.failure, decision.delay, decision.code) == (
        "requeued",
        False,
        0.0,
        75,
    )
    # Slurm was faster than the save: killed, but asked to stop.
    assert not decide(ends(-9, -15), Situation(signal="SIGTERM"), LIMITS).failure


def test_cancelled_is_final_and_a_requeue_by_slurm_is_left_to_it() -> None:
    assert (
        decide(ends(75, 75), Situation(signal="SIGTERM", state="cancelled"), LIMITS).event
        == "cancelled"
    )
    left = decide(ends(75, 75), Situation(signal="SIGTERM", state="requeued"), LIMITS)
    assert left.event == "requeued" and left.by_slurm and not left.failure
    assert decide(
        ends(-9, 1), Situation(signal="SIGTERM", state="requeued", unreachable=["n1"]), LIMITS
    ).failure


def test_a_stop_that_the_user_wanted_is_not_started_again() -> None:
    assert (
        decide(ends(75, 75), Situation(signal="SIGUSR1", stopped_by_user=True), LIMITS).event
        == "stopped"
    )
    crashed = decide(
        ends(1, 1, message="failed: OSError"),
        Situation(signal="SIGUSR1", stopped_by_user=True),
        LIMITS,
    )
    assert crashed.event == "stopped" and crashed.failure and "OSError" in crashed.reason


def test_a_stop_that_takes_too_long_is_a_failure_without_a_new_checkpoint() -> None:
    late = ends(-9, -9, killed=True)
    decision = decide(late, Situation(signal="SIGUSR1"), LIMITS)
    assert decision.event == "requeued" and decision.failure and "signal_seconds" in decision.reason
    assert decide(late, Situation(signal="SIGUSR1", failures=2), LIMITS).event == "failed"
    assert not decide(late, Situation(signal="SIGUSR1", progress=True), LIMITS).failure


def test_a_node_that_is_lost_is_no_scancel() -> None:
    decision = decide(
        ends(75, 75), Situation(signal="SIGTERM", state="lost", unreachable=["n1"]), LIMITS
    )
    assert (
        decision.event == "requeued"
        and decision.failure
        and "Slurm cannot reach n1" in decision.reason
    )


def test_a_mistake_of_the_users_is_not_tried_again() -> None:
    decision = decide(ends(2, -9, message="error: data.mixture.0.path: gone"), Situation(), LIMITS)
    assert (decision.event, decision.code, decision.reason) == (
        "failed",
        2,
        "rank 0 on n0: error: data.mixture.0.path: gone",
    )


def test_the_first_rank_that_failed_is_named() -> None:
    end = AttemptEnd(
        [
            rank_exit(3, "n1", 1.0, -11, None),
            rank_exit(0, "n0", 2.0, 1, "failed: RuntimeError: connection closed by peer"),
        ],
        2,
    )
    decision = decide(end, Situation(unreachable=["n1"]), LIMITS)
    assert (
        decision.reason == "rank 3 on n1: killed by SIGSEGV; Slurm cannot reach n1"
        and decision.failure
    )


@pytest.mark.parametrize(
    "code, message",
    [
        (
            1,
            (
                "failed: RuntimeError: [gloo/transport/tcp/pair.cc:538] Read error"
                " [10.77.0.10]:4172: Connection reset by peer"
            ),
        ),
        (1, "failed: RuntimeError: Connection closed by peer [10.77.0.10]:4172"),
        (
            1,
            (
                "failed: DistBackendError: NCCL error: remote process exited or there was a network"
                " error"
            ),
        ),
        (-6, None),  # as NCCL's watchdog ends a process
        (-15, None),  # as torchrun ends the others
    ],
)
def test_a_rank_that_only_lost_its_peer_is_not_the_cause(code: int, message: str | None) -> None:
    """Clocks differ and records take time, so the one that noticed it may come first."""
    end = AttemptEnd([rank_exit(0, "n0", 1.0, code, message), rank_exit(1, "n1", 2.0, -9, None)], 2)
    assert decide(end, Situation(), LIMITS).reason == "rank 1 on n1: killed by SIGKILL"
    alone = AttemptEnd(
        [rank_exit(0, "n0", 1.0, code, message), rank_exit(1, "n1", 2.0, 75, None)], 2
    )
    assert decide(alone, Situation(), LIMITS).reason.startswith("rank 0 on n0: ")
    assert decide(alone, Situation(unreachable=["n1"]), LIMITS).reason.startswith(
        "Slurm cannot reach n1; rank 0 on n0: "
    )


def test_a_hang_is_told_by_the_rank_that_noticed_it() -> None:
    message = (
        "failed: hang: no step finished for 10 s (run.hang_timeout): rank 1 never answered; run the"
        " same command again"
    )
    end = AttemptEnd([rank_exit(0, "n0", 1.0, 75, message, "hang")], 2, killed=True)
    assert decide(end, Situation(), LIMITS).reason.startswith(
        "rank 0 on n0: hang: no step finished for 10 s"
    )


def test_nodes_without_a_rank_are_left_out_unless_all_are() -> None:
    end = AttemptEnd(
        [],
        4,
        absent=["n1"],
        hosts=["n0", "n1"],
        launcher_code=1,
        launcher_line="srun: error: Task launch failed on node n1",
    )
    decision = decide(end, Situation(), LIMITS)
    assert (decision.exclude, decision.delay) == (
        ["n1"],
        0.0,
    ) and "Task launch failed on node n1" in decision.reason
    none = decide(AttemptEnd([], 4, absent=["n0", "n1"], hosts=["n0", "n1"]), Situation(), LIMITS)
    assert none.exclude == [] and none.delay == 60.0


def test_the_back_off_doubles_up_to_an_hour_and_the_limit_ends_it() -> None:
    end = ends(1, message="failed: RuntimeError: NCCL")
    many = Restarts(limit=20, backoff=60.0)
    assert [decide(end, Situation(failures=n), many).delay for n in range(8)] == [
        60,
        120,
        240,
        480,
        960,
        1920,
        3600,
        3600,
    ]
    assert [decide(end, Situation(failures=n), LIMITS).event for n in range(3)] == [
        "requeued",
        "requeued",
        "failed",
    ]
    last = decide(end, Situation(failures=2), LIMITS)
    assert last.reason.startswith(
        "3 failures in a row without a new checkpoint, and requeue.limit is 2; the last: rank 0 on"
        " n0: RuntimeError"
    )
    assert decide(end, Situation(failures=2, progress=True), LIMITS).event == "requeued"
    assert decide(end, Situation(), Restarts(limit=0)).event == "failed"


def stopped_by_step(step: int, loss: str) -> AttemptEnd:
    message = f"failed: step {step}: loss {loss} is over the limit"
    return AttemptEnd(
        [RankExit(0, "n0", 1.0, 1, message, kind="step", training_step=step)], ranks=1
    )


def test_the_same_step_failing_twice_is_no_accident() -> None:
    first = decide(stopped_by_step(812, loss="301.7"), Situation(), LIMITS)
    assert first.event == "requeued"
    again = Situation(failures=1, last_reason=first.reason, last_key=first.key)
    # The last digits of a loss may differ from one attempt to the next.
    second = decide(stopped_by_step(812, loss="301.8"), again, LIMITS)
    assert second.event == "failed" and second.reason.startswith("the same failure twice")
    assert decide(stopped_by_step(813, loss="301.7"), again, LIMITS).event == "requeued"
    assert decide(ends(-9), again, LIMITS).event == "requeued"


def test_a_failure_without_a_key_equals_no_other() -> None:
    first = decide(stopped_by_step(812, loss="301.7"), Situation(), LIMITS)
    # As after an event of a version that did not write keys.
    keyless = Situation(failures=1, last_reason=first.reason)
    assert decide(stopped_by_step(812, loss="301.7"), keyless, LIMITS).event == "requeued"
    killed = decide(ends(-9), Situation(), LIMITS)
    again = Situation(failures=1, last_reason=killed.reason, last_key=killed.key)
    assert decide(ends(-9), again, LIMITS).event == "requeued"


def slow(milliseconds: float) -> Fault:
    return Fault("matmul_seconds", f"a matrix product takes {milliseconds} ms")


def test_the_same_tests_of_the_same_nodes_failing_twice_are_no_accident() -> None:
    def outcome(last_key: str | None, bad: dict[str, Fault]) -> Decision:
        explained = explain_verdict(Verdict(bad, None, {}, []), ["n0", "n1"])
        assert explained is not None
        failure, exclude = explained
        return restart(failure, exclude, Situation(failures=1, last_key=last_key), LIMITS)

    first = outcome(None, {"n0": slow(5.12), "n1": slow(9.0)})
    assert first.event == "requeued" and first.exclude == []
    assert outcome(first.key, {"n1": slow(9.1), "n0": slow(5.13)}).event == "failed"
    other_test = {"n0": slow(5.12), "n1": Fault("gpus", "torch sees 0 GPUs")}
    assert outcome(first.key, other_test).event == "requeued"
    # The bad node is excluded, so the next start differs.
    one = outcome(None, {"n0": slow(5.12)})
    assert outcome(one.key, {"n0": slow(5.12)}).exclude == ["n0"]


def test_node_tests_that_pass_are_no_failure() -> None:
    assert explain_verdict(Verdict({}, None, {}, []), ["n0"]) is None


# -- kinds of failures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, message, reported, kind",
    [
        (0, None, None, None),
        (75, "not finished: stopped with a checkpoint", None, None),
        (2, "error: data.mixture.0.path: gone", None, "user_error"),
        (1, "failed: step 812: the loss is not finite", None, "exception"),
        (1, "failed: step 812: the loss is not finite", "step", "step"),
        (1, "worded differently", "step", "step"),
        (75, "worded differently", "hang", "hang"),
        (75, "failed: hang: no step finished for 10 s", None, None),
        (75, "not finished: the settings change between attempts", None, None),
        (1, "failed: ValueError: step 3 of the recipe", None, "exception"),
        (-9, "failed: step 812: the loss is not finite", "step", "killed"),
        (-6, None, None, "killed"),
        (1, "failed: RuntimeError: Connection reset by peer", None, "lost_peer"),
        (1, None, None, "exception"),
        (1, "worded differently", "lost_peer", "lost_peer"),
        (-6, "worded differently", "lost_peer", "lost_peer"),
        (-6, "failed: RuntimeError: Connection reset by peer", None, "lost_peer"),
        (1, "failed: step 812: broken pipe", "step", "step"),
        (2, "error: data.mixture.0.path: connection refused", None, "user_error"),
    ],
)
def test_a_rank_that_ended_has_a_kind_of_failure(
    code: int, message: str | None, reported: FailureKind | None, kind: FailureKind | None
) -> None:
    """What the rank reported counts.

    Only of a rank that reported nothing, a broken connection is recognized by its message.
    """
    assert classify(code, message, reported) == kind


def test_only_a_failed_step_has_a_key() -> None:
    """The other kinds may have passed by the next attempt, whatever their words."""
    kinds: tuple[FailureKind, ...] = ("step", "exception", "hang", "killed", "lost_peer")
    ended = [RankExit(0, "n0", 1.0, 1, "words", kind=kind, training_step=812) for kind in kinds]
    keys = {rank.kind: rank.failure.key for rank in ended if rank.failure.key}
    assert keys == {"step": "step 812"}


# -- how many failures were there before -----------------------------------------------------------


def story(*attempts: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    return [
        {
            "event": event,
            "attempt": number,
            **({"failure": True, "reason": f"{number}"} if failed else {}),
        }
        for number, lines in enumerate(attempts, 1)
        for event, failed in [("started", False), *lines]
    ]


CRASH, SILENT, STOP, GOOD = (
    [("requeued", True)],
    [],
    [("requeued", False)],
    [("checkpoint", False), ("requeued", True)],
)


@pytest.mark.parametrize(
    "attempts, expected",
    [
        ([], 0),
        ([CRASH, CRASH], 2),
        ([CRASH, SILENT], 2),
        ([CRASH, STOP, CRASH], 2),
        ([CRASH, CRASH, GOOD], 1),
        ([CRASH, GOOD, CRASH], 2),
        ([CRASH, [("checkpoint", False), ("requeued", False)], CRASH], 1),
        ([CRASH, CRASH, [("failed", True)]], 0),
        ([CRASH, CRASH, [("stopped", False)]], 0),
        ([CRASH, [("failed", True)], CRASH], 1),
    ],
)
def test_failures_in_a_row(attempts: list[list[tuple[str, bool]]], expected: int) -> None:
    assert failures_in_a_row(story(*attempts), len(attempts) + 1).count == expected


def test_the_latest_failure_gives_reason_and_key() -> None:
    lines = story(CRASH, CRASH, STOP)
    assert failures_in_a_row(lines, 4) == FailuresInARow(2, "2", None)
    for line in lines:
        if line.get("failure"):
            line["failure_key"] = f"step {line['attempt']}"
    assert failures_in_a_row(lines, 4) == FailuresInARow(2, "2", "step 2")
    # The latest failure left no record, so nothing says that it was the one before.
    silent = [*lines, {"event": "started", "attempt": 4}]
    assert failures_in_a_row(silent, 5) == FailuresInARow(3, "ended without a record", None)
    assert failures_in_a_row([], 1) == FailuresInARow(0)


@given(st.lists(st.sampled_from([CRASH, SILENT, STOP, GOOD]), max_size=12))
def test_failures_in_a_row_is_the_published_rule(attempts: list[list[tuple[str, bool]]]) -> None:
    """Counted forwards: a checkpoint starts the count again, and only a failure adds one."""
    count = 0
    for lines in attempts:
        if any(event == "checkpoint" for event, _ in lines):
            count = 0
        if not lines or lines[-1][1]:
            count += 1
    assert failures_in_a_row(story(*attempts), len(attempts) + 1).count == count

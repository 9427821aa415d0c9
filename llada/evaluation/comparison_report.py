"""The result of `llada compare` as text for readers and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from llada.evaluation.comparison import Difference, ValidatedRun
from llada.evaluation.estimates import FEW, Estimate, format_estimate
from llada.evaluation.validation_files import Measured
from llada.types import JsonObject


def as_text(runs: Sequence[ValidatedRun], differences: Sequence[Difference]) -> str:
    """Describe each run's loss, and which run is better by how much."""
    lines: list[str] = []
    # Files of versions that did not record the objective say nothing.
    objectives = {corpus.objective for run in runs for corpus in run.corpora} - {""}
    for corpus in runs[0].corpora:
        lines += _describe_corpus(corpus, same_noise=len(objectives) < 2)
    width = max(len(run.path) for run in runs)
    for run in runs:
        nelbos = []
        for corpus in run.corpora:
            estimate = corpus.sample.estimate()
            nelbo = format_estimate(estimate.mean, estimate.se)
            nelbos.append(f"{corpus.name} {nelbo}" if len(run.corpora) > 1 else nelbo)
        lines.append(
            f"{run.path:{width}}  step {run.step}  {run.corpora[0].loss_name} {', '.join(nelbos)}"
            f" nats per token (± standard error){_whose(run, objectives)}"
        )
    for difference in differences:
        lines += _describe_difference(runs[0], difference)
    return "\n".join(lines)


def _whose(run: ValidatedRun, objectives: set[str]) -> str:
    """Name the objective of a run's loss, if the runs have different ones."""
    objective = run.corpora[0].objective
    if len(objectives) < 2 or not objective:
        return ""
    return f", {objective}"


def _describe_corpus(corpus: Measured, same_noise: bool) -> list[str]:
    measure = corpus.measure
    same = "the same text and noise in all runs"
    if not same_noise:
        same = "the same text and t in all runs, under the noise of each run's objective"
    lines = [
        f"{corpus.name}: {len(corpus.items):,} {measure.unit}, each text read at"
        f" {measure.draws_per_item} values of t; {same}"
    ]
    effective = corpus.sample.effective_items()
    if effective < FEW:
        lines.append(
            f"{corpus.name}: the errors are rough, so few {measure.unit} (they weigh like"
            f" {effective:.1f} of equal length) say little of other text"
        )
    return lines


def _describe_difference(first_run: ValidatedRun, difference: Difference) -> list[str]:
    runs = (first_run, difference.run)
    exact = [run.path for run in runs if run.corpora[0].is_exact]
    bounds = [run.path for run in runs if not run.corpora[0].is_exact]
    if not exact or not bounds:
        return _verdicts(first_run.path, difference, "better")
    return [
        *_verdicts(first_run.path, difference, "lower"),
        f"the NELBO of {bounds[0]} is an upper bound on its -log p: it may be better than this"
        f" says, but not worse, and {exact[0]} is exactly as good as it says",
    ]


def _verdicts(first: str, difference: Difference, comparative: str) -> list[str]:
    """Say how a run differs on each corpus and over all; the arguments are those of `_verdict`."""
    second = difference.run.path
    if len(difference.corpora) == 1:
        (estimate,) = difference.corpora.values()
        return [_verdict(first, second, estimate, "", comparative)]
    lines = [
        _verdict(first, second, estimate, f" on {name}", comparative)
        for name, estimate in difference.corpora.items()
    ]
    if difference.mean is None:
        lines.append("no mean over the corpora: the runs weigh them differently")
    else:
        everywhere = " over all corpora, by weight"
        lines.append(_verdict(first, second, difference.mean, everywhere, comparative))
    return lines


def _verdict(first: str, second: str, estimate: Estimate, where: str, comparative: str) -> str:
    """Say which of two runs is better, if that can be told.

    Args:
        first, second: the runs.
        estimate: loss of the second less that of the first.
        where: the text's name with a leading space; empty if there is only one.
        comparative: what a lower loss makes a run, "better" or "lower".
    """
    if not math.isfinite(estimate.mean):
        return f"{second} and {first} cannot be compared{where}: a loss is not finite"
    better = second
    worse = first
    if estimate.mean >= 0:
        better = first
        worse = second
    size = abs(estimate.mean)
    half = estimate.half_width()
    # A single item has no error.
    if half is None:
        return (
            f"{better} is lower than {worse} by {size:.4f} nats per token{where}; one item tells"
            " nothing of other text"
        )
    if size == 0 and half == 0:
        return f"{second} equals {first}{where}"
    # Better only if the interval of the difference does not hold 0.
    margin = f"{size:.4f} ± {half:.4f} nats per token (95 %){where}"
    if size > half:
        return f"{better} is {comparative} than {worse} by {margin}"
    return f"{second} and {first} cannot be told apart: {better} is lower by {margin}"


def as_json(runs: Sequence[ValidatedRun], differences: Sequence[Difference]) -> JsonObject:
    """Return the same for programs; a negative difference means better than the first run."""
    return {
        "unit": "nats per token",
        "runs": [_run_fields(run) for run in runs],
        "differences": [_difference_fields(runs[0].path, each) for each in differences],
    }


def _run_fields(run: ValidatedRun) -> JsonObject:
    corpora: JsonObject = {}
    for corpus in run.corpora:
        corpora[corpus.name] = {
            **_estimate_fields(corpus.sample.estimate()),
            "items": len(corpus.items),
            "measure": corpus.measure.fingerprint,
            "objective": corpus.objective,
            "is_exact": corpus.is_exact,
        }
    return {"run": run.path, "step": run.step, "corpora": corpora}


def _difference_fields(first: str, difference: Difference) -> JsonObject:
    return {
        "run": difference.run.path,
        "less": first,
        "corpora": {
            name: _estimate_fields(estimate) for name, estimate in difference.corpora.items()
        },
        "mean": _optional_fields(difference.mean),
        "bits_per_byte": _optional_fields(difference.bits_per_byte),
    }


def _estimate_fields(estimate: Estimate) -> JsonObject:
    return {**asdict(estimate), "ci95": estimate.interval()}


def _optional_fields(estimate: Estimate | None) -> JsonObject | None:
    return None if estimate is None else _estimate_fields(estimate)

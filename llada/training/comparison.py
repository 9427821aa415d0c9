"""`llada compare`: how much better one run is than another on the same held-out text, with the error of the difference.

Runs that were validated alike have read the same text under the same noise. So the losses are subtracted draw by draw, and what both
share, the difficulty of the text and most of the noise, is in neither the difference nor its error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from llada.errors import UserError, did_you_mean
from llada.training import validation_files
from llada.training.estimates import FEW, Estimate, weighted
from llada.training.validation_files import Measured

LAST = "last"
_WORDS = {
    "tokenizer": "tokenizer",
    "text": "held-out text",
    "unit": "items of the error",
    "sequence_length": "data.sequence_length",
    "document_mask": "data.document_mask",
    "windows": "validation.windows",
    "draws_per_item": "draws per item",
    "noise": "noise",
    "items": "items, lengths or t",
}
"""What differs between two measures, in the order in which it explains the most."""
_FINGERPRINTS = ("tokenizer", "text", "items")


@dataclass(frozen=True)
class Run:
    """The validation of one run that is compared.

    Attributes:
        path: as the user gave it.
        step: optimizer steps done.
        corpora: what was measured.
    """

    path: str
    step: int
    corpora: list[Measured]


@dataclass(frozen=True)
class Difference:
    """One run against the first.

    Attributes:
        run: that is compared.
        corpora: name in the first run -> NELBO of `run` less that of the first, nats per token.
        mean: over the corpora by weight; None: of a single corpus, or where the runs weigh them differently.
        bits_per_byte: of the mean, or of the single corpus; None: there is neither.
    """

    run: Run
    corpora: dict[str, Estimate]
    mean: Estimate | None
    bits_per_byte: Estimate | None


def open_runs(paths: Sequence[str], step: str | None, corpus: str | None) -> list[Run]:
    """The validations to compare.

    Args:
        paths: run folders, the first is what the others are compared with.
        step: a number of steps, "last" for each run's own last validation, None for the newest that all have.
        corpus: name in the first run of the only corpus to compare; None: all.

    Raises:
        UserError: fewer than two runs, a folder without validations, a step that a run lacks, another corpus, a damaged file.
    """
    if len(paths) < 2:
        raise UserError(f"RUN: {len(paths)} given; name two runs or more, the others are compared with the first")
    there = {path: _steps(path) for path in paths}
    runs = [Run(path, chosen, validation_files.read(Path(path), chosen)) for path, chosen in _choose(there, paths, step)]
    if corpus is None:
        return runs
    names = [measured.name for measured in runs[0].corpora]
    if corpus not in names:
        raise UserError(
            f"--corpus: {runs[0].path} was not validated on '{corpus}', only on {', '.join(names)}{did_you_mean(corpus, names)}"
        )
    text = runs[0].corpora[names.index(corpus)].measure.text
    only = [replace(run, corpora=[m for m in run.corpora if m.measure.text == text or m.name == corpus][:1]) for run in runs]
    for run, selected in zip(runs, only, strict=True):
        if not selected.corpora:
            there_too = ", ".join(measured.name for measured in run.corpora) or "none"
            raise UserError(f"--corpus: {run.path} was not validated on '{corpus}' of {runs[0].path}, only on {there_too}")
    return [replace(runs[0], corpora=[runs[0].corpora[names.index(corpus)]]), *only[1:]]


def _steps(path: str) -> list[int]:
    run = Path(path)
    if os.path.isfile(run):
        raise UserError(f"RUN: '{path}' is a file; name the folder of the run")
    if not os.path.isdir(run):  # False too for a name that no folder can have
        beside = run.parent.iterdir() if os.path.isdir(run.parent) else ()
        near = did_you_mean(run.name, [other.name for other in beside if other.is_dir()])
        raise UserError(f"RUN: no folder '{path}'{near}")
    steps = validation_files.steps(run)
    if not steps:
        raise UserError(f"RUN: '{path}' has no {validation_files.FOLDER}/step_*.npz, which a run writes with each of its validations")
    return steps


def _choose(there: dict[str, list[int]], paths: Sequence[str], step: str | None) -> list[tuple[str, int]]:
    if step == LAST:
        return [(path, there[path][-1]) for path in paths]
    if step is not None:
        if not re.fullmatch("[0-9]{1,18}", step):
            raise UserError(f"--step: '{step}' is neither a number of steps nor '{LAST}'")
        for path in paths:
            if int(step) not in there[path]:
                raise UserError(f"--step: {path} has no validation after step {step}; it has: {', '.join(map(str, there[path]))}")
        return [(path, int(step)) for path in paths]
    common = set.intersection(*(set(steps) for steps in there.values()))
    if not common:
        last = ", ".join(f"{path} {there[path][-1]}" for path in paths)
        raise UserError(f"--step: no step after which all runs were validated (their last: {last}); --step {LAST} compares these")
    return [(path, max(common)) for path in paths]


def compare(runs: Sequence[Run]) -> list[Difference]:
    """Every run against the first. Raises UserError when they were not validated alike."""
    return [_difference(runs[0], run) for run in runs[1:]]


def _difference(first: Run, second: Run) -> Difference:
    pairs = _pairs(first, second)
    estimates: dict[str, Estimate] = {}
    for a, b in pairs:
        paired = replace(a.sample, loss=b.sample.loss - a.sample.loss)
        estimates[a.name] = paired.estimate()
    weights, others = ([m.weight for m in corpora] for corpora in zip(*pairs, strict=True))
    alike = all(math.isclose(w / sum(weights), v / sum(others)) for w, v in zip(weights, others, strict=True))
    mean = weighted(list(estimates.values()), weights) if alike else None
    bits = [e.scaled(a.tokens_per_byte / math.log(2)) for e, (a, _) in zip(estimates.values(), pairs, strict=True)]
    return Difference(second, estimates, mean if len(pairs) > 1 else None, weighted(bits, weights) if alike else None)


def _pairs(first: Run, second: Run) -> list[tuple[Measured, Measured]]:
    """The corpora of two runs that belong together: those of the same text, whatever they are called."""
    left = list(second.corpora)
    pairs = []
    for a in first.corpora:
        b = next((m for m in left if m.measure.text == a.measure.text), None) or next((m for m in left if m.name == a.name), None)
        if b is None:
            _refuse_corpora(first, second)
        left = [m for m in left if m is not b]
        _check_measures(first, second, a, b)
        pairs.append((a, b))
    if left:
        _refuse_corpora(first, second)
    return pairs


def _refuse_corpora(first: Run, second: Run) -> NoReturn:
    lists = [", ".join(m.name for m in run.corpora) or "none" for run in (first, second)]
    raise UserError(
        f"{first.path} and {second.path} were validated on different corpora ({lists[0]}; {lists[1]}); --corpus compares one that both have"
    )


def _check_measures(first: Run, second: Run, a: Measured, b: Measured) -> None:
    """Raises UserError, naming what differs, unless both runs read the same text under the same noise."""
    if a.measure == b.measure:
        return
    old, new = asdict(a.measure), asdict(b.measure)
    differ = [key for key in _WORDS if old[key] != new[key]]
    if "tokenizer" in differ:
        differ = ["tokenizer"]  # the text's fingerprint follows the tokenizer's
    elif differ != ["items"]:
        differ.remove("items")  # which follow from the others
    words = [_WORDS[key] if key in _FINGERPRINTS else f"{_WORDS[key]} ({old[key]} and {new[key]})" for key in differ]
    raise UserError(
        f"{first.path} and {second.path} cannot be compared on '{a.name}': they were validated with different {', '.join(words)}"
    )


# -- in words and in JSON ----------------------------------------------------------------------------------------------


def in_words(runs: Sequence[Run], differences: Sequence[Difference]) -> str:
    """What a reader wants to know: each run's NELBO, and which is better by how much."""
    lines = []
    for m in runs[0].corpora:
        read = f"each text read at {m.measure.draws_per_item} values of t; the same text and noise in all runs"
        lines.append(f"{m.name}: {len(m.items):,} {m.measure.unit}, {read}")
        if m.sample.effective_items() < FEW:
            even = f"{m.sample.effective_items():.1f} of equal length"
            lines.append(f"{m.name}: the errors are rough, so few {m.measure.unit} (they weigh like {even}) say little of other text")
    width = max(len(run.path) for run in runs)
    for run in runs:
        each = [f"{m.name} {_plain(m.sample.estimate())}" if len(run.corpora) > 1 else _plain(m.sample.estimate()) for m in run.corpora]
        lines.append(f"{run.path:{width}}  step {run.step}  NELBO {', '.join(each)} nats per token (± standard error)")
    for difference in differences:
        names = runs[0].path, difference.run.path
        for name, estimate in difference.corpora.items():
            lines.append(_verdict(*names, estimate, f" on {name}" if len(difference.corpora) > 1 else ""))
        if difference.mean is not None:
            lines.append(_verdict(*names, difference.mean, " over all corpora, by weight"))
        elif len(difference.corpora) > 1:
            lines.append("no mean over the corpora: the runs weigh them differently")
    return "\n".join(lines)


def _plain(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} ± " + ("unknown" if estimate.se is None else f"{estimate.se:.4f}")


def _verdict(first: str, second: str, estimate: Estimate, where: str) -> str:
    if not math.isfinite(estimate.mean):
        return f"{second} and {first} cannot be compared{where}: a loss is not finite"
    better, worse = (second, first) if estimate.mean < 0 else (first, second)
    size, half = abs(estimate.mean), estimate.half_width()
    if half is None:
        return f"{better} is lower than {worse} by {size:.4f} nats per token{where}; one item tells nothing of other text"
    if size == 0 and half == 0:
        return f"{second} equals {first}{where}"
    by = f"{size:.4f} ± {half:.4f} nats per token (95 %){where}"
    if size > half:
        return f"{better} is better than {worse} by {by}"
    return f"{second} and {first} cannot be told apart: {better} is lower by {by}"


def as_json(runs: Sequence[Run], differences: Sequence[Difference]) -> dict[str, Any]:
    """The same for programs; a negative difference means that the run is better than the first."""

    def fields(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else {**asdict(estimate), "ci95": estimate.interval()}

    return {
        "unit": "nats per token",
        "runs": [
            {
                "run": run.path,
                "step": run.step,
                "corpora": {
                    m.name: {**(fields(m.sample.estimate()) or {}), "items": len(m.items), "measure": m.measure.fingerprint}
                    for m in run.corpora
                },
            }
            for run in runs
        ],
        "differences": [
            {
                "run": d.run.path,
                "less": runs[0].path,
                "corpora": {name: fields(estimate) for name, estimate in d.corpora.items()},
                "mean": fields(d.mean),
                "bits_per_byte": fields(d.bits_per_byte),
            }
            for d in differences
        ],
    }

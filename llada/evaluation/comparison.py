"""How much better one run is than another on the same held-out text, with the difference's error.

Runs that were validated alike have read the same text under the same noise. So the losses are
subtracted draw by draw: what both share, the difficulty of the text and most of the noise, is in
neither the difference nor its error. The command is `llada compare`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llada.errors import UserError, did_you_mean
from llada.evaluation import validation_files
from llada.evaluation.estimates import Estimate, weighted
from llada.evaluation.validation_files import Measured

LAST = "last"
"""Value of --step: each run's own last validation."""
_MEASURE_NAMES = {
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
"""Attribute of a Measure -> what a message calls it; the one that explains the most comes first."""
_FINGERPRINTS = ("tokenizer", "text", "items")
"""Attributes whose values say nothing to a reader."""


@dataclass(frozen=True)
class ValidatedRun:
    """One validation of a run that is compared.

    Attributes:
        path: as the user gave it.
        step: optimizer steps done.
        corpora: what was measured.
    """

    path: str
    step: int
    corpora: list[Measured]

    @property
    def corpus_names(self) -> str:
        """The names of the corpora, for messages."""
        return ", ".join(corpus.name for corpus in self.corpora) or "none"


@dataclass(frozen=True)
class Difference:
    """One run against the first.

    Attributes:
        run: the run that is compared.
        corpora: name in the first run -> NELBO of `run` less that of the first, nats per token.
        mean: over the corpora by weight; None: there is a single corpus, or the runs weigh them
            differently.
        bits_per_byte: the mean, or the single corpus's difference, in bits per byte; None: the runs
            weigh the corpora differently.
    """

    run: ValidatedRun
    corpora: dict[str, Estimate]
    mean: Estimate | None
    bits_per_byte: Estimate | None


# -- what is compared ------------------------------------------------------------------------------


def open_runs(paths: Sequence[str], step: str | None, corpus: str | None) -> list[ValidatedRun]:
    """Read the validations to compare.

    Args:
        paths: run folders; the others are compared with the first.
        step: a number of steps, "last" for each run's own last validation, None for the newest that
            all have.
        corpus: name in the first run of the only corpus to compare; None: all.

    Raises:
        UserError: fewer than two runs, a folder without validations, a step that a run lacks,
            another corpus, a damaged file.
    """
    if len(paths) < 2:
        raise UserError(
            f"RUN: {len(paths)} given; name two runs or more, the others are compared with the"
            " first"
        )
    steps_of = {path: _validated_steps(path) for path in paths}
    chosen = _choose_steps(steps_of, step)
    runs = [
        ValidatedRun(path, chosen[path], validation_files.read(Path(path), chosen[path]))
        for path in paths
    ]
    return runs if corpus is None else _select_corpus(runs, corpus)


def _validated_steps(path: str) -> list[int]:
    """Return the steps after which a run was validated, ascending, at least one."""
    run = Path(path)
    if os.path.isfile(run):
        raise UserError(f"RUN: '{path}' is a file; name the folder of the run")
    # os.path.isdir, unlike Path.is_dir, also answers False for a name that no folder can have.
    if not os.path.isdir(run):
        siblings: list[str] = []
        if os.path.isdir(run.parent):
            siblings = [other.name for other in run.parent.iterdir() if other.is_dir()]
        raise UserError(f"RUN: no folder '{path}'{did_you_mean(run.name, siblings)}")
    steps = validation_files.steps(run)
    if not steps:
        raise UserError(
            f"RUN: '{path}' has no {validation_files.FOLDER}/step_*.npz, which a run writes with"
            " each of its validations"
        )
    return steps


def _choose_steps(steps_of: Mapping[str, list[int]], step: str | None) -> dict[str, int]:
    """Return the step of each run that is compared; the arguments are those of `open_runs`."""
    # Each run's own last validation, perhaps after different numbers of steps.
    if step == LAST:
        return {path: steps[-1] for path, steps in steps_of.items()}
    # The step that the user names.
    if step is not None:
        if not re.fullmatch("[0-9]{1,18}", step):
            raise UserError(f"--step: '{step}' is neither a number of steps nor '{LAST}'")
        for path, steps in steps_of.items():
            if int(step) not in steps:
                raise UserError(
                    f"--step: {path} has no validation after step {step}; it has:"
                    f" {', '.join(map(str, steps))}"
                )
        return dict.fromkeys(steps_of, int(step))
    # The newest step that all runs have.
    common = set.intersection(*(set(steps) for steps in steps_of.values()))
    if not common:
        last = ", ".join(f"{path} {steps[-1]}" for path, steps in steps_of.items())
        raise UserError(
            f"--step: no step after which all runs were validated (their last: {last}); --step"
            f" {LAST} compares these"
        )
    return dict.fromkeys(steps_of, max(common))


def _select_corpus(runs: Sequence[ValidatedRun], name: str) -> list[ValidatedRun]:
    """Keep one corpus of the first run, and in the others its text, whatever they call it."""
    first = runs[0]
    names = [corpus.name for corpus in first.corpora]
    if name not in names:
        raise UserError(
            f"--corpus: {first.path} was not validated on '{name}', only on"
            f" {', '.join(names)}{did_you_mean(name, names)}"
        )
    chosen = first.corpora[names.index(name)]
    selected = [replace(first, corpora=[chosen])]
    for run in runs[1:]:
        matching = [
            corpus
            for corpus in run.corpora
            if corpus.measure.text == chosen.measure.text or corpus.name == name
        ]
        if not matching:
            raise UserError(
                f"--corpus: {run.path} was not validated on '{name}' of {first.path}, only on"
                f" {run.corpus_names}"
            )
        selected.append(replace(run, corpora=matching[:1]))
    return selected


# -- differences -----------------------------------------------------------------------------------


def compare(runs: Sequence[ValidatedRun]) -> list[Difference]:
    """Compare every run with the first. Raises UserError when they were not validated alike."""
    return [_difference(runs[0], run) for run in runs[1:]]


def _difference(first: ValidatedRun, second: ValidatedRun) -> Difference:
    pairs = _pair_corpora(first, second)
    estimates: dict[str, Estimate] = {}
    bits = []
    for a, b in pairs:
        # The measures are equal, so loss [i, j] is the same draw of the same text in both.
        paired = replace(a.sample, loss=b.sample.loss - a.sample.loss)
        estimate = paired.estimate()
        estimates[a.name] = estimate
        bits.append(estimate.scaled(a.tokens_per_byte / math.log(2)))
    weights = [a.weight for a, _ in pairs]
    other_weights = [b.weight for _, b in pairs]
    if not _same_shares(weights, other_weights):
        return Difference(second, estimates, mean=None, bits_per_byte=None)
    mean = None
    if len(pairs) > 1:
        mean = weighted(list(estimates.values()), weights)
    return Difference(second, estimates, mean, weighted(bits, weights))


def _same_shares(weights: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether two lists of weights are proportional."""
    return all(
        math.isclose(weight / sum(weights), other / sum(others))
        for weight, other in zip(weights, others, strict=True)
    )


def _pair_corpora(first: ValidatedRun, second: ValidatedRun) -> list[tuple[Measured, Measured]]:
    """Pair the corpora of two runs: those of the same text, whatever they are called.

    Where no text is the same, the name decides, so that the refusal can say what differs.
    """
    rest = list(second.corpora)
    pairs = []
    for corpus in first.corpora:
        same_text = [other for other in rest if other.measure.text == corpus.measure.text]
        same_name = [other for other in rest if other.name == corpus.name]
        partners = same_text + same_name
        if not partners:
            raise _different_corpora(first, second)
        partner = partners[0]
        rest = [other for other in rest if other is not partner]
        _check_measures(first, second, corpus, partner)
        pairs.append((corpus, partner))
    if rest:
        raise _different_corpora(first, second)
    return pairs


def _different_corpora(first: ValidatedRun, second: ValidatedRun) -> UserError:
    return UserError(
        f"{first.path} and {second.path} were validated on different corpora"
        f" ({first.corpus_names}; {second.corpus_names}); --corpus compares one that both have"
    )


def _check_measures(
    first: ValidatedRun, second: ValidatedRun, corpus: Measured, partner: Measured
) -> None:
    """Raise UserError, naming what differs, unless both runs read the same text and noise."""
    if corpus.measure == partner.measure:
        return
    old = asdict(corpus.measure)
    new = asdict(partner.measure)
    # One cause makes several attributes differ; only what explains the others is named.
    different = [name for name in _MEASURE_NAMES if old[name] != new[name]]
    if "tokenizer" in different:
        different = ["tokenizer"]  # the text's fingerprint follows from the tokenizer's
    elif different != ["items"]:
        different.remove("items")  # they follow from the others
    descriptions = []
    for name in different:
        description = _MEASURE_NAMES[name]
        if name not in _FINGERPRINTS:
            description += f" ({old[name]} and {new[name]})"
        descriptions.append(description)
    raise UserError(
        f"{first.path} and {second.path} cannot be compared on '{corpus.name}': they were validated"
        f" with different {', '.join(descriptions)}"
    )

"""Validation: the NELBO of held-out documents on fixed noise, with its errors.

Always fixed-count masking (its expectation is the exact NELBO, whatever the training uses) and the
same noise in every run, whatever its seed, and at every step. Of conversations, the NELBO of the
responses given their prompts, without padding.

Every window (or conversation) that is read is read in one or more sweeps of four draws. The draws
of a text lie evenly over [0, 1) in t, from an offset of its own; no two texts share noise. What
follows from the losses stands in `estimates`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llada.data.base import F64, I64, VALIDATION, StepPlan, TrainingData
from llada.engine.base import Engine, ParallelRank
from llada.evaluation.estimates import (
    FEW,
    SWEEP,
    Estimate,
    Sample,
    pooled,
    sums,
    weighted,
    with_error,
)
from llada.evaluation.validation_files import Measure, Measured
from llada.noise import derive_key, hash64, permute, to_unit
from llada.objectives import Batch, collate

_SEED = 0  # the noise is part of the measure, not of the run


@dataclass(frozen=True)
class Design:
    """What a validation reads of one corpus; fixed through the run.

    Attributes:
        plan: every draw.
        segments: segment of each draw in the plan, t ascending within a sweep, int64 [sweeps, 4].
        items: number in the split of every item: window, document or conversation, int64 [k].
        owner: item of each sweep, 0..k-1, int64 [sweeps].
        text: a number that sweeps of the same text share, int64 [sweeps].
        measure: all of that in short, for comparisons.
    """

    plan: StepPlan
    segments: I64
    items: I64
    owner: I64
    text: I64
    measure: Measure

    @property
    def t(self) -> F64:
        """Diffusion time of each draw, float64 [sweeps, 4]."""
        return self.plan.t[self.segments]

    def sample(self, losses: F64) -> Sample:
        """The losses of the draws from those of the plan's segments."""
        return Sample(
            losses[self.segments], self.plan.maskable[self.segments[:, 0]], self.owner, self.text
        )


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        line: its fields of metrics.jsonl, without the step.
        corpora: the losses behind it.
    """

    line: dict[str, Any]
    corpora: list[Measured]


class Validator:
    """NELBO per token and bits per byte of every corpus that has validation windows.

    Args:
        data: of the run.
        place: of this rank; each replica takes every data_size-th micro-batch.
    """

    def __init__(self, data: TrainingData, place: ParallelRank) -> None:
        self._data, self._place = data, place
        self.objective = data.make_objective(_SEED)
        self.corpora = [i for i, reader in enumerate(data.readers[VALIDATION]) if reader.count > 0]
        self._designs = {i: self.design(i) for i in self.corpora}

    def __call__(self, engine: Engine) -> Validation:
        """Measure; collective."""
        corpora = [self._measure(engine, i) for i in self.corpora]
        estimates = [(m.sample.estimate(), m.tokens_per_byte / math.log(2)) for m in corpora]
        weights = [m.weight for m in corpora]
        nelbo = weighted([e for e, _ in estimates], weights)
        bits = weighted([e.scaled(factor) for e, factor in estimates], weights)
        line = {
            **_fields("nelbo_per_token", nelbo),
            **_fields("bits_per_byte", bits),
            "corpora": {},
        }
        for i, m, (estimate, factor) in zip(self.corpora, corpora, estimates, strict=True):
            line["corpora"][m.name] = {
                **_fields("nelbo_per_token", estimate),
                **_fields("bits_per_byte", estimate.scaled(factor)),
                "items": len(m.items),
                "items_effective": m.sample.effective_items(),
                "unit": m.measure.unit,
                "measure": m.measure.fingerprint,
                "t_deciles": _by_decile(m.sample, self._designs[i].t),
            }
        return Validation(line, corpora)

    def design(self, corpus: int) -> Design:
        """The draws of a corpus: at most validation.windows, of as many different windows
        (conversations) as get four each.
        """
        data = self._data
        plan, sweeps = self._plan(corpus)
        rows = np.repeat(np.arange(len(plan.samples)), np.diff(plan.firsts))
        within = np.arange(len(rows)) - plan.firsts[rows]
        read = np.flatnonzero(plan.maskable > 0)
        # The four draws of a sweep follow each other in the plan, and their windows are cut alike.
        segments = read[np.lexsort((plan.t[read], within[read], rows[read] // SWEEP))].reshape(
            -1, SWEEP
        )
        first = segments[:, 0]
        items, owner = np.unique(data.owners(plan)[first], return_inverse=True)
        _, text = np.unique(
            np.stack([plan.items[rows[first]], within[first]]), axis=1, return_inverse=True
        )
        config, manifest = data.config, data.corpora[corpus].manifest
        digest = hashlib.sha256()
        for array in (items, owner, plan.maskable[segments], plan.t[segments]):
            digest.update(np.ascontiguousarray(array).tobytes())
        measure = Measure(
            text=manifest.fingerprint(VALIDATION),
            tokenizer=manifest.tokenizer_fingerprint,
            unit=data.unit,
            sequence_length=config.data.sequence_length,
            document_mask=config.data.document_mask,
            windows=config.validation.windows,
            draws_per_item=SWEEP * sweeps,
            items=digest.hexdigest(),
        )
        return Design(plan, segments, items, owner.reshape(-1), text.reshape(-1), measure)

    def _plan(self, corpus: int) -> tuple[StepPlan, int]:
        """Every draw of a corpus, and the sweeps of each window or conversation."""
        data, windows = self._data, self._data.config.validation.windows
        count = min(data.readers[VALIDATION][corpus].count, windows // SWEEP)
        sweeps = windows // (SWEEP * count)
        draws = np.arange(count * sweeps * SWEEP, dtype=np.int64)
        purpose = self.purpose(corpus)
        order = permute(
            np.arange(count),
            data.readers[VALIDATION][corpus].count,
            derive_key(_SEED, purpose, "order"),
        )
        sweep = draws // SWEEP % sweeps

        def draw_t(rows: I64, texts: I64) -> F64:
            offset = to_unit(hash64(derive_key(_SEED, purpose, "offset"), texts))
            return (offset + draws[rows] % SWEEP / SWEEP + sweep[rows] / (SWEEP * sweeps)) % 1.0

        return (
            data.validation_plan(draws, corpus, order[draws // (SWEEP * sweeps)], sweep, draw_t),
            sweeps,
        )

    def purpose(self, corpus: int) -> str:
        """Name of the noise of a corpus: it follows the text, not its path."""
        return f"validation/{self._data.corpora[corpus].manifest.fingerprint(VALIDATION)}"

    def _batches(self, plan: StepPlan, corpus: int) -> list[Batch]:
        """This replica's micro-batches; the last ones are filled up with draws of weight 0, since
        pipelines have fixed shapes.
        """
        data, micro = self._data, self._data.config.batch.micro
        parallel = data.config.parallel
        unit = (
            micro * self._place.data_size * (parallel.pipeline if parallel.virtual_pipeline else 1)
        )
        total = -(-len(plan.samples) // unit) * unit
        batches = []
        for first in range(self._place.data_rank * micro, total, micro * self._place.data_size):
            draws = [i if i < len(plan.samples) else None for i in range(first, first + micro)]
            windows = [data.window(VALIDATION, plan, 0 if i is None else i) for i in draws]
            corrupted = [
                self.objective.corrupt(w, masking="fixed_count", purpose=self.purpose(corpus))
                for w in windows
            ]
            empty = slice(0, 0)
            corrupted = [
                (
                    c
                    if i is not None
                    else replace(c, predicted=c.predicted[empty], weights=c.weights[empty])
                )
                for i, c in zip(draws, corrupted, strict=True)
            ]
            batches.append(collate(windows, corrupted, plan.normaliser))
        return batches

    def _measure(self, engine: Engine, corpus: int) -> Measured:
        data, design = self._data, self._designs[corpus]
        losses = engine.evaluate(self._batches(design.plan, corpus), len(design.plan.t)).numpy()
        return Measured(
            name=data.names[corpus],
            weight=data.mixture.sources[corpus].first_weight,
            tokens_per_byte=data.readers[VALIDATION][corpus].tokens_per_byte(),
            measure=design.measure,
            items=design.items,
            sample=design.sample(losses),
        )


def _fields(name: str, estimate: Estimate) -> dict[str, Any]:
    return {
        name: estimate.mean,
        f"{name}_se": estimate.se,
        f"{name}_se_noise": estimate.se_noise,
        f"{name}_ci95": estimate.interval(),
    }


def _by_decile(sample: Sample, t: F64) -> list[dict[str, float | None] | None]:
    """NELBO per token of the draws in each tenth of t, with its standard error over items; None
    where there is none.
    """
    decile = np.minimum((t * 10).astype(int), 9)
    item = np.repeat(sample.item[:, None], SWEEP, axis=1)
    length = np.repeat(sample.length[:, None], SWEEP, axis=1)
    rows: list[dict[str, float | None] | None] = []
    for d in range(10):
        chosen = decile == d
        lengths = sums(item[chosen], length[chosen])
        own = np.flatnonzero(lengths)
        if not len(own):
            rows.append(None)
            continue
        mean, se = pooled(sums(item[chosen], sample.loss[chosen])[own], lengths[own])
        rows.append({"nelbo_per_token": mean, "nelbo_per_token_se": se, "items": len(own)})
    return rows


def describe_validation(line: dict[str, Any]) -> str:
    """One line for the console."""
    few = [name for name, values in line["corpora"].items() if values["items_effective"] < FEW]
    rough = (
        f" (rough: few {' and '.join(dict.fromkeys(line['corpora'][name]['unit'] for name in few))}"
        f" of {', '.join(few)})"
        if few
        else ""
    )
    return (
        f"NELBO {with_error(line, 'nelbo_per_token')} nats/token,"
        f" {with_error(line, 'bits_per_byte')} bits/byte{rough}"
    )


def unigram_entropy(counts: torch.Tensor | np.ndarray) -> float:
    """Entropy of the empirical token distribution, nats per token: what a model that ignores
    context could reach.

    Args:
        counts: occurrences of every id [vocabulary].
    """
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())

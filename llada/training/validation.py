"""Validation: the NELBO of held-out documents on fixed noise, with its standard error.

Always fixed-count masking (its expectation is the exact NELBO, whatever the training uses) and the same noise in every run,
whatever its seed, and at every step. Of conversations, the NELBO of the responses given their prompts, without padding.

The windows of a corpus are dealt to 8 rotations; within a rotation t is stratified, between rotations all noise is independent,
so the spread of the 8 means gives an honest standard error with the small variance of stratified t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llada.data.base import F64, I64, VALIDATION, Plan, TrainingData
from llada.engine.base import Engine, Place
from llada.noise import derive_key, permute, timesteps
from llada.objectives import Batch, collate

ROTATIONS = 8
_SEED = 0  # the noise is part of the measure, not of the run


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.mean * factor, self.error * factor)


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of independent values and the standard error of that mean (nan for a single value)."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


class Validator:
    """NELBO per token and bits per byte of every corpus that has validation windows.

    Args:
        data: of the run.
        place: of this rank; each replica takes every data_size-th micro-batch.
    """

    def __init__(self, data: TrainingData, place: Place) -> None:
        self._data, self._place = data, place
        self.objective = data.make_objective(_SEED)
        self.corpora = [i for i, reader in enumerate(data.readers[VALIDATION]) if reader.count > 0]

    def __call__(self, engine: Engine) -> dict[str, Any]:
        """Measure; collective. The fields of a validation line of metrics.jsonl, without the step."""
        measured = {i: self._measure(engine, i) for i in self.corpora}
        weights = np.array([self._data.mixture.sources[i].first_weight for i in self.corpora])
        weights = weights / weights.sum()
        line: dict[str, Any] = {}
        for key in ("nelbo_per_token", "bits_per_byte"):
            line[key] = float(sum(w * measured[i][key] for w, i in zip(weights, self.corpora, strict=True)))
            line[key + "_se"] = math.sqrt(sum((w * measured[i][key + "_se"]) ** 2 for w, i in zip(weights, self.corpora, strict=True)))
        line["corpora"] = {self._data.mixture.sources[i].name: measured[i] for i in self.corpora}
        return line

    def plan(self, corpus: int) -> Plan:
        """The draws of a corpus: window or conversation, segments and t of each; draw d belongs to rotation d mod 8."""
        data = self._data
        count = data.readers[VALIDATION][corpus].count
        draws = np.arange(data.config.validation.windows, dtype=np.int64)
        purpose = self.purpose(corpus)
        order = permute(draws % count, count, derive_key(_SEED, purpose, "order"))

        def draw_t(shares: F64, owners: I64) -> F64:
            t = np.empty(len(shares))
            for r in range(ROTATIONS):
                own = owners % ROTATIONS == r
                t[own] = timesteps(_SEED, r, shares[own], "stratified", purpose)
            return t

        return data.validation_plan(draws, corpus, order, draw_t)

    def purpose(self, corpus: int) -> str:
        """Name of the noise of a corpus: it follows the text, not its path."""
        return f"validation/{self._data.corpora[corpus].manifest.fingerprint(VALIDATION)}"

    def _batches(self, plan: Plan, corpus: int) -> list[Batch]:
        """This replica's micro-batches; the last ones are filled up with draws of weight 0, since pipelines have fixed shapes."""
        data, micro = self._data, self._data.config.batch.micro
        parallel = data.config.parallel
        unit = micro * self._place.data_size * (parallel.pipeline if parallel.virtual_pipeline else 1)
        total = -(-len(plan.samples) // unit) * unit
        batches = []
        for first in range(self._place.data_rank * micro, total, micro * self._place.data_size):
            draws = [i if i < len(plan.samples) else None for i in range(first, first + micro)]
            windows = [data.window(VALIDATION, plan, 0 if i is None else i) for i in draws]
            corrupted = [self.objective.corrupt(w, masking="fixed_count", purpose=self.purpose(corpus)) for w in windows]
            empty = slice(0, 0)
            corrupted = [
                c if i is not None else replace(c, predicted=c.predicted[empty], weights=c.weights[empty])
                for i, c in zip(draws, corrupted, strict=True)
            ]
            batches.append(collate(windows, corrupted, plan.normaliser))
        return batches

    def _measure(self, engine: Engine, corpus: int) -> dict[str, Any]:
        plan = self.plan(corpus)
        sums = engine.evaluate(self._batches(plan, corpus), len(plan.t)).numpy()
        owner = np.repeat(plan.samples, np.diff(plan.firsts)) % ROTATIONS
        means = [sums[owner == r].sum() / plan.maskable[owner == r].sum() for r in range(ROTATIONS)]
        nelbo = estimate(means)
        bits = nelbo.scaled(self._data.readers[VALIDATION][corpus].tokens_per_byte() / math.log(2))
        return {
            "nelbo_per_token": nelbo.mean,
            "nelbo_per_token_se": nelbo.error,
            "bits_per_byte": bits.mean,
            "bits_per_byte_se": bits.error,
            "t_deciles": _by_decile(plan, sums),
        }


def _by_decile(plan: Plan, sums: np.ndarray) -> list[dict[str, float] | None]:
    """NELBO per token of the segments in each tenth of t, with its standard error over segments; None where there is none."""
    decile = np.where(plan.maskable > 0, np.minimum((plan.t * 10).astype(int), 9), -1)
    rows: list[dict[str, float] | None] = []
    for d in range(10):
        chosen = decile == d
        rows.append(_ratio(sums[chosen], plan.maskable[chosen]) if chosen.any() else None)
    return rows


def _ratio(sums: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Summed loss over summed tokens, and the standard error of that ratio (Cochran, Sampling Techniques, section 2.11)."""
    n, mean = len(sums), sums.sum() / lengths.sum()
    row = {"nelbo_per_token": float(mean), "segments": n}
    if n > 1:
        row["nelbo_per_token_se"] = float(np.sqrt(((sums - mean * lengths) ** 2).sum() * n / (n - 1)) / lengths.sum())
    return row


def describe(line: dict[str, Any]) -> str:
    """One line for the console."""
    return (
        f"NELBO {line['nelbo_per_token']:.4f} ± {line['nelbo_per_token_se']:.4f} nats/token, "
        f"{line['bits_per_byte']:.4f} ± {line['bits_per_byte_se']:.4f} bits/byte"
    )


def unigram_entropy(counts: torch.Tensor | np.ndarray) -> float:
    """Entropy of the empirical token distribution, nats per token: what a model that ignores context could reach.

    Args:
        counts: occurrences of every id [vocabulary].
    """
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())

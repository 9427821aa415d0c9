"""Validation: the NELBO of held-out documents on fixed noise, with its errors.

What is measured is the bound of the objective that is trained (`Objective.bound`): for masked
diffusion fixed-count masking, whose expectation is the exact NELBO whatever the training uses, and
for autoregression the likelihood itself, which is computed once for all draws of a text. The noise
is the same in every run, whatever its seed, and at every step. Of conversations, the NELBO is
that of the responses given their prompts, without padding.

Every window (or conversation) that is read is read in one or more sweeps of four draws. The draws
of a text lie evenly over [0, 1) in t, from an offset of its own; no two texts share noise. With 8
draws (two sweeps) and offset 0.05, a text is read at

    sweep 0: t = 0.050, 0.300, 0.550, 0.800
    sweep 1: t = 0.175, 0.425, 0.675, 0.925

What follows from the losses is in `llada.evaluation.estimates`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from llada.arithmetic import ceil_div
from llada.arrays import F64, I64
from llada.data.manifest import VALIDATION
from llada.data.step_plan import StepPlan
from llada.data.training_data import TrainingData
from llada.engine.base import Engine, ParallelRank
from llada.evaluation.estimates import (
    FEW,
    SWEEP,
    CorpusLosses,
    Estimate,
    pooled,
    sums,
    weighted,
    with_error,
)
from llada.evaluation.validation_files import Measure, Measured, name_of_loss
from llada.noise import derive_key, hash64, permute, to_unit
from llada.objectives import Batch, Corrupted, Key, collate

_SEED = 0  # the noise is part of the measure, not of the run
_NUM_DECILES = 10

Fields: TypeAlias = dict[str, Any]
"""A part of a validation line of metrics.jsonl: numbers, None, strings, lists and dicts of them."""


@dataclass(frozen=True)
class Design:
    """What a validation reads of one corpus; fixed through the run.

    Attributes:
        plan: every draw.
        groups: noise group of each draw in the plan, t ascending within a sweep, int64 [sweeps, 4].
        items: number in the split of every item: window, document or conversation, int64 [k].
        owner: item of each sweep, 0..k-1, int64 [sweeps].
        text: a number that sweeps of the same text share, int64 [sweeps].
        measure: all of that in short, for comparisons.
    """

    plan: StepPlan
    groups: I64
    items: I64
    owner: I64
    text: I64
    measure: Measure

    @property
    def t(self) -> F64:
        """Diffusion time of each draw, float64 [sweeps, 4]."""
        return self.plan.groups.t[self.groups]

    def sample(self, losses: F64) -> CorpusLosses:
        """Arrange the losses of the plan's noise groups, float64 [g], by sweep."""
        # The four draws of a sweep read the same text, so the first one's length is that of all.
        length = self.plan.groups.sizes[self.groups[:, 0]]
        return CorpusLosses(losses[self.groups], length, self.owner, self.text)

    def with_one_draw_for_all(self, losses: F64) -> F64:
        """Give all draws of a sweep the loss of the only one that was read, float64 [g].

        Args:
            losses: of the plan's noise groups, 0 for those that were not read, float64 [g].
        """
        filled = losses.copy()
        filled[self.groups] = losses[self.groups].sum(axis=1, keepdims=True)
        return filled


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        line: its fields of metrics.jsonl, without the step.
        corpora: the losses behind it.
    """

    line: Fields
    corpora: list[Measured]


class Validator:
    """Measures NELBO per token and bits per byte of every corpus that has validation windows.

    Args:
        data: the run's data.
        parallel_rank: of this process; each replica takes every data_size-th micro-batch.

    Attributes:
        corpora: numbers of the corpora that are validated.
    """

    def __init__(self, data: TrainingData, parallel_rank: ParallelRank) -> None:
        self._data = data
        self._parallel_rank = parallel_rank
        self.objective = data.objective.bound()
        self.corpora = [
            i for i, reader in enumerate(data.readers[VALIDATION]) if reader.num_instances > 0
        ]
        self._designs = {corpus: self.design(corpus) for corpus in self.corpora}

    def __call__(self, engine: Engine) -> Validation:
        """Measure; collective."""
        measured = [self._measure(engine, corpus) for corpus in self.corpora]
        weights = [each.weight for each in measured]
        nelbos = [each.sample.estimate() for each in measured]
        # Nats per token -> bits per byte.
        bits = [
            nelbo.scaled(each.tokens_per_byte / math.log(2))
            for nelbo, each in zip(nelbos, measured, strict=True)
        ]
        line: Fields = {
            **_estimate_fields("nelbo_per_token", weighted(nelbos, weights)),
            **_estimate_fields("bits_per_byte", weighted(bits, weights)),
            "corpora": {},
        }
        if self.objective.is_exact:
            line["exact"] = True  # -log p itself, and not a bound on it
        for corpus, each, nelbo, bits_per_byte in zip(
            self.corpora, measured, nelbos, bits, strict=True
        ):
            line["corpora"][each.name] = {
                **_estimate_fields("nelbo_per_token", nelbo),
                **_estimate_fields("bits_per_byte", bits_per_byte),
                "items": len(each.items),
                "items_effective": each.sample.effective_items(),
                "unit": each.measure.unit,
                "measure": each.measure.fingerprint,
            }
            if not self.objective.is_exact:
                deciles = _by_decile(each.sample, self._designs[corpus].t)
                line["corpora"][each.name]["t_deciles"] = deciles
        return Validation(line, measured)

    # -- what is read ------------------------------------------------------------------------------

    def design(self, corpus: int) -> Design:
        """Choose the draws of a corpus.

        At most `validation.windows` draws, of as many different windows (conversations) as get at
        least one sweep of four each.
        """
        data = self._data
        plan, num_sweeps = self._plan(corpus)

        # Row (a draw of a window) of each noise group of the plan, and its number in the row.
        rows = plan.rows
        within = plan.groups.ids - np.searchsorted(rows, rows)

        # The four draws of a sweep follow each other in the plan, and their windows are cut alike:
        # so a text is the same group of its row in four consecutive rows. Sorted by sweep, text and
        # t (lexsort takes the least significant key first).
        order = np.lexsort((plan.groups.t, within, rows // SWEEP))
        groups = order.reshape(-1, SWEEP)

        first = groups[:, 0]
        items, owner = np.unique(data.owners(plan)[first], return_inverse=True)
        window_and_part = np.stack([plan.examples[rows[first]], within[first]])
        _, text = np.unique(window_and_part, axis=1, return_inverse=True)

        config = data.config
        manifest = data.corpora[corpus].manifest
        digest = hashlib.sha256()
        for array in (items, owner, plan.groups.sizes[groups], plan.groups.t[groups]):
            digest.update(np.ascontiguousarray(array).tobytes())
        measure = Measure(
            text=manifest.fingerprint(VALIDATION),
            tokenizer=manifest.tokenizer_fingerprint,
            unit=data.item_name,
            sequence_length=config.data.sequence_length,
            document_mask=config.data.document_mask,
            windows=config.validation.windows,
            draws_per_item=SWEEP * num_sweeps,
            items=digest.hexdigest(),
        )
        # In some versions of numpy an inverse is not flat.
        return Design(plan, groups, items, owner.reshape(-1), text.reshape(-1), measure)

    def _plan(self, corpus: int) -> tuple[StepPlan, int]:
        """Return every draw of a corpus, and the number of sweeps of each window."""
        data = self._data
        max_draws = data.config.validation.windows
        available = data.readers[VALIDATION][corpus].num_instances
        # For 64 draws and 5 windows: 5 windows in 3 sweeps each, 60 draws.
        num_windows = min(available, max_draws // SWEEP)
        num_sweeps = max_draws // (SWEEP * num_windows)
        draws_per_window = SWEEP * num_sweeps
        draws = np.arange(num_windows * draws_per_window, dtype=np.int64)
        purpose = self.purpose(corpus)
        order = permute(np.arange(num_windows), available, derive_key(_SEED, purpose, "order"))
        sweep = draws // SWEEP % num_sweeps

        def draw_t(rows: I64, texts: I64) -> F64:
            offset = to_unit(hash64(derive_key(_SEED, purpose, "offset"), texts))
            in_sweep = draws[rows] % SWEEP / SWEEP
            between_sweeps = sweep[rows] / draws_per_window
            return (offset + in_sweep + between_sweeps) % 1.0

        instances = order[draws // draws_per_window]
        return data.validation_plan(draws, corpus, instances, sweep, draw_t), num_sweeps

    def purpose(self, corpus: int) -> str:
        """Return the name of a corpus's noise, which follows the text and not its path."""
        return f"validation/{self._data.corpora[corpus].manifest.fingerprint(VALIDATION)}"

    # -- measuring ---------------------------------------------------------------------------------

    def _measure(self, engine: Engine, corpus: int) -> Measured:
        data = self._data
        design = self._designs[corpus]
        draws = np.arange(len(design.plan.samples))
        if self.objective.is_exact:
            draws = draws[::SWEEP]  # the other draws of a sweep would be the same once more
        batches = self._batches(design.plan, corpus, draws)
        losses = engine.evaluate(batches, len(design.plan.groups)).numpy()
        if self.objective.is_exact:
            losses = design.with_one_draw_for_all(losses)
        return Measured(
            name=data.names[corpus],
            weight=data.mixture.sources[corpus].first_weight,
            tokens_per_byte=data.readers[VALIDATION][corpus].tokens_per_byte(),
            measure=design.measure,
            items=design.items,
            sample=design.sample(losses),
            objective=self.objective.summary,
            is_exact=self.objective.is_exact,
        )

    def _batches(self, plan: StepPlan, corpus: int, draws: I64) -> list[Batch]:
        """Return this replica's micro-batches of some draws of a plan.

        All replicas have the same number of them, of the same size, since pipelines have fixed
        shapes: the last ones are filled up.
        """
        micro = self._data.config.batch.micro
        parallel = self._data.config.parallel
        rows_at_once = micro * self._parallel_rank.data_size
        multiple = rows_at_once
        if parallel.virtual_pipeline:
            # Megatron-Core's interleaved schedule takes micro-batches in groups of the pipeline's
            # size.
            multiple *= parallel.pipeline
        padded = ceil_div(len(draws), multiple) * multiple
        batches = []
        for first in range(self._parallel_rank.data_rank * micro, padded, rows_at_once):
            own = draws[first : first + micro].tolist()
            batches.append(self._batch(plan, corpus, own, micro))
        return batches

    def _batch(self, plan: StepPlan, corpus: int, draws: Sequence[int], size: int) -> Batch:
        """Return a micro-batch of `size` rows; filler that predicts nothing follows the draws."""
        key = Key(_SEED, self.purpose(corpus))

        def read(draw: int) -> Corrupted:
            return self.objective.corrupt(self._data.row(VALIDATION, plan, draw), key)

        rows = [read(draw) for draw in draws]
        while len(rows) < size:
            rows.append(read(0).without_terms())
        return collate(rows)


def _estimate_fields(name: str, estimate: Estimate) -> Fields:
    return {
        name: estimate.mean,
        f"{name}_se": estimate.se,
        f"{name}_se_noise": estimate.se_noise,
        f"{name}_ci95": estimate.interval(),
    }


def _by_decile(sample: CorpusLosses, t: F64) -> list[dict[str, float | None] | None]:
    """Return NELBO per token of the draws in each tenth of t, with its standard error over items.

    Args:
        sample: the items and draws of a corpus.
        t: diffusion time of each draw, float64 [sweeps, 4].

    Returns:
        Ten entries; None for a tenth without draws.
    """
    decile = np.minimum((t * _NUM_DECILES).astype(int), _NUM_DECILES - 1)
    item = np.repeat(sample.item[:, None], SWEEP, axis=1)
    length = np.repeat(sample.length[:, None], SWEEP, axis=1)
    entries: list[dict[str, float | None] | None] = []
    for number in range(_NUM_DECILES):
        chosen = decile == number
        lengths = sums(item[chosen], length[chosen])
        # Items without a draw in this tenth say nothing about it.
        drawn = np.flatnonzero(lengths)
        if not len(drawn):
            entries.append(None)
            continue
        losses = sums(item[chosen], sample.loss[chosen])
        mean, se = pooled(losses[drawn], lengths[drawn])
        entries.append({"nelbo_per_token": mean, "nelbo_per_token_se": se, "items": len(drawn)})
    return entries


def loss_name(line: Fields) -> str:
    """Return what the loss of a validation line is, for people."""
    return name_of_loss(bool(line.get("exact")))


def describe_validation(line: Fields) -> str:
    """Describe a validation line in one line for the console."""
    text = (
        f"{loss_name(line)} {with_error(line, 'nelbo_per_token')} nats/token,"
        f" {with_error(line, 'bits_per_byte')} bits/byte"
    )
    few = [name for name, values in line["corpora"].items() if values["items_effective"] < FEW]
    if few:
        units = dict.fromkeys(line["corpora"][name]["unit"] for name in few)
        text += f" (rough: few {' and '.join(units)} of {', '.join(few)})"
    return text


def unigram_entropy(counts: torch.Tensor | np.ndarray) -> float:
    """Return the entropy of the empirical token distribution, nats per token.

    It is the loss of the best model that ignores context.

    Args:
        counts: occurrences of every id [vocabulary].
    """
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())

"""Small runs for engine tests, and the oracle's version of a training step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llada.config import RunConfig, build_config
from llada.engine.megatron import MegatronEngine
from llada.noise import timesteps
from llada.objectives import TOKENS, Batch, Key, NoiseGroups, Row, collate
from llada.objectives.registry import SpecialIds, make_objective
from tests.model.assembly import gather
from tests.model.oracle import Oracle

MASK = 126


def small_config(
    model: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **settings: Any
) -> RunConfig:
    """A run with two query groups, four layers and packed documents.

    `settings` replace whole sections of the config.
    """
    raw: dict[str, Any] = {
        "seed": 11,
        "precision": "fp32",
        "run": {"dir": "unused"},
        "train": {"steps": 20},
        "batch": {"global": 8, "micro": 2},
        "data": {"sequence_length": 32, "mixture": [{"path": "unused"}], "document_mask": True},
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
            "vocab_size": 128,
            **(model or {}),
        },
        "schedule": {
            "stages": [{"shape": "linear", "end": 1e-3, "steps": 10}, {"shape": "constant"}]
        },
        "parallel": parallel or {},
    }
    return build_config({**raw, **settings})


def step_batches(config: RunConfig, step: int) -> list[Batch]:
    """All micro-batches of a step of random tokens.

    Rows have one, two or more segments, and some segments are a single token.
    """
    rng = np.random.default_rng(100 + step)
    length, count = config.data.sequence_length, config.batch.global_
    cuts = [np.unique(rng.integers(1, length, size=rng.integers(0, 4))) for _ in range(count)]
    cuts[-1] = np.array([1])
    bounds = [np.concatenate([[0], c, [length]]).astype(np.int64) for c in cuts]
    counts = [len(b) - 1 for b in bounds]
    firsts = np.concatenate([[0], np.cumsum(counts)])
    spans = np.concatenate([np.stack([b[:-1], b[1:]], axis=1) for b in bounds])
    t = timesteps(config.seed, step, spans[:, 1] - spans[:, 0], "stratified")
    samples = step * count + np.arange(count)
    groups = NoiseGroups.of_whole_samples(np.repeat(samples, counts), spans, t)
    objective = make_objective(config.objective, SpecialIds(mask=MASK, start=0))
    key = Key(config.seed)
    corrupted = []
    for i in range(count):
        row = Row(rng.integers(0, MASK, length), bounds[i], groups[firsts[i] : firsts[i + 1]])
        corrupted.append(objective.corrupt(row, key))
    micro = config.batch.micro
    return [collate(corrupted[i : i + micro], count * length) for i in range(0, count, micro)]


def made_engine(config: RunConfig) -> MegatronEngine:
    """An engine with the losses of the config's objective."""
    objective = make_objective(config.objective, SpecialIds(mask=MASK, start=0))
    return MegatronEngine(config, losses=objective.losses)


def with_nan_weights(batch: Batch) -> Batch:
    """The same micro-batch with a loss that is not a number."""
    terms = batch.terms[TOKENS]
    broken = replace(terms, weights=terms.weights * float("nan"))
    return replace(batch, terms={TOKENS: broken})


def segment_ids(batch: Batch) -> torch.Tensor:
    """The segment of each token, int64 [b, L], from the boundaries."""
    rows = [np.repeat(np.arange(len(b) - 1), np.diff(b)) for b in batch.layout.bounds]
    return torch.from_numpy(np.stack(rows))


def canonical(engine: MegatronEngine, what: str = "weights") -> dict[str, torch.Tensor]:
    """Copies of the engine's weights or gradients by canonical name, on CPU; one process."""
    parameters = engine.parameters()
    tensors = {
        n: (p.detach() if what == "weights" else p.main_grad).cpu().clone()
        for n, p in parameters.items()
    }
    return gather(engine.config.model, [(tensors, 0, 1)])


class OracleTrainer:
    """Trains the oracle with torch's own AdamW and clipping on the whole step at once."""

    def __init__(self, config: RunConfig, canonical: dict[str, torch.Tensor]) -> None:
        self.config, self.oracle = config, Oracle(config.model, canonical)
        matrices = [p for p in self.oracle.w.values() if p.dim() > 1]
        vectors = [p for p in self.oracle.w.values() if p.dim() == 1]
        o = config.optimizer
        groups = [
            {"params": matrices, "weight_decay": o.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(o.beta1, o.beta2), eps=o.eps)

    def loss(self, batches: list[Batch]) -> torch.Tensor:
        """The step's loss from every position's logits."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logits = self.oracle(batch.inputs, segment_ids(batch), batch.layout.rule == "causal")
            if getattr(self.config.objective, "subs", False):
                ids = torch.arange(logits.shape[-1])
                logits = logits.where(ids != MASK, -torch.inf)
            terms = batch.terms[TOKENS]
            each = torch.nn.functional.cross_entropy(
                logits[terms.rows, terms.columns], terms.targets, reduction="none"
            )
            total = total + (each * terms.weights).sum().double() / batch.normalizer
        return total

    def step(
        self, batches: list[Batch], learning_rate: float
    ) -> tuple[float, float, dict[str, torch.Tensor]]:
        """Loss, gradient norm and gradients before clipping; then the update."""
        self.optimizer.zero_grad()
        loss = self.loss(batches)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in self.oracle.w.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.oracle.w.values(), self.config.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(loss.detach()), float(norm), grads

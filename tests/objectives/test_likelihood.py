"""Discrete steps against the likelihood of their own sampler, by enumeration.

The vocabulary has three ids and [MASK]; a toy model has any logits for every noisy text of three
tokens.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from llada.model.vocabulary import WholeVocabulary
from llada.objectives import TOKENS, Key
from llada.objectives import row as module
from llada.objectives.discrete_steps import discrete_steps
from llada.objectives.losses import CrossEntropyWithout, HeadTerms, Loss, cross_entropy
from tests.objectives.toy import whole_segments

L = 3
IDS = 3
MASK = 3
TEXTS = list(itertools.product(range(IDS), repeat=L))
SUBSETS = [
    frozenset(chosen)
    for count in range(L + 1)
    for chosen in itertools.combinations(range(L), count)
]

Logits = dict[tuple[int, ...], torch.Tensor]
"""Noisy text -> logits [L, 4]."""


@pytest.fixture(scope="module")
def model() -> Logits:
    rng = np.random.default_rng(0)
    noisy = itertools.product(range(IDS + 1), repeat=L)
    return {text: torch.from_numpy(rng.normal(size=(L, IDS + 1))).float() for text in noisy}


def with_masks(text: tuple[int, ...], masked: frozenset[int]) -> tuple[int, ...]:
    return tuple(MASK if i in masked else text[i] for i in range(L))


def likelihood(text: tuple[int, ...], model: Logits, steps: int, subs: bool) -> float:
    """Probability that the sampler of T steps writes a text.

    From step i to i - 1 each masked token is revealed with probability 1 / i, independently.
    """
    # Probability of each noisy text on the way, as the set of masked positions.
    reached = {frozenset(range(L)): 1.0}
    for i in range(steps, 0, -1):
        after: dict[frozenset[int], float] = {}
        for masked, chance in reached.items():
            logits = model[with_masks(text, masked)].double()
            if subs:
                logits = logits[:, :IDS]
            probabilities = logits.softmax(-1)
            for still in SUBSETS:
                if not still <= masked:
                    continue
                revealed = masked - still
                step = (1 / i) ** len(revealed) * (1 - 1 / i) ** len(still)
                for position in revealed:
                    step *= float(probabilities[position, text[position]])
                after[still] = after.get(still, 0.0) + chance * step
        reached = after
    return reached[frozenset()]


def expected_loss(
    text: tuple[int, ...],
    model: Logits,
    steps: int,
    loss: Loss,
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """The mean of the objective's loss over its steps and all sets of masked positions."""
    objective = discrete_steps(MASK, steps)
    total = 0.0
    for i in range(1, steps + 1):
        t = (i - 0.5) / steps
        probability = i / steps
        for masked in SUBSETS:
            draws = np.array([0.5 * probability if k in masked else 1.0 for k in range(L)])
            monkeypatch.setattr(module, "mask_uniforms", lambda *_, draws=draws: draws)
            corrupted = objective.corrupt(whole_segments(0, np.array(text), [0, L], [t]), Key(0))
            terms = corrupted.terms[TOKENS]
            head = HeadTerms(
                indices=torch.from_numpy(terms.positions),
                targets=torch.from_numpy(terms.targets),
                weights=torch.from_numpy(terms.weights).float(),
                groups=torch.from_numpy(terms.groups),
                aux={},
            )
            logits = model[tuple(corrupted.inputs.tolist())][head.indices]
            losses = loss(logits, head, WholeVocabulary()).double().numpy()
            chance = probability ** len(masked) * (1 - probability) ** (L - len(masked))
            total += chance / steps * float((losses * terms.weights).sum())
    return total


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("subs", [False, True])
def test_the_expected_loss_bounds_the_likelihood_of_the_sampler(
    subs: bool, steps: int, model: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss: Loss = CrossEntropyWithout(MASK) if subs else cross_entropy
    total = 0.0
    for text in TEXTS:
        chance = likelihood(text, model, steps, subs)
        bound = expected_loss(text, model, steps, loss, monkeypatch)
        total += chance
        # A single step reveals all at once: nothing is left out, and the bound is the likelihood.
        if steps == 1:
            assert bound == pytest.approx(-math.log(chance), rel=1e-6)
        else:
            assert bound > -math.log(chance) - 1e-9
    # With SUBS the 27 texts are all that can be written; without, some probability is [MASK]'s.
    if subs:
        assert total == pytest.approx(1, rel=1e-9)
    else:
        assert total < 0.999

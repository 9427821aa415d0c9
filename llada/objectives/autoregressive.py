"""Left-to-right prediction, the baseline that diffusion is compared with.

Every token of a segment is predicted from those before it. The inputs are the tokens shifted by one
position, and the first position of a segment reads a start token, so that all L tokens have a loss:
the sum over a segment is exactly -log p of its tokens, and compares with a negative ELBO.

Example: the tokens 5 6 7 with a start token 0 are read as 0 5 6, and the state at position 1, which
has read 0 and 5, predicts 6.

A segment that begins with the start token itself, as conversations do, is read as it is: 0 5 6 as
0 5 6, and the state at position 1 predicts the token at position 2. Otherwise the model would read
the start token twice, which no other program that runs it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llada.arrays import F64, I64
from llada.objectives.corrupted import TOKENS, Corrupted, Terms
from llada.objectives.layout import Layout
from llada.objectives.losses import CROSS_ENTROPY, Loss
from llada.objectives.objective import Work
from llada.objectives.row import Key, NoiseGroups, Row


@dataclass(frozen=True)
class Autoregressive:
    """Predicts every token of the noise groups from the tokens before it in its segment.

    Attributes:
        start_id: token id that the first position of each segment reads.
    """

    start_id: int

    @property
    def summary(self) -> str:
        """Name."""
        return "autoregressive"

    def draw_t(self, seed: int, step: int, shares: F64) -> F64:
        """Return zeros: there is no noise."""
        return np.zeros(len(shares))

    @property
    def losses(self) -> Mapping[str, Loss]:
        """Cross entropy."""
        return CROSS_ENTROPY

    @property
    def is_exact(self) -> bool:
        """Return true: nothing is drawn."""
        return True

    @property
    def pads_responses(self) -> bool:
        """Return false: nothing behind the first EOS is ever written."""
        return False

    def input_length(self, length: int) -> int:
        """Return `length`: the model reads the row itself."""
        return length

    def groups(self, spans: I64) -> tuple[I64, I64]:
        """Return one group for each attention segment; its t has no effect."""
        return spans, np.arange(len(spans), dtype=np.int64)

    def corrupt(self, row: Row, key: Key) -> Corrupted:
        """Shift the tokens of each segment; nothing is drawn."""
        length = len(row.tokens)
        groups = row.groups
        # Token of the k-th term: the first one of its group, and how far k is behind it.
        owner = np.repeat(np.arange(len(groups)), groups.sizes)
        first_terms = np.cumsum(groups.sizes) - groups.sizes
        predicted = groups.spans[owner, 0] + np.arange(len(owner)) - first_terms[owner]

        # Whether a segment is shifted by one token, to begin with the start token.
        starts = row.bounds[:-1]
        shifted = (row.tokens[starts] != self.start_id) | np.isin(starts, predicted)
        shift = np.repeat(shifted, np.diff(row.bounds)).astype(np.int64)
        inputs = row.tokens[np.maximum(np.arange(length) - shift, 0)]
        inputs[starts] = self.start_id
        terms = Terms(
            positions=predicted - 1 + shift[predicted],
            targets=row.tokens[predicted],
            weights=groups.scales[owner],
            groups=groups.ids[owner],
        )
        return Corrupted(
            inputs=inputs,
            positions=np.arange(length, dtype=np.int64),
            layout=Layout((tuple(row.bounds.tolist()),), length, "causal"),
            terms={TOKENS: terms},
        )

    def bound(self) -> Autoregressive:
        """Return itself: its sum is -log p."""
        return self

    def work(self, segment_lengths: I64, groups: NoiseGroups) -> Work:
        """Return what a step computes; the arguments are those of `Objective`."""
        pairs = int((segment_lengths * (segment_lengths + 1) // 2).sum())
        return Work(
            inputs=int(segment_lengths.sum()),
            terms={TOKENS: float(groups.sizes.sum())},
            attended_pairs=pairs,
        )

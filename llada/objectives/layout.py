"""Which tokens of a row see which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Rule = Literal["bidirectional", "causal"]
"""Within a segment a token sees all tokens (bidirectional), or itself and those before it."""


@dataclass(frozen=True)
class Layout:
    """Attention segments: tokens attend within their own segment, by one rule.

    Passes through the model in the place of Megatron-Core's `packed_seq_params`; tensors stay
    [s, b, h, d].

    Attributes:
        bounds: for each row of the micro-batch the boundaries 0 = b_0 < ... < b_n = M, of the whole
            sequence even if context-parallel ranks share it.
        length: M.
        rule: which tokens of its segment a token sees.
    """

    bounds: tuple[tuple[int, ...], ...]
    length: int
    rule: Rule = "bidirectional"
    # Megatron-Core reads these on any packed_seq_params. "sbhd" and no offsets: nothing is packed.
    qkv_format: str = "sbhd"
    cu_seqlens_q: None = None
    cu_seqlens_kv: None = None
    cu_seqlens_q_padded: None = None
    cu_seqlens_kv_padded: None = None
    cp_group: None = None

    @classmethod
    def stack(cls, rows: Sequence[Layout]) -> Layout:
        """Join the layouts of rows of equal length into that of a micro-batch."""
        bounds = tuple(bounds for row in rows for bounds in row.bounds)
        return cls(bounds, rows[0].length, rows[0].rule)

    def whole(self) -> bool:
        """Whether every row is a single segment."""
        return all(len(row) == 2 for row in self.bounds)

    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """Boundaries -> the rows that have them, so that equal rows are computed together."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, bounds in enumerate(self.bounds):
            rows.setdefault(bounds, []).append(row)
        return rows

"""The `data` section: which corpora a run reads, and how its windows are cut."""

from __future__ import annotations

import itertools

from pydantic import Field, model_validator

from llada.config.section import Section


class WeightChange(Section):
    """A new weight for a corpus from some point of the run on."""

    tokens: int = Field(ge=1, le=10**18)
    """Tokens of the run after which the weight changes, rounded up to whole blocks of 10,000 x
    data.sequence_length; ascending.
    """
    weight: float = Field(ge=0)
    """New weight, relative to those of the other corpora (no unit); 0: the corpus is no longer
    read.
    """


class CorpusEntry(Section):
    """One corpus of the mixture."""

    path: str
    """Folder made by `llada data prepare`."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the samples, relative to the other weights (no unit); 0: not read before a change in
    weight_at.
    """
    max_epochs: float | None = Field(default=None, gt=0)
    """Passes over the corpus after which it leaves the mixture; its share then goes to the other
    corpora by weight. null: no limit.
    """
    weight_at: list[WeightChange] = Field(default_factory=list)
    """Changes of the weight at token counts (annealing); pretraining only."""

    @model_validator(mode="after")
    def _check_changes_ascend(self) -> CorpusEntry:
        for before, after in itertools.pairwise(change.tokens for change in self.weight_at):
            if after <= before:
                raise ValueError(
                    f"weight_at: tokens {after} after {before}; give the changes in ascending order"
                    " of tokens"
                )
        return self

    @model_validator(mode="after")
    def _check_is_read(self) -> CorpusEntry:
        weights = [self.weight, *(change.weight for change in self.weight_at)]
        if not any(weights):
            raise ValueError(
                f"weight: {self.weight} at every point of the run, so the corpus is never read;"
                " raise it, add weight_at or drop the entry"
            )
        return self

    def weight_after(self, tokens: int) -> float:
        """The weight in force once the run has read `tokens` tokens.

        Example: weight 1 with changes to 0.5 at 1,000 tokens and to 0 at 5,000 gives 1 at 999
        tokens, 0.5 at 1,000 and 0 from 5,000 on.
        """
        for change in reversed(self.weight_at):
            if change.tokens <= tokens:
                return change.weight
        return self.weight


class DataSection(Section):
    """The data of a run."""

    sequence_length: int = Field(ge=8, le=2**24)
    """Tokens per sequence (window)."""
    mixture: list[CorpusEntry] = Field(min_length=1)
    """The corpora. All must have been prepared with the same tokenizer."""
    document_mask: bool = False
    """true: documents in a window do not attend to each other, and each has its own t. The paper's
    model was trained without it.
    """
    random_length_probability: float = Field(default=0.01, ge=0, le=1)
    """Share of the windows that are cut at a uniformly random length into two attention segments
    (the paper: 0.01).
    """
    verify_bytes: int = Field(default=2_000_000_000, ge=0)
    """Corpora of at most this many bytes are verified completely when the run starts; for larger
    ones run `llada data verify`.
    """

    @model_validator(mode="after")
    def _check_some_corpus_is_read(self) -> DataSection:
        # Weights change only at these token counts, so it is enough to look there.
        token_counts = {0}
        for entry in self.mixture:
            token_counts.update(change.tokens for change in entry.weight_at)
        for tokens in sorted(token_counts):
            if any(entry.weight_after(tokens) for entry in self.mixture):
                continue
            when = "at the start"
            if tokens:
                when = f"from {tokens} tokens on"
            raise ValueError(
                f"mixture: the weights of all corpora are 0 {when}; give one of them a weight"
            )
        return self

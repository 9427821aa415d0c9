"""Fine-tuning data (arXiv 2502.09992, section 2.3 and appendix B): one conversation a row, only its
response is masked.

A row is prompt, response, EOS, then EOS up to the longest of the sample's group of `sft.pad_group`
consecutive samples: padding is part of the response. What is left of the row is filler, a segment
of its own that is never masked and in no count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from llada.data.base import F64, I64, TRAIN, VALIDATION, DrawT, StepPlan, TrainingData, check_tokens
from llada.data.corpus import CONVERSATIONS, Corpus
from llada.errors import UserError
from llada.noise import derive_key, hash64, timesteps

_LISTED = 3
"""Conversations that are too long and named one by one."""


class ReplyReader:
    """The conversations of one split of a corpus with a reply that fits the sequence, and those
    replies.

    A reply with its prompt is one training example. Of a conversation with several, one is read at
    a time.

    Attributes:
        corpus: whose split it is.
        count: conversations with at least one reply that fits.
        rows: rows of REPLY_FIELDS of the replies that fit, documents counted over all shards, int64
            [replies, 5].
        starts: first reply of every conversation in `rows`, int64 [count + 1].
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.corpus, self.split, self.length = corpus, split, length
        entries = corpus.manifest.of(split)
        self.shards = corpus.shards(split)
        self.first_documents = np.concatenate(
            [[0], np.cumsum([entry.documents for entry in entries])]
        ).astype(np.int64)
        parts = [
            np.asarray(corpus.replies(entry)) + np.array([first, 0, 0, 0, 0])
            for entry, first in zip(entries, self.first_documents[:-1], strict=True)
        ]
        every = np.concatenate(parts) if parts else np.empty((0, 5), dtype=np.int64)
        fits = _totals(every) <= length
        self._all, self._fits = every, fits
        self.rows: I64 = every[fits]
        _, firsts = np.unique(self.rows[:, 0], return_index=True)
        self.count = len(firsts)
        self.starts: I64 = np.append(firsts, len(self.rows)).astype(np.int64)

    def total(self, reply: int) -> int:
        """Tokens of a reply with its prompt and its EOS."""
        return int(_totals(self.rows[reply : reply + 1])[0])

    def prompt_length(self, reply: int) -> int:
        """Tokens of its prompt."""
        _, history_end, turn_start, response_start, _ = self.rows[reply].tolist()
        return history_end + response_start - turn_start

    def is_cut(self, reply: int) -> bool:
        """Whether a reply was cut to a length: it has no EOS then."""
        document, _, _, _, turn_end = self.rows[reply].tolist()
        return int(self._slice(document, turn_end - 1, turn_end)[0]) != self.corpus.manifest.eos_id

    def choose(self, conversation: int, key: int, sample: int) -> int:
        """The reply of a conversation that a sample reads, uniform over those that fit."""
        first, last = self.starts[conversation : conversation + 2].tolist()
        return first + int(hash64(key, sample)) % (last - first)

    def in_turn(self, conversation: int, key: int, sweep: int) -> int:
        """The reply of a conversation that a sweep of the validation reads: all that fit, one after
        the other, from a keyed one on.
        """
        first, last = self.starts[conversation : conversation + 2].tolist()
        return first + (int(hash64(key, conversation)) + sweep) % (last - first)

    def tokens(self, reply: int) -> I64:
        """Prompt, response and EOS of a reply; no EOS of one that was cut."""
        document, history_end, turn_start, _, turn_end = self.rows[reply].tolist()
        parts = self._slice(document, 0, history_end), self._slice(document, turn_start, turn_end)
        return check_tokens(self.corpus, np.concatenate(parts), f"conversation {document}")

    def _slice(self, document: int, start: int, end: int) -> I64:
        """Tokens start..end-1 of a document, counted over all shards."""
        shard = int(np.searchsorted(self.first_documents, document, side="right")) - 1
        source = self.shards[shard]
        first = (
            int(source.pointers[document - int(self.first_documents[shard])])
            // source.dtype.itemsize
        )
        return source.tokens(first + start, first + end)

    def tokens_per_byte(self) -> float:
        _, _, text_bytes = self.corpus.manifest.totals(self.split)
        return float((self._all[:, 4] - self._all[:, 3]).sum() / text_bytes)

    def too_long(self) -> Iterator[dict[str, int]]:
        """Every conversation without a reply that fits: its number in the split, the tokens of its
        shortest reply with its prompt, and of that prompt alone.
        """
        lost = self._all[~np.isin(self._all[:, 0], self.rows[:, 0])]
        totals = _totals(lost)
        order = np.lexsort((totals, lost[:, 0]))
        _, firsts = np.unique(lost[order, 0], return_index=True)
        for row in order[firsts].tolist():
            document, history_end, turn_start, response_start, _ = lost[row].tolist()
            yield {
                "conversation": document,
                "tokens": int(totals[row]),
                "prompt_tokens": history_end + response_start - turn_start,
            }

    def summary(self) -> str:
        text = f"{self.count:,} conversations with {len(self.rows):,} replies"
        lost = list(self.too_long())
        if lost:
            text += (
                f"; {_name_some(lost, self.length)} longer than data.sequence_length ="
                f" {self.length} and not trained on"
            )
        later = int((~self._fits & np.isin(self._all[:, 0], self.rows[:, 0])).sum())
        if later:
            text += (
                f"; replies of the others that are longer than {self.length} tokens with their"
                f" prompt, and not trained on: {later:,}"
            )
        return text


def _name_some(lost: list[dict[str, int]], length: int) -> str:
    prompts = sum(row["prompt_tokens"] >= length for row in lost)
    named = ", ".join(
        f"number {row['conversation']} ({row['tokens']} tokens)" for row in lost[:_LISTED]
    )
    return (
        f"{len(lost):,} conversations ({prompts:,} by their prompt alone;"
        f" {named}{', ...' if len(lost) > _LISTED else ''}) are"
    )


def _totals(rows: I64) -> I64:
    """Tokens of prompt, response and EOS of rows of REPLY_FIELDS."""
    return rows[:, 1] + rows[:, 4] - rows[:, 2]


class SFTData(TrainingData):
    """Conversations. The loss of a step is normalised by its conversations; each counts the same,
    whatever its length.
    """

    kind = CONVERSATIONS
    unit = "conversations"

    def reader(self, source: int, split: str) -> ReplyReader:
        reader = ReplyReader(self.corpora[source], split, self.config.data.sequence_length)
        lost = list(reader.too_long()) if split == TRAIN and not reader.count else []
        first, own = self.corpora[0], self.corpora[source]
        if own.manifest.options.get("chat_template_sha256") != first.manifest.options.get(
            "chat_template_sha256"
        ):
            raise UserError(
                f"data.mixture.{source}.path: {own.folder} was prepared with another chat template"
                f" than {first.folder}; use one"
            )
        if lost:
            raise UserError(
                f"data.sequence_length: {reader.length} is too short:"
                f" {_name_some(lost, reader.length)} longer, and {reader.corpus.folder} has no"
                " other"
            )
        return reader

    def plan(self, step: int) -> StepPlan:
        config = self.config
        first = step * config.batch.global_
        samples = first + np.arange(config.batch.global_, dtype=np.int64)
        padded, places = self._padded(first, first + config.batch.global_)

        def draw_t(shares: F64) -> F64:
            return timesteps(config.seed, step, shares, config.objective.timesteps)

        sources, replies = (
            np.array(column, dtype=np.int64) for column in zip(*places, strict=True)
        )
        return self._assemble(samples, sources, replies, padded, draw_t, published=True)

    def validation_plan(
        self, draws: I64, source: int, items: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        """Responses with their own EOS and no padding: the bound of what the model would have to
        write.
        """
        reader = self._replies(VALIDATION, source)
        key = derive_key(
            0, "validation/reply", self.corpora[source].manifest.fingerprint(VALIDATION)
        )
        chosen = [
            reader.in_turn(c, key, sweep)
            for c, sweep in zip(items.tolist(), sweeps.tolist(), strict=True)
        ]
        replies = np.array(chosen, dtype=np.int64)
        ends = np.array([reader.total(reply) for reply in chosen], dtype=np.int64)
        sources, rows = np.full(len(draws), source), np.arange(len(draws), dtype=np.int64)
        return self._assemble(
            draws,
            sources,
            replies,
            ends,
            lambda _: draw_t(rows, replies),
            published=False,
            split=VALIDATION,
        )

    def owners(self, plan: StepPlan) -> I64:
        conversations = [
            self._replies(VALIDATION, s).rows[r, 0]
            for s, r in zip(plan.sources.tolist(), plan.items.tolist(), strict=True)
        ]
        return np.repeat(np.array(conversations, dtype=np.int64), np.diff(plan.firsts))

    def _padded(self, first: int, last: int) -> tuple[I64, list[tuple[int, int]]]:
        """Where the padded response of each of the samples first..last-1 ends, and (source, reply)
        of each.

        The response of a reply that was cut is not padded: the model would learn to end in the
        middle of a sentence.
        """
        group = self.config.sft.pad_group
        low, high = first // group * group, -(-last // group) * group
        if self.mixture.num_samples is not None:
            high = min(high, self.mixture.num_samples)
        places = [self._locate(sample) for sample in range(low, high)]
        ends = np.array(
            [self._replies(TRAIN, source).total(reply) for source, reply in places], dtype=np.int64
        )
        longest = np.maximum.reduceat(ends, np.arange(0, len(ends), group))
        own = slice(first - low, last - low)
        cut = np.array(
            [self._replies(TRAIN, source).is_cut(reply) for source, reply in places[own]]
        )
        return np.where(cut, ends[own], np.repeat(longest, group)[: len(ends)][own]), places[own]

    def _locate(self, sample: int) -> tuple[int, int]:
        source, conversation = self.mixture.locate(sample)
        return source, self._replies(TRAIN, source).choose(
            conversation, derive_key(self.config.seed, "sft/reply"), sample
        )

    def _assemble(
        self,
        samples: I64,
        sources: I64,
        replies: I64,
        ends: I64,
        draw_t: Callable[[F64], F64],
        published: bool,
        split: str = TRAIN,
    ) -> StepPlan:
        """A plan of one conversation a row.

        Args:
            samples, sources, replies: see StepPlan.
            ends: where the response (padding included) of each row ends.
            draw_t: shares of the conversations -> their t.
            published: weigh every conversation alike (1 / response length), as the training loss
                does; else every token.
            split: of the replies.
        """
        length = self.config.data.sequence_length
        starts = np.array(
            [
                self._replies(split, s).prompt_length(r)
                for s, r in zip(sources.tolist(), replies.tolist(), strict=True)
            ]
        )
        sizes = (ends - starts).astype(np.float64)
        bounds = [
            np.array([0, end] if end == length else [0, end, length], dtype=np.int64)
            for end in ends.tolist()
        ]
        firsts = np.concatenate([[0], np.cumsum([len(b) - 1 for b in bounds])]).astype(np.int64)
        spans = np.full((int(firsts[-1]), 2), length, dtype=np.int64)  # filler: an empty span
        scales, t = np.zeros(len(spans)), np.zeros(len(spans))
        own = firsts[:-1]
        spans[own] = np.stack([starts, ends], axis=1)
        scales[own] = 1 / sizes if published else 1.0
        t[own] = draw_t(np.ones(len(own)) if published else sizes)
        normaliser = float(len(samples)) if published else float(sizes.sum())
        return StepPlan(samples, sources, replies, bounds, firsts, spans, scales, t, normaliser)

    def tokens(self, split: str, source: int, item: int) -> I64:
        own = self._replies(split, source).tokens(item)
        filler = np.full(
            self.config.data.sequence_length - len(own), self.manifest.eos_id, dtype=np.int64
        )
        return np.concatenate([own, filler])

    def describe(self, source: int, item: int) -> str:
        reader = self._replies(TRAIN, source)
        prompt, total = reader.prompt_length(item), reader.total(item)
        return (
            f"conversation {int(reader.rows[item, 0])}, prompt of {prompt} tokens, response of"
            f" {total - prompt}"
        )

    def _replies(self, split: str, source: int) -> ReplyReader:
        reader = self.readers[split][source]
        assert isinstance(reader, ReplyReader)
        return reader

"""Fine-tuning data (arXiv 2502.09992, section 2.3 and appendix B): one conversation per row, in
which only the response is masked.

A row is prompt, response, EOS, then EOS up to the longest of the sample's group of `sft.pad_group`
consecutive samples: padding is part of the response. What is left of the row is filler: a separate
segment that is never masked nor counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llada.arithmetic import ceil_div
from llada.arrays import I64
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, TRAIN, VALIDATION
from llada.data.shard_format import prompt_tokens, shift_documents
from llada.data.step_plan import DrawT, StepPlan
from llada.data.training_data import TrainingData, check_tokens
from llada.errors import UserError
from llada.noise import derive_key, hash64
from llada.objectives import NoiseGroups

_MAX_LISTED = 3
"""Conversations that are too long and named one by one in a message."""


class ReplyReader:
    """Reads the conversations of one split of a corpus that have a reply that fits the sequence.

    A reply with its prompt is one training example. A conversation with several replies gives one
    of them at a time.

    Attributes:
        corpus: the corpus.
        num_instances: conversations with at least one reply that fits.
        replies: rows of REPLY_FIELDS of the replies that fit, documents counted over all shards,
            int64 [replies, 5].
        all_replies: rows of all replies, int64 [all replies, 5].
        first_replies: first reply of every conversation in `replies`, int64 [num_instances + 1].
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.corpus = corpus
        self.split = split
        self.length = length
        self.shards = corpus.shards(split)
        documents = [shard.num_documents for shard in self.shards]
        self.first_documents = np.cumsum([0, *documents], dtype=np.int64)
        tables = [np.empty((0, 5), dtype=np.int64)]
        for shard, entry in enumerate(corpus.manifest.of(split)):
            # Documents are counted over all shards from here on.
            first_document = int(self.first_documents[shard])
            tables.append(shift_documents(corpus.replies(entry), first_document))
        self.all_replies: I64 = np.concatenate(tables)
        self._fits = _total_tokens(self.all_replies) <= length
        self.replies: I64 = self.all_replies[self._fits]
        # Replies are sorted by document: those of a conversation follow each other.
        _, firsts = np.unique(self.replies[:, 0], return_index=True)
        self.num_instances = len(firsts)
        self.first_replies: I64 = np.append(firsts, len(self.replies)).astype(np.int64)

    def total(self, reply: int) -> int:
        """Return the tokens of a reply with its prompt and its EOS."""
        return int(_total_tokens(self.replies[reply : reply + 1])[0])

    def prompt_length(self, reply: int) -> int:
        """Return the tokens of a reply's prompt."""
        return int(prompt_tokens(self.replies[reply : reply + 1])[0])

    def is_cut(self, reply: int) -> bool:
        """Return whether a reply was cut to a length; it has no EOS then."""
        document, _, _, _, turn_end = self.replies[reply].tolist()
        # Every reply that was not cut ends with EOS.
        last = self._slice(document, turn_end - 1, turn_end)
        return int(last[0]) != self.corpus.manifest.eos_id

    def reply_of_sample(self, conversation: int, key: int, sample: int) -> int:
        """Return the reply that a training sample reads, uniform over those that fit."""
        first, stop = self.first_replies[conversation : conversation + 2].tolist()
        # A remainder of 64 random bits favors no reply by more than a share of 2**-64 each.
        return first + int(hash64(key, sample)) % (stop - first)

    def reply_of_sweep(self, conversation: int, key: int, sweep: int) -> int:
        """Return the reply that a sweep of the validation reads.

        Sweeps read the replies that fit one after the other, starting at a keyed one.
        """
        first, stop = self.first_replies[conversation : conversation + 2].tolist()
        return first + (int(hash64(key, conversation)) + sweep) % (stop - first)

    def tokens(self, reply: int) -> I64:
        """Read prompt, response and EOS of a reply; no EOS of one that was cut."""
        document, history_end, turn_start, _, turn_end = self.replies[reply].tolist()
        history = self._slice(document, 0, history_end)
        turn = self._slice(document, turn_start, turn_end)
        tokens = np.concatenate([history, turn])
        return check_tokens(self.corpus, tokens, f"conversation {document}")

    def _slice(self, document: int, start: int, end: int) -> I64:
        """Read tokens start..end-1 of a document, counted over all shards."""
        number = int(np.searchsorted(self.first_documents, document, side="right")) - 1
        shard = self.shards[number]
        first = shard.document_start(document - int(self.first_documents[number]))
        return shard.tokens(first + start, first + end)

    def tokens_per_byte(self) -> float:
        _, _, text_bytes = self.corpus.manifest.totals(self.split)
        responses = self.all_replies[:, 4] - self.all_replies[:, 3]
        return float(responses.sum() / text_bytes)

    def too_long(self) -> Iterator[dict[str, int]]:
        """Yield every conversation without a reply that fits: its number in the split, the tokens
        of its shortest reply with its prompt, and of that prompt alone.
        """
        lost = self.all_replies[~self._has_reply_that_fits()]
        totals = _total_tokens(lost)
        prompts = prompt_tokens(lost)
        # The shortest reply of every conversation comes first.
        order = np.lexsort((totals, lost[:, 0]))
        _, firsts = np.unique(lost[order, 0], return_index=True)
        for row in order[firsts].tolist():
            yield {
                "conversation": int(lost[row, 0]),
                "tokens": int(totals[row]),
                "prompt_tokens": int(prompts[row]),
            }

    def summary(self) -> str:
        text = f"{self.num_instances:,} conversations with {len(self.replies):,} replies"
        lost = list(self.too_long())
        if lost:
            text += (
                f"; {_name_some(lost, self.length)} longer than data.sequence_length ="
                f" {self.length} and not trained on"
            )
        dropped = int((~self._fits & self._has_reply_that_fits()).sum())
        if dropped:
            text += (
                f"; replies of the others that are longer than {self.length} tokens with their"
                f" prompt, and not trained on: {dropped:,}"
            )
        return text

    def _has_reply_that_fits(self) -> npt.NDArray[np.bool_]:
        """Return whether the conversation of each reply has one that fits, bool [all replies]."""
        return np.isin(self.all_replies[:, 0], self.replies[:, 0])


def _name_some(lost: list[dict[str, int]], length: int) -> str:
    """Name conversations that are too long, as the subject of a sentence with its verb."""
    by_prompt = sum(row["prompt_tokens"] >= length for row in lost)
    names = [f"number {row['conversation']} ({row['tokens']} tokens)" for row in lost[:_MAX_LISTED]]
    if len(lost) > _MAX_LISTED:
        names.append("...")
    return (
        f"{len(lost):,} conversations ({by_prompt:,} by their prompt alone; {', '.join(names)}) are"
    )


def _total_tokens(rows: I64) -> I64:
    """Return the tokens of prompt, response and EOS of rows of REPLY_FIELDS."""
    _, history_end, turn_start, _, turn_end = rows.T
    return history_end + turn_end - turn_start


class SFTData(TrainingData):
    """Conversations.

    The loss of a step is normalized by its conversations; each counts the same, whatever its
    length.
    """

    kind = CONVERSATIONS
    readers: Mapping[str, Sequence[ReplyReader]]

    def normalizer(self, plan: StepPlan) -> float:
        return float(len(plan.samples))

    @property
    def item_name(self) -> str:
        return "conversations"

    def open_reader(self, corpus: int, split: str) -> ReplyReader:
        reader = ReplyReader(self.corpora[corpus], split, self.config.data.sequence_length)
        first = self.corpora[0]
        own = self.corpora[corpus]
        template = own.manifest.options.get("chat_template_sha256")
        if template != first.manifest.options.get("chat_template_sha256"):
            raise UserError(
                f"data.mixture.{corpus}.path: {own.folder} was prepared with another chat template"
                f" than {first.folder}; use one"
            )
        if split == TRAIN and not reader.num_instances:
            lost = list(reader.too_long())
            if lost:
                raise UserError(
                    f"data.sequence_length: {reader.length} is too short:"
                    f" {_name_some(lost, reader.length)} longer, and {own.folder} has no other"
                )
        return reader

    def plan(self, step: int) -> StepPlan:
        config = self.config
        num_samples = config.batch.global_
        first = step * num_samples
        samples = first + np.arange(num_samples, dtype=np.int64)
        corpora, replies, ends = self._padded(first, first + num_samples)
        responses = self._responses(TRAIN, corpora, replies, ends)
        spans, rows = self.objective.groups(responses)
        sizes = responses[:, 1] - responses[:, 0]
        # Every conversation has the same share of the loss, whatever its length.
        shares = (spans[:, 1] - spans[:, 0]) / sizes[rows]
        t = self.objective.draw_t(config.seed, step, shares)
        # Its tokens have weight 1 / their number, as in the published training loss.
        groups = NoiseGroups.of_whole_samples(samples[rows], spans, t, 1 / sizes[rows])
        return self._step_plan(samples, corpora, replies, responses, rows, groups)

    def validation_plan(
        self, draws: I64, corpus: int, instances: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        """Return the plan of a validation: responses with their own EOS and no padding.

        Every token counts the same: the bound of what the model would have to write.
        """
        reader = self.readers[VALIDATION][corpus]
        # The run's seed has no part: all runs are measured on the same replies.
        content = self.corpora[corpus].manifest.fingerprint(VALIDATION)
        key = derive_key(0, "validation/reply", content)
        chosen = [
            reader.reply_of_sweep(conversation, key, sweep)
            for conversation, sweep in zip(instances.tolist(), sweeps.tolist(), strict=True)
        ]
        replies = np.array(chosen, dtype=np.int64)
        ends = np.array([reader.total(reply) for reply in chosen], dtype=np.int64)
        corpora = np.full(len(draws), corpus)
        responses = self._responses(VALIDATION, corpora, replies, ends)
        spans, rows = self.objective.groups(responses)
        # Each reply is one text.
        t = draw_t(rows, replies[rows])
        groups = NoiseGroups.of_whole_samples(draws[rows], spans, t)
        return self._step_plan(draws, corpora, replies, responses, rows, groups)

    def _step_plan(
        self,
        samples: I64,
        corpora: I64,
        replies: I64,
        responses: I64,
        rows: I64,
        groups: NoiseGroups,
    ) -> StepPlan:
        return StepPlan(
            samples=samples,
            corpora=corpora,
            examples=replies,
            bounds=self._bounds(responses),
            attended=responses[:, 1],
            rows=rows,
            groups=groups,
        )

    def owners(self, plan: StepPlan) -> I64:
        readers = self.readers[VALIDATION]
        conversations = [
            readers[corpus].replies[reply, 0]
            for corpus, reply in zip(plan.corpora.tolist(), plan.examples.tolist(), strict=True)
        ]
        return np.array(conversations, dtype=np.int64)[plan.rows]

    def tokens(self, split: str, corpus: int, example: int) -> I64:
        tokens = self.readers[split][corpus].tokens(example)
        rest = self.config.data.sequence_length - len(tokens)
        return np.concatenate([tokens, np.full(rest, self.manifest.eos_id, dtype=np.int64)])

    def describe_example(self, corpus: int, example: int) -> str:
        reader = self.readers[TRAIN][corpus]
        conversation = int(reader.replies[example, 0])
        prompt = reader.prompt_length(example)
        response = reader.total(example) - prompt
        return f"conversation {conversation}, prompt of {prompt} tokens, response of {response}"

    def _padded(self, first: int, stop: int) -> tuple[I64, I64, I64]:
        """Look up the samples first..stop-1 and pad their responses.

        With groups of 4, samples 6..9 are of the groups 4..7 and 8..11: the responses of 6 and 7
        end where the longest row of 4..7 ends, whichever step reads that row.

        The response of a reply that was cut is not padded: the model would learn to end in the
        middle of a sentence. Nor is any, if the objective does not learn from padding.

        Returns:
            Corpus, reply, and end of the padded response of each sample, int64 [stop - first].
        """
        group = self.config.sft.pad_group
        readers = self.readers[TRAIN]
        # Whole groups are looked up, those of other steps' samples too.
        low = first // group * group
        high = ceil_div(stop, group) * group
        if self.mixture.num_samples is not None:
            high = min(high, self.mixture.num_samples)
        corpora, replies = self._lookup(np.arange(low, high, dtype=np.int64))
        totals = [
            readers[corpus].total(reply)
            for corpus, reply in zip(corpora.tolist(), replies.tolist(), strict=True)
        ]
        ends = np.array(totals, dtype=np.int64)
        longest = np.maximum.reduceat(ends, np.arange(0, len(ends), group))
        padded = np.repeat(longest, group)[: len(ends)]

        own = slice(first - low, stop - low)
        corpora = corpora[own]
        replies = replies[own]
        is_cut = [
            readers[corpus].is_cut(reply)
            for corpus, reply in zip(corpora.tolist(), replies.tolist(), strict=True)
        ]
        if not self.objective.pads_responses:
            return corpora, replies, ends[own]
        return corpora, replies, np.where(is_cut, ends[own], padded[own])

    def _lookup(self, samples: I64) -> tuple[I64, I64]:
        """Return corpus and reply of samples; of a conversation with several replies, one."""
        corpora, conversations = self.mixture.lookup(samples)
        key = derive_key(self.config.seed, "sft/reply")
        readers = self.readers[TRAIN]
        rows = zip(corpora.tolist(), conversations.tolist(), samples.tolist(), strict=True)
        replies = [
            readers[corpus].reply_of_sample(conversation, key, sample)
            for corpus, conversation, sample in rows
        ]
        return corpora, np.array(replies, dtype=np.int64)

    def _responses(self, split: str, corpora: I64, replies: I64, ends: I64) -> I64:
        """Return first and past-the-last position of every response, int64 [n, 2].

        Args:
            split, corpora, replies: split, and corpus and reply of each row [n].
            ends: end of each row's response, padding included [n].
        """
        readers = self.readers[split]
        starts = [
            readers[corpus].prompt_length(reply)
            for corpus, reply in zip(corpora.tolist(), replies.tolist(), strict=True)
        ]
        return np.stack([np.array(starts, dtype=np.int64), ends], axis=1)

    def _bounds(self, responses: I64) -> list[I64]:
        """Return the segment boundaries of rows: one segment of prompt and response, one of filler.

        A row of 8 tokens with a response up to 6 has the bounds 0, 6, 8.

        Args:
            responses: first and past-the-last position of each response, int64 [n, 2].
        """
        length = self.config.data.sequence_length
        bounds = []
        for end in responses[:, 1].tolist():
            row = [0, end]
            if end < length:
                row.append(length)
            bounds.append(np.array(row, dtype=np.int64))
        return bounds

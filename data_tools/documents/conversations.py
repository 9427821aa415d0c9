"""`llada data prepare-sft`: conversations -> token shards with the place of every reply, in a
folder of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.documents.turns import Conversation, Fields, Messages
from data_tools.job.build import CorpusSettings, ExecutionOptions, write_corpus
from data_tools.job.splits import Encoded
from data_tools.job.work_plan import WorkPlan
from data_tools.job.worker import Steps, held_out_hash
from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_records
from data_tools.readers.records import BadRecord, Origin
from data_tools.readers.report import Report
from data_tools.tokenizers.encoders import choose_encoder
from llada.chat.format import TEMPLATE, Reply
from llada.chat.template import TemplateError, chat_format
from llada.data.corpus import CONVERSATIONS, Manifest
from llada.errors import UserError, did_you_mean
from llada.tokenizer import Tokenizer

_PROMPT_TOO_LONG = "replies whose prompt alone takes --max-tokens"
_TOO_LONG = "replies that with their prompt are longer than --max-tokens"
_CUT = "ends of replies longer than --max-tokens (--truncate)"


class LeftOut(NamedTuple):
    """Something that was left out of a conversation that could be read.

    Attributes:
        conversation: its place in the batch.
        reason: under which it is counted, a plural.
        message: what it is.
    """

    conversation: int
    reason: str
    message: str


@dataclass(frozen=True)
class SFTSettings:
    """How conversations become tokens; plain values, so other processes can have it.

    Attributes:
        fields: how records are read.
        chat_template: Jinja; TEMPLATE is LLaDA's own format.
        max_tokens: longest reply with its prompt and EOS; None: any.
        truncate: cut longer replies to max_tokens instead of leaving them out.

    Raises:
        UserError: a max_tokens that leaves no room; truncate without it.
    """

    fields: Fields = field(default_factory=Fields)
    chat_template: str = TEMPLATE
    max_tokens: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UserError(
                f"--max-tokens: {self.max_tokens} is less than 2, a prompt and a response"
            )
        if self.truncate and self.max_tokens is None:
            raise UserError("--truncate: needs --max-tokens, the length to cut to")


class Conversations:
    """The two steps of the preparation: a record -> a conversation, many conversations -> tokens.

    Raises:
        UserError: a chat template that cannot be used, a tokenizer without the tokens of LLaDA's
            format.
    """

    def __init__(self, settings: SFTSettings, tokenizer: Tokenizer) -> None:
        self.settings, self._tokenizer = settings, tokenizer
        self._chat = chat_format(tokenizer, settings.chat_template)

    def record(self, value: Any) -> Conversation:
        """The conversation of the JSON value of a line. Raises BadRecord for one that cannot be
        trained on.
        """
        talk = self.settings.fields.conversation(value)
        try:
            self._chat.check(talk.messages)
        except TemplateError as problem:
            raise BadRecord(problem.reason, str(problem)) from None
        return talk

    def encode(self, talks: Sequence[Conversation]) -> tuple[Encoded, list[LeftOut]]:
        """Tokens of conversations, in their order, and what was left out of them; one of which
        nothing is left is not among them.
        """
        documents: list[list[int]] = []
        replies: list[tuple[int, int, int, int, int]] = []
        sizes, hashes, left_out = [], [], []
        for index, (talk, (ids, found)) in enumerate(
            zip(talks, self._chat.encode([talk.messages for talk in talks]), strict=True)
        ):
            texts = [
                self._chat.response(message.content)
                for message in talk.messages
                if message.role == "assistant"
            ]
            numbered = [
                _Numbered(reply, i + 1, len(text.encode()))
                for i, (reply, text) in enumerate(zip(found, texts, strict=True))
            ]
            kept, notes = self._limited(ids, numbered)
            left_out += [
                LeftOut(index, reason, message) for reason, message in (*talk.notes, *notes)
            ]
            if not kept:
                continue
            ids, kept = _compact(ids, kept, self._tokenizer.eos_id) if notes else (ids, kept)
            replies += [
                (len(documents), *(r.history_end, r.turn_start, r.response_start, r.turn_end))
                for r, _, _ in kept
            ]
            documents.append(ids)
            sizes.append(sum(size for _, _, size in kept))
            hashes.append(held_out_hash(_question(talk.messages)))
        encoded = Encoded(
            flat=np.concatenate(
                [np.empty(0, dtype=np.int64), *(np.array(ids, dtype=np.int64) for ids in documents)]
            ),
            lengths=np.array([len(ids) for ids in documents], dtype=np.int64),
            text_bytes=np.array(sizes, dtype=np.int64),
            hashes=hashes,
            replies=np.array(replies, dtype=np.int64).reshape(-1, 5),
        )
        return encoded, left_out

    def _limited(
        self, ids: list[int], replies: list[_Numbered]
    ) -> tuple[list[_Numbered], list[tuple[str, str]]]:
        """The replies that fit max_tokens, or are cut to it, and (reason, message) of each that is
        not whole.
        """
        limit = self.settings.max_tokens
        if limit is None:
            return replies, []
        kept, notes = [], []
        for reply, number, size in replies:
            prompt, response = (
                reply.history_end + reply.response_start - reply.turn_start,
                reply.turn_end - reply.response_start,
            )
            room = limit - prompt
            if response <= room:
                kept.append(_Numbered(reply, number, size))
            elif room <= 0:
                notes.append(
                    (
                        _PROMPT_TOO_LONG,
                        (
                            f"reply {number}: its prompt has {prompt:,} tokens, --max-tokens is"
                            f" {limit:,}"
                        ),
                    )
                )
            elif not self.settings.truncate:
                notes.append(
                    (
                        _TOO_LONG,
                        (
                            f"reply {number}: {prompt + response:,} tokens with its prompt,"
                            f" --max-tokens is {limit:,}"
                        ),
                    )
                )
            else:
                end = reply.response_start + room
                left = len(self._tokenizer.decode(ids[reply.response_start : end]).encode())
                kept.append(_Numbered(reply._replace(turn_end=end), number, left))
                notes.append(
                    (
                        _CUT,
                        (
                            f"reply {number}: {prompt + response:,} tokens with its prompt, cut to"
                            f" {limit:,}, without EOS"
                        ),
                    )
                )
        return kept, notes


class _Numbered(NamedTuple):
    """A reply, its number in the conversation from 1, and the bytes of its text."""

    reply: Reply
    number: int
    size: int


def _compact(
    ids: list[int], replies: list[_Numbered], eos_id: int
) -> tuple[list[int], list[_Numbered]]:
    """A conversation with only the tokens that its replies use. It ends with EOS, which is no
    reply's if the last one was cut.
    """
    out = ids[: max(reply.history_end for reply, _, _ in replies)]
    moved = []
    for reply, number, size in replies:
        shift = len(out) - reply.turn_start
        out += ids[reply.turn_start : reply.turn_end]
        new = Reply(
            reply.history_end,
            reply.turn_start + shift,
            reply.response_start + shift,
            reply.turn_end + shift,
        )
        moved.append(_Numbered(new, number, size))
    return out if out[-1] == eos_id else [*out, eos_id], moved


def _question(messages: Messages) -> bytes:
    """The turns before the first reply, unambiguously."""
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    return json.dumps(
        [(message.role, message.content) for message in messages[:first]], ensure_ascii=False
    ).encode()


def chosen_template(choice: str, tokenizer_path: str | Path) -> str:
    """The text of `--chat-template`: llada, tokenizer, or a file. Raises UserError for anything
    else.
    """
    if choice == "llada":
        return TEMPLATE
    if choice == "tokenizer":
        found = Tokenizer.load(tokenizer_path, require_mask=False).chat_template
        if found is None:
            raise UserError(
                f"--chat-template: {tokenizer_path} has no chat template (chat_template.jinja, or"
                " chat_template in tokenizer_config.json)"
            )
        return found
    try:
        return Path(choice).read_text(encoding="utf-8")
    except OSError as error:
        near = did_you_mean(choice, ("llada", "tokenizer"))
        raise UserError(
            f"--chat-template: '{choice}'{near} is neither llada nor tokenizer nor a file"
            f" ({error.strerror})"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"--chat-template: {choice} is not UTF-8; a Jinja template is read"
        ) from None


@dataclass(frozen=True)
class ConversationType:
    """Documents that are conversations. A conversation is held out by the hash of the turns before
    its first reply, so one question is never on both sides.
    """

    settings: SFTSettings
    options: ReadOptions
    name: str = CONVERSATIONS

    def text(self, document: Conversation) -> str:
        return json.dumps(
            [(message.role, message.content) for message in document.messages], ensure_ascii=False
        )

    def choose(self, tokenizer: Tokenizer, plan: WorkPlan, wanted: str) -> tuple[str, str]:
        """Conversations are a small part of all text: their pieces go through the
        tokenizer itself.
        """
        return choose_encoder(tokenizer, [], "library")[0].name, ""

    def open(self, tokenizer: Tokenizer, backend: str) -> Steps:
        chat = Conversations(self.settings, tokenizer)

        def convert(record: object, origin: Origin) -> Conversation:
            return replace(chat.record(record), place=origin)

        def read(source: InputFile, part: Slice, report: Report) -> Iterator[Conversation]:
            return read_records(source, part, self.options, report, convert)

        def encode(talks: list[Conversation], report: Report) -> Encoded:
            encoded, left_out = chat.encode(talks)
            for note in left_out:
                report.leave_out(*talks[note.conversation].place, note.reason, note.message)
            return encoded

        return Steps(read, encode)


def prepare_sft(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    fields: Fields | None = None,
    chat_template: str = "llada",
    max_tokens: int | None = None,
    truncate: bool = False,
    validation_fraction: float = 0.005,
    add_special_tokens: bool = False,
    skip_bad: bool = False,
    shard_tokens: int = 2**28,
    unit_bytes: int | None = None,
    dedup: bool = False,
    force: bool = False,
    effort: ExecutionOptions | None = None,
) -> Manifest:
    """Encode conversations with a chat format and write them as a corpus.

    Args:
        inputs: JSON Lines (also .gz, .zst), Parquet or Arrow files, folders with such, patterns,
            `hf:` datasets.
        tokenizer_path, output, validation_fraction, add_special_tokens, shard_tokens, unit_bytes,
        dedup, force, effort: see
            `data_tools.documents.text.prepare`.
        fields: how records are read.
        chat_template: "llada", "tokenizer" (that of `tokenizer_path`), or a Jinja file.
        max_tokens, truncate: see SFTSettings.
        skip_bad: count lines that are no conversations instead of stopping.

    Raises:
        UserError, RunError, TryAgain, Unfinished: see `data_tools.documents.text.prepare`.
    """
    template = chosen_template(chat_template, tokenizer_path)
    settings = SFTSettings(fields or Fields(), template, max_tokens, truncate)
    recorded = {
        **asdict(settings.fields),
        "chat_template": chat_template,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "max_tokens": max_tokens,
        "truncate": truncate,
        "skip_bad": skip_bad,
    }
    corpus = CorpusSettings(
        tokenizer_path,
        validation_fraction,
        add_special_tokens,
        shard_tokens,
        unit_bytes,
        dedup,
        force=force,
        chat_template=template,
        recorded=recorded,
    )
    kind = ConversationType(settings, ReadOptions(text_field=None, skip_bad=skip_bad))
    return write_corpus(inputs, output, corpus, kind, effort or ExecutionOptions())

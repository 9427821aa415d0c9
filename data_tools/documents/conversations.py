"""Documents of conversations, for `llada data prepare-sft`: token ids and a reply table.

`conversation_records` parses a record of the input into a `Conversation`. Here its turns become ids
in a chat format, and every reply gets a row in the table with the offsets of the reply and its
prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from data_tools.documents.base import DocumentEncoder, DocumentType, EncodedDocuments
from data_tools.documents.conversation_records import (
    Conversation,
    ConversationFields,
    Messages,
    Omission,
)
from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_records
from data_tools.readers.records import BadRecord, Origin
from data_tools.readers.report import Report
from data_tools.tokenizers.encoders import choose_encoder
from llada.arrays import I64
from llada.chat.format import TEMPLATE, Reply
from llada.chat.template import TemplateError, chat_format
from llada.data.manifest import CONVERSATIONS
from llada.data.shard_reader import map_replies
from llada.errors import UserError, did_you_mean
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

_PROMPT_TOO_LONG = "replies whose prompt alone takes --max-tokens"
_REPLY_TOO_LONG = "replies that with their prompt are longer than --max-tokens"
_REPLY_CUT = "ends of replies longer than --max-tokens (--truncate)"


@dataclass(frozen=True)
class ConversationSettings:
    """How conversations become token ids.

    Attributes:
        fields: how records are parsed.
        chat_template: Jinja source of the chat template; TEMPLATE is LLaDA's own format.
        max_tokens: most tokens of a reply with its prompt and EOS; None for no limit.
        truncate: whether to cut longer replies to `max_tokens` instead of leaving them out.

    Raises:
        UserError: `max_tokens` leaves no room for a response; `truncate` without `max_tokens`.
    """

    fields: ConversationFields = field(default_factory=ConversationFields)
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


@dataclass(frozen=True)
class ConversationType(DocumentType[Conversation]):
    """Documents that are conversations.

    The hash of the turns before its first reply decides whether a conversation is held out, so the
    same question is never in both splits.

    Attributes:
        settings: how conversations become token ids.
        template_choice: value of `--chat-template`, recorded in the manifest.
        read_options: how input files are read; no `text_field`, because a record is a conversation.
    """

    name: ClassVar[str] = CONVERSATIONS
    settings: ConversationSettings = field(default_factory=ConversationSettings)
    template_choice: str = "llada"
    read_options: ReadOptions = field(default_factory=lambda: ReadOptions(text_field=None))

    @property
    def chat_template(self) -> str:
        return self.settings.chat_template

    def manifest_options(self) -> JsonObject:
        template = self.settings.chat_template.encode()
        return {
            **asdict(self.settings.fields),
            "chat_template": self.template_choice,
            "chat_template_sha256": hashlib.sha256(template).hexdigest(),
            "max_tokens": self.settings.max_tokens,
            "truncate": self.settings.truncate,
            "skip_bad": self.read_options.skip_bad,
        }

    def text(self, document: Conversation) -> str:
        return _to_json(document.messages)

    def choose_backend(
        self, tokenizer: Tokenizer, sources: Sequence[InputFile], requested: str
    ) -> tuple[str, str]:
        # The chat format encodes with the tokenizer itself, so its own library is the only choice.
        # A faster one would hardly matter: conversations are a small part of all text.
        encoder, _ = choose_encoder(tokenizer, [], "library")
        return encoder.name, ""

    def open(self, tokenizer: Tokenizer, backend: str) -> DocumentEncoder[Conversation]:
        return ConversationEncoder(self.settings, self.read_options, tokenizer)

    def replies(self, shard: Path) -> I64:
        return map_replies(Path(f"{shard}.replies"))


class _CountedReply(NamedTuple):
    """A reply of an encoded conversation.

    Attributes:
        reply: offsets of the reply and its prompt in the tokens.
        number: number of the reply in the conversation, from 1.
        text_bytes: UTF-8 bytes of its text.
    """

    reply: Reply
    number: int
    text_bytes: int

    @property
    def prompt_tokens(self) -> int:
        reply = self.reply
        return reply.history_end + reply.response_start - reply.turn_start

    @property
    def response_tokens(self) -> int:
        """Tokens of the response, EOS included."""
        return self.reply.turn_end - self.reply.response_start


class ConversationEncoder:
    """Parses records into conversations and encodes them.

    Args:
        settings: how conversations become token ids.
        read_options: how input files are read.
        tokenizer: tokenizer of the corpus.

    Raises:
        UserError: the chat template cannot be used, or the tokenizer lacks tokens of LLaDA's
            format.
    """

    def __init__(
        self, settings: ConversationSettings, read_options: ReadOptions, tokenizer: Tokenizer
    ) -> None:
        self._settings = settings
        self._read_options = read_options
        self._tokenizer = tokenizer
        self._format = chat_format(tokenizer, settings.chat_template)

    def read(self, source: InputFile, slice_: Slice, report: Report) -> Iterator[Conversation]:
        return read_records(source, slice_, self._read_options, report, self.parse)

    def parse(self, record: object, origin: Origin) -> Conversation:
        """Make a conversation of a record.

        Args:
            record: JSON value of the record.
            origin: where it was read.

        Raises:
            BadRecord: the record is not a conversation that can be trained on.
        """
        conversation = self._settings.fields.parse(record)
        try:
            self._format.check(conversation.messages)
        except TemplateError as problem:
            raise BadRecord(problem.reason, str(problem)) from None
        return replace(conversation, origin=origin)

    def encode(self, documents: list[Conversation], report: Report) -> EncodedDocuments:
        # One entry per conversation that is kept ...
        token_ids: list[list[int]] = []
        text_bytes: list[int] = []
        split_keys: list[bytes] = []
        # ... and one per reply of these.
        reply_rows: list[tuple[int, int, int, int, int]] = []

        encoded = self._format.encode([conversation.messages for conversation in documents])
        for conversation, (ids, replies) in zip(documents, encoded, strict=True):
            counted = self._count_bytes(conversation.messages, replies)
            kept, omissions = self._apply_limit(ids, counted)
            # Reported even if the conversation is kept: these count parts of it.
            for omission in (*conversation.omissions, *omissions):
                report.leave_out(*conversation.origin, omission.reason, omission.message)
            if not kept:
                continue
            # Without omissions all tokens are used, and the ids stay as the format made them.
            if omissions:
                ids, kept = _drop_unused_tokens(ids, kept, self._tokenizer.eos_id)
            document = len(token_ids)
            reply_rows += [(document, *entry.reply) for entry in kept]
            token_ids.append(ids)
            text_bytes.append(sum(entry.text_bytes for entry in kept))
            split_keys.append(_question(conversation.messages))

        # The empty array gives a batch without conversations its dtype, and `reshape` gives one
        # without replies its five columns.
        id_arrays = [np.array(ids, dtype=np.int64) for ids in token_ids]
        return EncodedDocuments(
            flat_tokens=np.concatenate([np.empty(0, dtype=np.int64), *id_arrays]),
            lengths=np.array([len(ids) for ids in token_ids], dtype=np.int64),
            text_bytes=np.array(text_bytes, dtype=np.int64),
            split_keys=split_keys,
            replies=np.array(reply_rows, dtype=np.int64).reshape(-1, 5),
        )

    def _count_bytes(self, messages: Messages, replies: Sequence[Reply]) -> list[_CountedReply]:
        """Number the replies of a conversation and count the bytes of their text."""
        turns = [message.content for message in messages if message.role == "assistant"]
        counted: list[_CountedReply] = []
        # Numbers are for messages: they do not change when other replies are left out.
        for number, (reply, turn) in enumerate(zip(replies, turns, strict=True), start=1):
            # The format may trim a turn, and only what is trained on counts.
            text = self._format.response(turn)
            counted.append(_CountedReply(reply, number, len(text.encode())))
        return counted

    def _apply_limit(
        self, ids: list[int], replies: list[_CountedReply]
    ) -> tuple[list[_CountedReply], list[Omission]]:
        """Leave out or cut the replies that exceed `max_tokens`.

        With max_tokens 10 and a prompt of 7 tokens, there is room for 3 tokens of a response. A
        response of 5 (EOS included) is left out, or cut to its first 3 tokens, without EOS.

        Returns:
            The replies that are kept, and what was left out of the others.
        """
        limit = self._settings.max_tokens
        if limit is None:
            return replies, []
        kept: list[_CountedReply] = []
        omissions: list[Omission] = []
        for entry in replies:
            room = limit - entry.prompt_tokens
            total = entry.prompt_tokens + entry.response_tokens
            if entry.response_tokens <= room:
                kept.append(entry)
            elif room <= 0:
                message = (
                    f"reply {entry.number}: its prompt has {entry.prompt_tokens:,} tokens,"
                    f" --max-tokens is {limit:,}"
                )
                omissions.append(Omission(_PROMPT_TOO_LONG, message))
            elif not self._settings.truncate:
                message = (
                    f"reply {entry.number}: {total:,} tokens with its prompt,"
                    f" --max-tokens is {limit:,}"
                )
                omissions.append(Omission(_REPLY_TOO_LONG, message))
            else:
                kept.append(self._cut(ids, entry, room))
                message = (
                    f"reply {entry.number}: {total:,} tokens with its prompt, cut to {limit:,},"
                    " without EOS"
                )
                omissions.append(Omission(_REPLY_CUT, message))
        return kept, omissions

    def _cut(self, ids: list[int], entry: _CountedReply, room: int) -> _CountedReply:
        """Cut a response to its first `room` tokens."""
        start = entry.reply.response_start
        end = start + room
        # A token may end inside a character, so the bytes of the decoded text are counted.
        text = self._tokenizer.decode(ids[start:end])
        return _CountedReply(entry.reply._replace(turn_end=end), entry.number, len(text.encode()))


def _drop_unused_tokens(
    ids: list[int], replies: list[_CountedReply], eos_id: int
) -> tuple[list[int], list[_CountedReply]]:
    """Keep only the tokens of a conversation that its remaining replies use.

    The tokens of a conversation are its history, then the turn of every reply:

        history  | turn 1 | turn 2 | turn 3          reply 2 was left out
        history' | turn 1 | turn 3                   history' is what the remaining prompts use

    The result ends with EOS, as every document does. An EOS after a cut reply belongs to no reply,
    so it is not learned.
    """
    kept_ids = ids[: max(entry.reply.history_end for entry in replies)]
    moved: list[_CountedReply] = []
    for entry in replies:
        reply = entry.reply
        # How far the turn moves towards the start. Its history stays where it is.
        shift = len(kept_ids) - reply.turn_start
        kept_ids += ids[reply.turn_start : reply.turn_end]
        shifted = Reply(
            history_end=reply.history_end,
            turn_start=reply.turn_start + shift,
            response_start=reply.response_start + shift,
            turn_end=reply.turn_end + shift,
        )
        moved.append(entry._replace(reply=shifted))
    if kept_ids[-1] != eos_id:
        kept_ids.append(eos_id)
    return kept_ids, moved


def _to_json(messages: Messages) -> str:
    """Encode turns as JSON, so that no text can be mistaken for another role or turn."""
    return json.dumps([(message.role, message.content) for message in messages], ensure_ascii=False)


def _question(messages: Messages) -> bytes:
    """Return the turns before the first reply, which decide the split of a conversation."""
    roles = [message.role for message in messages]
    return _to_json(messages[: roles.index("assistant")]).encode()


def read_chat_template(choice: str, tokenizer_path: str | Path) -> str:
    """Return the Jinja source that `--chat-template` names.

    Args:
        choice: "llada" for LLaDA's own format, "tokenizer" for the tokenizer's template, or a file.
        tokenizer_path: tokenizer of the corpus.

    Raises:
        UserError: the tokenizer has no template; `choice` is neither a known name nor a file of
            text.
    """
    if choice == "llada":
        return TEMPLATE
    if choice == "tokenizer":
        template = Tokenizer.load(tokenizer_path, require_mask=False).chat_template
        if template is None:
            raise UserError(
                f"--chat-template: {tokenizer_path} has no chat template (chat_template.jinja, or"
                " chat_template in tokenizer_config.json)"
            )
        return template
    try:
        return Path(choice).read_text(encoding="utf-8")
    except OSError as error:
        suggestion = did_you_mean(choice, ("llada", "tokenizer"))
        raise UserError(
            f"--chat-template: '{choice}'{suggestion} is neither llada nor tokenizer nor a file"
            f" ({error.strerror})"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"--chat-template: {choice} is not UTF-8; expected a Jinja template"
        ) from None

"""`llada data prepare-sft`: conversations -> token shards with the place of every reply, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.prepare import CorpusSettings, Encoded, in_batches, write_corpus
from data_tools.readers import BadRecord, ReadOptions, Report, read, string_field
from llada.chat import ROLES, ChatFormat, Message
from llada.data.corpus import CONVERSATIONS, Manifest
from llada.errors import did_you_mean
from llada.tokenizer import Tokenizer

Conversation = tuple[Message, ...]

_BATCH_CHARACTERS = 1 << 20
_FIELDS = "name the fields with --prompt-field and --response-field, or give a list of turns (--messages-field)"


@dataclass(frozen=True)
class Fields:
    """Names of the JSONL fields: either `prompt` and `response`, or `messages`, a list of {"role": ..., "content": ...}."""

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"

    def conversation(self, record: Any) -> Conversation:
        """The turns of one line. Raises BadRecord for one that is no conversation, or has an empty reply or an unknown role."""
        if isinstance(record, dict) and self.messages in record:
            return _checked(_messages(record[self.messages], self.messages))
        prompt, response = (string_field(record, name, _FIELDS) for name in (self.prompt, self.response))
        return _checked((Message("user", prompt), Message("assistant", response)))


def _messages(turns: Any, name: str) -> Conversation:
    if not isinstance(turns, list) or not turns:
        raise BadRecord("conversations without turns", f"field '{name}' is not a list of turns with a role and a content")
    found = []
    for number, turn in enumerate(turns, start=1):
        what = "it must have a role and a content"
        try:
            role, content = string_field(turn, "role", what), string_field(turn, "content", what)
        except BadRecord as problem:
            raise BadRecord("conversations with a bad turn", f"turn {number}: {problem}") from None
        if role not in ROLES:
            near = did_you_mean(role, ROLES)
            raise BadRecord(
                "conversations with an unknown role", f"turn {number}: unknown role '{role}'{near}; allowed: {', '.join(ROLES)}"
            )
        found.append(Message(role, content))
    return tuple(found)


def _checked(messages: Conversation) -> Conversation:
    """The conversation, if its last turn is a reply and no reply is empty."""
    if messages[-1].role != "assistant":
        raise BadRecord("conversations without a reply at the end", f"the last turn is the {messages[-1].role}'s, not the assistant's")
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.content.strip():
            raise BadRecord("conversations with an empty response", f"the response (turn {number}) is empty")
    return messages


def prepare_sft(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    fields: Fields | None = None,
    validation_fraction: float = 0.005,
    add_special_tokens: bool = False,
    skip_bad: bool = False,
    shard_tokens: int = 2**28,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Encode conversations with LLaDA's chat format and write them as a corpus.

    A conversation is held out by the hash of the turns before its first reply, so one question is never on both sides.

    Args:
        inputs: JSONL files (also .gz, .zst), or folders with such.
        tokenizer_path, output, validation_fraction, add_special_tokens, shard_tokens, force, progress: see `data_tools.prepare.prepare`.
        fields: names of the fields.
        skip_bad: count lines that are no conversations instead of stopping.

    Raises:
        UserError: anything wrong with inputs, tokenizer, options or output; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    fields = fields or Fields()
    recorded = {"prompt_field": fields.prompt, "response_field": fields.response, "messages_field": fields.messages, "skip_bad": skip_bad}
    settings = CorpusSettings(
        CONVERSATIONS, tokenizer_path, validation_fraction, add_special_tokens, shard_tokens, force, progress, recorded
    )
    options = ReadOptions(skip_bad=skip_bad, record=fields.conversation)
    report = Report()

    def batches(tokenizer: Tokenizer) -> Iterator[Encoded]:
        chat = ChatFormat(tokenizer)
        for conversations in in_batches(read(inputs, options, report), _characters, _BATCH_CHARACTERS):
            yield _encode(conversations, chat)

    return write_corpus(output, settings, batches, report)


def _characters(messages: Conversation) -> int:
    return sum(len(message.content) for message in messages)


def _encode(conversations: list[Conversation], chat: ChatFormat) -> Encoded:
    rows = chat.encode(conversations)
    replies = [(i, r.history_end, r.turn_start, r.response_start, r.turn_end) for i, (_, found) in enumerate(rows) for r in found]
    return Encoded(
        flat=np.concatenate([np.array(ids, dtype=np.int64) for ids, _ in rows]),
        lengths=np.array([len(ids) for ids, _ in rows], dtype=np.int64),
        text_bytes=np.array([sum(len(m.content.encode()) for m in c if m.role == "assistant") for c in conversations], dtype=np.int64),
        hashes=[xxhash.xxh3_64_intdigest(_question(messages)) for messages in conversations],
        replies=np.array(replies, dtype=np.int64),
    )


def _question(messages: Conversation) -> bytes:
    """The turns before the first reply, unambiguously."""
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    return json.dumps([(message.role, message.content) for message in messages[:first]], ensure_ascii=False).encode()

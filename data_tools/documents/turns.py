"""Records of conversations: prompt and response, Alpaca's fields, or a list of turns in one of the
usual spellings -> turns of llada.chat.format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.readers.records import BadRecord, string_field
from llada.chat.format import ROLES, Message
from llada.errors import UserError, did_you_mean

Messages = tuple[Message, ...]

FORMS = ("auto", "prompt-response", "messages", "sharegpt", "alpaca")
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Other names of the roles; capital letters make no difference."""
_GAP = "\n\n"
_INSTRUCTION, _INPUT, _OUTPUT, _HISTORY = "instruction", "input", "output", "history"
"""Alpaca's fields: what is wanted, a text that it is wanted of (may be empty), the answer, and
earlier pairs of both.
"""
_FIELDS = (
    "name the fields with --prompt-field and --response-field, or that of a list of turns with"
    " --messages-field or --conversations-field"
)
_TRAILING = "ends of conversations without a reply (--drop-trailing)"


@dataclass(frozen=True)
class Conversation:
    """A conversation as read.

    Attributes:
        messages: its turns, the last one the assistant's.
        notes: what was left out of it: (reason, message), where the reason is a plural under which
            it is counted.
        place: its file and line.
    """

    messages: Messages
    notes: tuple[tuple[str, str], ...] = ()
    place: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Fields:
    """How the JSON value of a line is read.

    Attributes:
        prompt, response: names of the fields of a pair.
        messages: field with a list of turns; `--format messages` reads it alone.
        conversations: the same in ShareGPT's spelling, {"from": ..., "value": ...}; a turn of
            either list may have either spelling.
        system: field with a system prompt beside any of the forms; null or empty: there is none.
        context: field whose text, where there is one, follows the prompt of a pair after a blank
            line; None: there is no such field.
        form: one of FORMS.
        drop_trailing: leave out turns after the last reply instead of refusing the conversation.
        join_turns: make consecutive turns of one role one turn, with blank lines between.

    Raises:
        UserError: another form.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    conversations: str = "conversations"
    system: str = "system"
    context: str | None = None
    form: str = "auto"
    drop_trailing: bool = False
    join_turns: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(
                f"--format: '{self.form}' is not allowed{did_you_mean(self.form, FORMS)}; one of"
                f" {', '.join(FORMS)}"
            )

    def conversation(self, record: Any) -> Conversation:
        """The turns of one line.

        Raises:
            BadRecord: no conversation, an unknown role, an empty reply, no reply at the end.
        """
        form = self._form_of(record)
        if form == "prompt-response":
            found = self._pair(record, self.prompt, self.response, self.context, _FIELDS)
        elif form == "alpaca":
            pair = self._pair(
                record,
                _INSTRUCTION,
                _OUTPUT,
                _INPUT,
                f"--format alpaca reads {_INSTRUCTION}, {_INPUT} and {_OUTPUT}",
            )
            found = [*_earlier(record.get(_HISTORY)), *pair]
        else:
            name = self.messages if form == "messages" else self.conversations
            if not isinstance(record, dict) or name not in record:
                string_field(
                    record, name, "name the field with --messages-field or --conversations-field"
                )  # says what there is
            found = _turns(record[name], name)
        system = self._optional(record, self.system)
        if system:
            if found[0].role == "system":
                raise BadRecord(
                    "conversations with two system prompts",
                    f"a field '{self.system}' and a first turn of the system",
                )
            found.insert(0, Message("system", system))
        return self._checked(_joined(found) if self.join_turns else found)

    def _pair(
        self, record: Any, prompt: str, response: str, context: str | None, remedy: str
    ) -> list[Message]:
        """A question with its context, where there is one, and the answer, from fields with these
        names.
        """
        question, answer = (string_field(record, name, remedy) for name in (prompt, response))
        more = self._optional(record, context)
        return [
            Message("user", question + (_GAP + more if more else "")),
            Message("assistant", answer),
        ]

    def _form_of(self, record: Any) -> str:
        """The form of a record by its fields; a field that is null counts as none. A record of no
        form is read as a pair, which says what it lacks.
        """
        if self.form != "auto" or not isinstance(record, dict):
            return "prompt-response" if self.form == "auto" else self.form
        names = {
            "prompt-response": (self.prompt, self.response),
            "messages": (self.messages,),
            "sharegpt": (self.conversations,),
        }
        if not {_INSTRUCTION, _OUTPUT} & {
            self.prompt,
            self.response,
        }:  # else the user has said how such records are read
            names["alpaca"] = (_INSTRUCTION, _OUTPUT)
        found = [
            form for form, own in names.items() if all(record.get(name) is not None for name in own)
        ]
        if len(found) > 1:
            fields = " and ".join("'" + "' with '".join(names[form]) + "'" for form in found)
            raise BadRecord(
                "lines with more than one conversation",
                f"fields {fields} are two conversations; choose with --format",
            )
        return found[0] if found else "prompt-response"

    def _optional(self, record: Any, name: str | None) -> str:
        text = None if name is None else record.get(name)
        if text is not None and not isinstance(text, str):
            raise BadRecord(
                "lines whose field is not a string",
                f"field '{name}' is not a string but {type(text).__name__}",
            )
        return text if text and text.strip() else ""

    def _checked(self, messages: list[Message]) -> Conversation:
        """The conversation, if its last turn is a reply and no reply is empty."""
        last = max(
            (i for i, message in enumerate(messages) if message.role == "assistant"), default=None
        )
        if last is None:
            raise BadRecord(
                "conversations without any reply",
                "no turn is the assistant's, so there is no reply to learn",
            )
        more = messages[last + 1 :]
        if more and not self.drop_trailing:
            raise BadRecord(
                "conversations without a reply at the end",
                f"the last turn is the {messages[-1].role}'s, not the assistant's; --drop-trailing"
                " leaves such turns out",
            )
        for number, message in enumerate(messages[: last + 1], start=1):
            if message.role == "assistant" and not message.content.strip():
                raise BadRecord(
                    "conversations with an empty response", f"the response (turn {number}) is empty"
                )
        notes = (
            (
                (
                    _TRAILING,
                    f"the last {len(more)} of {len(messages)} turns have no reply and are left out",
                ),
            )
            if more
            else ()
        )
        return Conversation(tuple(messages[: last + 1]), notes)


def _earlier(history: Any) -> list[Message]:
    """The turns of Alpaca's history, a list of [question, answer]."""
    pairs = [] if history is None else history
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise BadRecord(
            "conversations with a bad history",
            f"field '{_HISTORY}' is not a list of pairs of strings, [question, answer]",
        )
    return [
        Message(role, text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


def _turns(turns: Any, name: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise BadRecord(
            "conversations without turns",
            f"field '{name}' is not a list of turns with a role and a content",
        )
    return [_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, number: int) -> Message:
    """One turn: {"role", "content"} or {"from", "value"}."""
    keys = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    named = _field(turn, keys[0], keys, number)
    role = ALIASES.get(named.lower(), named.lower())
    if role not in ROLES:
        near = did_you_mean(named, [*ROLES, *ALIASES])
        raise BadRecord(
            "conversations with an unknown role",
            f"turn {number}: unknown role '{named}'{near}; allowed: {', '.join(ROLES)}, and for"
            f" these {', '.join(ALIASES)}",
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRecord(
            "conversations with tool calls", f"turn {number}: calls of tools are not trained on"
        )
    if not isinstance(turn.get(keys[1]), list):
        return Message(role, _field(turn, keys[1], keys, number))
    texts = []
    for part in turn[keys[1]]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadRecord(
                "conversations with content that is not text",
                f"turn {number}: a part of type '{kind}'; only 'text' is trained on",
            )
        texts.append(_field(part, "text", ("type", "text"), number))
    return Message(role, "".join(texts))


def _field(value: Any, name: str, keys: Sequence[str], number: int) -> str:
    try:
        return string_field(value, name, f"it must have a {keys[0]} and a {keys[1]}")
    except BadRecord as problem:
        raise BadRecord("conversations with a bad turn", f"turn {number}: {problem}") from None


def _joined(messages: list[Message]) -> list[Message]:
    """Consecutive turns of one role as one."""
    found = messages[:1]
    for message in messages[1:]:
        if message.role == found[-1].role:
            found[-1] = Message(message.role, found[-1].content + _GAP + message.content)
        else:
            found.append(message)
    return found

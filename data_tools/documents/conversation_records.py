"""Parsing of conversation records: the JSON value of a line becomes the turns of a conversation.

A record is a prompt and a response, Alpaca's fields, or a list of turns as OpenAI ("messages") or
ShareGPT ("conversations") spell it. The turns are those of `llada.chat.format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_tools.readers.records import BadRecord, Origin, missing_field, string_field
from llada.chat.format import ROLES, Message
from llada.errors import UserError, did_you_mean
from llada.types import JsonObject

Messages = tuple[Message, ...]

FORMS = ("auto", "prompt-response", "messages", "sharegpt", "alpaca")
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Other names of the roles, in lower case; records may use any case."""
_BLANK_LINE = "\n\n"
# Alpaca's fields: the task, a text that the task refers to (may be empty), the answer, and earlier
# pairs of task and answer.
_INSTRUCTION = "instruction"
_INPUT = "input"
_OUTPUT = "output"
_HISTORY = "history"
_PAIR_REMEDY = (
    "name the fields with --prompt-field and --response-field, or that of a list of turns with"
    " --messages-field or --conversations-field"
)
_ALPACA_REMEDY = f"--format alpaca reads {_INSTRUCTION}, {_INPUT} and {_OUTPUT}"
_TURNS_REMEDY = "name the field with --messages-field or --conversations-field"
_TRAILING = "ends of conversations without a reply (--drop-trailing)"

_NO_ORIGIN = Origin(path="", line=0)


class Omission(NamedTuple):
    """A part of a conversation that is left out while the rest is kept.

    Attributes:
        reason: plural under which it is counted.
        message: what was left out of this conversation.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class Conversation:
    """A parsed conversation.

    Attributes:
        messages: turns of the conversation; the last one is the assistant's.
        omissions: parts that were left out.
        origin: where its record was read.
    """

    messages: Messages
    omissions: tuple[Omission, ...] = ()
    origin: Origin = _NO_ORIGIN


@dataclass(frozen=True)
class ConversationFields:
    """Which fields of a record hold a conversation, and how its turns are read.

    The names are those in a manifest's options.

    Attributes:
        prompt, response: fields of a pair.
        messages: field with a list of turns in OpenAI's spelling, with `role` and `content`.
        conversations: field with a list of turns in ShareGPT's spelling, with `from` and `value`. A
            turn in either list may have either spelling.
        system: field with a system prompt, which any form may have; null or empty means none.
        context: field whose text, if any, follows the prompt of a pair after a blank line; None if
            there is no such field.
        form: one of FORMS; "auto" decides by the fields of each record.
        drop_trailing: whether to leave out turns after the last reply instead of refusing the
            conversation.
        join_turns: whether to join consecutive turns of one role, with blank lines between them.

    Raises:
        UserError: unknown form.
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

    def parse(self, record: object) -> Conversation:
        """Return the conversation in a record.

        Raises:
            BadRecord: not a conversation, an unknown role, an empty reply, no reply at the end.
        """
        form = self._form_of(record)
        if form == "prompt-response":
            fields = _as_object(record, self.prompt, _PAIR_REMEDY)
            messages = _read_pair(fields, self.prompt, self.response, self.context, _PAIR_REMEDY)
        elif form == "alpaca":
            fields = _as_object(record, _INSTRUCTION, _ALPACA_REMEDY)
            # The pair first: a record without it is refused for that, not for its history.
            pair = _read_pair(fields, _INSTRUCTION, _OUTPUT, _INPUT, _ALPACA_REMEDY)
            messages = _read_history(fields.get(_HISTORY)) + pair
        else:
            name = self.messages
            if form == "sharegpt":
                name = self.conversations
            fields = _as_object(record, name, _TURNS_REMEDY)
            messages = _read_turns(fields, name)
        system = _optional_text(fields, self.system)
        if system:
            if messages[0].role == "system":
                raise BadRecord(
                    "conversations with two system prompts",
                    f"a field '{self.system}' and a first turn of the system",
                )
            messages.insert(0, Message("system", system))
        if self.join_turns:
            messages = _join_turns(messages)
        return self._end_with_reply(messages)

    def _form_of(self, record: object) -> str:
        """Return the form that is set, or the form that the fields of a record suggest.

        A field that is null counts as missing. A record without the fields of any form counts as a
        pair, whose parsing then names what is missing.
        """
        if self.form != "auto":
            return self.form
        if not isinstance(record, dict):
            return "prompt-response"
        fields_of_form: dict[str, tuple[str, ...]] = {
            "prompt-response": (self.prompt, self.response),
            "messages": (self.messages,),
            "sharegpt": (self.conversations,),
        }
        # Whoever reads pairs from Alpaca's fields (--prompt-field instruction) does not want them
        # read as Alpaca's.
        if not {_INSTRUCTION, _OUTPUT} & {self.prompt, self.response}:
            fields_of_form["alpaca"] = (_INSTRUCTION, _OUTPUT)
        matching = [
            form
            for form, names in fields_of_form.items()
            if all(record.get(name) is not None for name in names)
        ]
        if not matching:
            return "prompt-response"
        if len(matching) > 1:
            quoted = [_quote_fields(fields_of_form[form]) for form in matching]
            raise BadRecord(
                "{records} with more than one conversation",
                f"fields {' and '.join(quoted)} are two conversations; choose with --format",
            )
        return matching[0]

    def _end_with_reply(self, messages: list[Message]) -> Conversation:
        """Return the conversation of turns whose last one is a reply and whose replies have text.

        Raises:
            BadRecord: there is no reply, turns follow the last one, or a reply is empty.
        """
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not replies:
            raise BadRecord(
                "conversations without any reply",
                "no turn is the assistant's, so there is no reply to learn",
            )
        kept = messages[: replies[-1] + 1]
        num_trailing = len(messages) - len(kept)
        if num_trailing and not self.drop_trailing:
            raise BadRecord(
                "conversations without a reply at the end",
                f"the last turn is the {messages[-1].role}'s, not the assistant's; --drop-trailing"
                " leaves such turns out",
            )
        for i in replies:
            if not kept[i].content.strip():
                raise BadRecord(
                    "conversations with an empty response", f"the response (turn {i + 1}) is empty"
                )
        if not num_trailing:
            return Conversation(tuple(kept))
        message = f"the last {num_trailing} of {len(messages)} turns have no reply and are left out"
        return Conversation(tuple(kept), (Omission(_TRAILING, message),))


def _quote_fields(names: Sequence[str]) -> str:
    """Quote field names for a message: ("prompt", "response") -> 'prompt' with 'response'."""
    return " with ".join(f"'{name}'" for name in names)


def _as_object(record: object, name: str, remedy: str) -> JsonObject:
    """Return a record that is a JSON object.

    Raises:
        BadRecord: it is not; the message asks for the field `name`.
    """
    if not isinstance(record, dict):
        raise missing_field(record, name, remedy)
    return record


def _optional_text(fields: JsonObject, name: str | None) -> str:
    """Return the text of a field; "" if it is missing, null or blank."""
    if name is None:
        return ""
    text = fields.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadRecord(
            "{records} whose field is not a string",
            f"field '{name}' is not a string but {type(text).__name__}",
        )
    # Blank text counts as missing; other text keeps the white space around it.
    if not text.strip():
        return ""
    return text


def _read_pair(
    fields: JsonObject, prompt: str, response: str, context: str | None, remedy: str
) -> list[Message]:
    """Return the two turns of a pair: the prompt with its context, if any, and the response."""
    question = string_field(fields, prompt, remedy)
    answer = string_field(fields, response, remedy)
    context_text = _optional_text(fields, context)
    if context_text:
        question += _BLANK_LINE + context_text
    return [Message("user", question), Message("assistant", answer)]


def _read_history(history: object) -> list[Message]:
    """Return the turns of Alpaca's history, a list of [question, answer] or null."""
    if history is None:
        return []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise BadRecord(
            "conversations with a bad history",
            f"field '{_HISTORY}' is not a list of pairs of strings, [question, answer]",
        )
    messages: list[Message] = []
    for question, answer in history:
        messages.append(Message("user", question))
        messages.append(Message("assistant", answer))
    return messages


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


def _read_turns(fields: JsonObject, name: str) -> list[Message]:
    """Return the turns of a list in a field."""
    if name not in fields:
        raise missing_field(fields, name, _TURNS_REMEDY)
    turns = fields[name]
    if not isinstance(turns, list) or not turns:
        raise BadRecord(
            "conversations without turns",
            f"field '{name}' is not a list of turns with a role and a content",
        )
    return [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: object, number: int) -> Message:
    """Return one turn, {"role", "content"} or {"from", "value"}; `number` counts from 1."""
    # Datasets mix the spellings, so a turn may have either, in either kind of list.
    keys = ("role", "content")
    if isinstance(turn, dict) and "from" in turn:
        keys = ("from", "value")
    role_key, content_key = keys

    spelled_role = _turn_field(turn, role_key, keys, number)
    lower = spelled_role.lower()
    role = ROLE_ALIASES.get(lower, lower)
    if role not in ROLES:
        suggestion = did_you_mean(spelled_role, [*ROLES, *ROLE_ALIASES])
        raise BadRecord(
            "conversations with an unknown role",
            f"turn {number}: unknown role '{spelled_role}'{suggestion}; allowed:"
            f" {', '.join(ROLES)}, and for these {', '.join(ROLE_ALIASES)}",
        )

    assert isinstance(turn, dict)  # otherwise `_turn_field` has raised
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRecord(
            "conversations with tool calls", f"turn {number}: calls of tools are not trained on"
        )
    content = turn.get(content_key)
    if isinstance(content, list):
        return Message(role, _join_parts(content, number))
    return Message(role, _turn_field(turn, content_key, keys, number))


def _join_parts(parts: list[object], number: int) -> str:
    """Join the parts of a content that is a list; all must be of type "text"."""
    texts: list[str] = []
    for part in parts:
        part_type: object = type(part).__name__
        if isinstance(part, dict):
            part_type = part.get("type")
        if part_type != "text":
            raise BadRecord(
                "conversations with content that is not text",
                f"turn {number}: a part of type '{part_type}'; only 'text' is trained on",
            )
        texts.append(_turn_field(part, "text", ("type", "text"), number))
    return "".join(texts)


def _turn_field(turn: object, name: str, keys: Sequence[str], number: int) -> str:
    """Return the string in a field of a turn that should have `keys`."""
    try:
        return string_field(turn, name, f"it must have a {keys[0]} and a {keys[1]}")
    except BadRecord as problem:
        raise BadRecord("conversations with a bad turn", f"turn {number}: {problem}") from None


def _join_turns(messages: list[Message]) -> list[Message]:
    """Join consecutive turns of one role into one turn."""
    joined = messages[:1]
    for message in messages[1:]:
        previous = joined[-1]
        if message.role == previous.role:
            joined[-1] = Message(message.role, previous.content + _BLANK_LINE + message.content)
        else:
            joined.append(message)
    return joined

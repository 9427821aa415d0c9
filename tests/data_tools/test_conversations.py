"""Every spelling of a conversation, and what is refused of it."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from data_tools.documents.conversation_records import ConversationFields
from data_tools.readers.records import BadRecord
from llada.chat.format import Message
from llada.errors import UserError

Q, A, S = Message("user", "q"), Message("assistant", "a"), Message("system", "s")


def turns(
    *pairs: tuple[str, Any], keys: tuple[str, str] = ("role", "content")
) -> list[dict[str, Any]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


SHARE = turns(("human", "q"), ("gpt", "a"), keys=("from", "value"))
GOOD = [
    ({"prompt": "q", "response": "a"}, {}, [Q, A]),
    ({"prompt": "q", "response": "a", "system": "s"}, {}, [S, Q, A]),
    ({"prompt": "q", "response": "a", "system": None}, {}, [Q, A]),
    ({"prompt": "q", "response": "a", "system": " "}, {}, [Q, A]),
    (
        {"q": "q", "a": "a", "sys": "s"},
        {"prompt": "q", "response": "a", "system": "sys"},
        [S, Q, A],
    ),
    ({"messages": turns(("user", "q"), ("assistant", "a"))}, {}, [Q, A]),
    ({"messages": turns(("System", "s"), ("USER", "q"), ("model", "a"))}, {}, [S, Q, A]),
    (
        {"messages": turns(("user", "q"), ("assistant", "a")), "prompt": "q", "prompt_id": "1"},
        {},
        [Q, A],
    ),
    (
        {"messages": turns(("user", "q"), ("assistant", "a")), "prompt": None, "response": None},
        {},
        [Q, A],
    ),
    ({"conversations": SHARE}, {}, [Q, A]),
    ({"conversations": SHARE, "system": "s"}, {}, [S, Q, A]),
    (
        {
            "conversations": turns(
                ("system", "s"), ("user", "q"), ("chatgpt", "a"), keys=("from", "value")
            )
        },
        {},
        [S, Q, A],
    ),
    ({"conversations": turns(("human", "q"), ("bot", "a"))}, {}, [Q, A]),
    ({"talk": SHARE}, {"conversations": "talk"}, [Q, A]),
    (
        {"messages": SHARE, "conversations": turns(("user", "x"), ("assistant", "y"))},
        {"form": "messages"},
        [Q, A],
    ),
    ({"messages": "x", "conversations": SHARE}, {"form": "sharegpt"}, [Q, A]),
    ({"messages": "x", "prompt": "q", "response": "a"}, {"form": "prompt-response"}, [Q, A]),
    (
        {
            "messages": turns(
                ("user", [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}]),
                ("assistant", "a"),
            )
        },
        {},
        [Message("user", "a b c"), A],
    ),
    (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "instruction", "context": "input", "response": "output"},
        [Message("user", "Add.\n\n1 2"), Message("assistant", "3")],
    ),
    (
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "instruction", "context": "input", "response": "output"},
        [Q, A],
    ),
    (
        {"instruction": "q", "output": "a"},
        {"prompt": "instruction", "context": "input", "response": "output"},
        [Q, A],
    ),
    ({"instruction": "q", "input": "", "output": "a", "text": "x"}, {}, [Q, A]),
    (
        {"instruction": "q", "input": None, "output": "a", "system": "s", "history": []},
        {},
        [S, Q, A],
    ),
    (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {},
        [Message("user", "Add.\n\n1 2"), Message("assistant", "3")],
    ),
    (
        {"instruction": "q", "output": "a", "history": [["r", "b"]], "system": "s"},
        {},
        [S, Message("user", "r"), Message("assistant", "b"), Q, A],
    ),
    ({"instruction": "q", "output": "a", "messages": "x"}, {"form": "alpaca"}, [Q, A]),
    ({"messages": turns(("user", "q"), ("user", "q"), ("assistant", "a"))}, {}, [Q, Q, A]),
    (
        {"messages": turns(("user", "q"), ("user", "r"), ("assistant", "a"), ("assistant", "b"))},
        {"join_turns": True},
        [Message("user", "q\n\nr"), Message("assistant", "a\n\nb")],
    ),
]


@pytest.mark.parametrize(("record", "options", "wanted"), GOOD)
def test_a_record_is_these_turns(
    record: Any, options: dict[str, Any], wanted: list[Message]
) -> None:
    fields = pickle.loads(pickle.dumps(ConversationFields(**options)))
    conversation = fields.parse(record)
    assert list(conversation.messages) == wanted
    assert conversation.omissions == ()


BAD = [
    ({"prompt": "q"}, {}, "field 'response' is missing", "lines without the field"),
    ({"promt": "q", "response": "a"}, {}, "(did you mean 'promt'?)", "lines without the field"),
    (
        {"prompt": "q", "response": "a", "messages": []},
        {},
        "choose with --format",
        "more than one conversation",
    ),
    (
        {"messages": [], "conversations": SHARE},
        {},
        "'messages' and 'conversations' are two",
        "more than one conversation",
    ),
    (
        {"prompt": "q", "response": "a"},
        {"form": "sharegpt"},
        "field 'conversations' is missing",
        "lines without the field",
    ),
    (["q"], {"form": "messages"}, "a JSON list", "lines without the field"),
    ({"conversations": {"from": "human"}}, {}, "not a list of turns", "without turns"),
    (
        {"conversations": turns(("human", "q"), ("gtp", "a"), keys=("from", "value"))},
        {},
        "'gtp' (did you mean 'gpt'?)",
        "unknown role",
    ),
    (
        {"messages": turns(("user", "q"), ("tool", "x"), ("assistant", "a"))},
        {},
        "turn 2: unknown role 'tool'",
        "unknown role",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [1]},
            ]
        },
        {},
        "turn 2",
        "tool calls",
    ),
    (
        {"messages": turns(("user", [{"type": "image"}]), ("assistant", "a"))},
        {},
        "turn 1: a part of type 'image'",
        "not text",
    ),
    (
        {"messages": turns(("user", ["x"]), ("assistant", "a"))},
        {},
        "turn 1: a part of type 'str'",
        "not text",
    ),
    (
        {"messages": turns(("user", [{"type": "text"}]), ("assistant", "a"))},
        {},
        "turn 1: field 'text' is missing",
        "bad turn",
    ),
    ({"messages": ["q", "a"]}, {}, "turn 1: a JSON str", "bad turn"),
    (
        {"conversations": [{"from": "human", "content": "q"}]},
        {},
        "turn 1: field 'value' is missing",
        "bad turn",
    ),
    (
        {"messages": turns(("user", "q"), ("assistant", "a"), ("user", "r"))},
        {},
        "--drop-trailing",
        "without a reply at the end",
    ),
    (
        {"messages": turns(("user", "q"))},
        {"drop_trailing": True},
        "no turn is the assistant's",
        "without any reply",
    ),
    (
        {"messages": turns(("system", "t"), ("user", "q"), ("assistant", "a")), "system": "s"},
        {},
        "field 'system'",
        "two system prompts",
    ),
    (
        {"prompt": "q", "response": "a", "system": 3},
        {},
        "field 'system' is not a string but int",
        "not a string",
    ),
    ({"prompt": "q", "response": " "}, {}, "(turn 2) is empty", "empty response"),
    (
        {"instruction": "q", "output": "a", "conversations": SHARE},
        {},
        "choose with --format",
        "more than one conversation",
    ),
    (
        {"instruction": "q", "input": "a"},
        {"form": "alpaca"},
        "field 'output' is missing",
        "lines without the field",
    ),
    (
        {"instruction": "q", "output": "a", "history": [["r"]]},
        {},
        "'history' is not a list of pairs",
        "bad history",
    ),
    (
        {"instruction": "q", "output": "a", "history": "r"},
        {},
        "'history' is not a list of pairs",
        "bad history",
    ),
]


@pytest.mark.parametrize(("record", "options", "message", "reason"), BAD)
def test_what_is_no_conversation(
    record: Any, options: dict[str, Any], message: str, reason: str
) -> None:
    with pytest.raises(BadRecord) as caught:
        ConversationFields(**options).parse(record)
    assert message in str(caught.value)
    assert reason in caught.value.reason("lines")
    assert "\n" not in str(caught.value)


def test_turns_after_the_last_reply_are_left_out_when_asked() -> None:
    record = {"messages": turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("system", "s"))}
    conversation = ConversationFields(drop_trailing=True).parse(record)
    assert list(conversation.messages) == [Q, A]
    [(reason, message)] = conversation.omissions
    assert "without a reply" in reason
    assert message == "the last 2 of 4 turns have no reply and are left out"


def test_another_form_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"--format: 'shareGPT' is not allowed \(did you mean 'sharegpt'\?\); one of auto",
    ):
        ConversationFields(form="shareGPT")


def test_the_examples_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sft.md").read_text(encoding="utf-8")
    examples = [
        json.loads(line)
        for block in re.findall(r"(?ms)^```json\n(.*?)^```", text)
        for line in block.splitlines()
    ]
    roles = [
        [message.role for message in ConversationFields().parse(example).messages]
        for example in examples
    ]
    assert roles == [
        ["user", "assistant"],
        *[["system", "user", "assistant"]] * 3,
        ["user", "assistant"],
    ]

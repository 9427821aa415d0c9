"""LLaDA's chat format: conversations <-> token ids.

    <|startoftext|><|start_header_id|>user<|end_header_id|>\\n\\n{text}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n

The text of every turn, replies included, is trimmed: white space at its ends is left out, as the
published template does.

The pieces of text between special tokens are encoded one by one, as a Hugging Face tokenizer does
with the rendered template. A prompt ends with "\\n\\n" encoded alone, since that is what the model
sees before it answers; in an earlier turn of the history "\\n\\n" and the text after it are one
piece. The two may be different ids, so each is encoded as it will be at inference.

Other formats are chat templates: llada.chat.template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llada.errors import UserError
from llada.tokenizer import Tokenizer

I64 = npt.NDArray[np.int64]

ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The same format as a Hugging Face chat template (Jinja)."""
END_OF_TURN = "<|eot_id|>"
_GAP = "\n\n"
_REMEDY = "add LLaDA's special tokens with `llada data prepare-sft --add-special-tokens`"


@dataclass(frozen=True)
class Message:
    """One turn: `role` is one of ROLES, `content` its text."""

    role: str
    content: str


class Reply(NamedTuple):
    """Where a reply of an encoded conversation and its prompt lie, as offsets into the
    conversation's tokens.

    The prompt is tokens[:history_end] + tokens[turn_start:response_start], the response
    tokens[response_start:turn_end].
    """

    history_end: int
    turn_start: int
    response_start: int
    turn_end: int


class ChatFormat:
    """Encodes conversations with a tokenizer.

    Raises:
        UserError: the tokenizer lacks one of the format's special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        if tokenizer.bos_id is None:
            raise UserError(
                f"{tokenizer.name}: the tokenizer has no token for the start of a text, which the"
                f" chat format needs; {_REMEDY}"
            )
        self._bos, self._eos = [tokenizer.bos_id], [tokenizer.eos_id]
        names = ("<|start_header_id|>", "<|end_header_id|>", END_OF_TURN)
        self._open, self._close, self._end = ([self._special(name)] for name in names)
        self._roles = {role: tokenizer.encode(role).tolist() for role in ROLES}
        self._gap = tokenizer.encode(_GAP).tolist()

    def _special(self, token: str) -> int:
        found = self.tokenizer.id_of(token)
        if found is None:
            raise UserError(
                f"{self.tokenizer.name}: the tokenizer has no {token}, which the chat format needs;"
                f" {_REMEDY}"
            )
        return found

    def _header(self, role: str) -> list[int]:
        return self._open + self._roles[role] + self._close

    def prompt(self, messages: Sequence[Message]) -> I64:
        """The ids after which the model writes the next reply to `messages`."""
        rows = [
            self.tokenizer.encode(_GAP + message.content.strip()).tolist() for message in messages
        ]
        ids = list(self._bos)
        for message, body in zip(messages, rows, strict=True):
            ids += self._header(message.role) + body + self._end
        return np.array(ids + self._header("assistant") + self._gap, dtype=np.int64)

    def check(self, messages: Sequence[Message]) -> None:
        """Whether the format can express a conversation: it can express all."""

    def response(self, content: str) -> str:
        """The text of a reply that is trained on: without the white space at its ends."""
        return content.strip()

    def encode(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[Reply]]]:
        """Tokens and replies of conversations whose last message is the assistant's.

        The tokens are the history up to the header of the last reply, then every reply: the gap
        before it, its text encoded alone, and EOS. With one reply that is just prompt, response,
        EOS.
        """
        texts: list[str] = []
        for messages in conversations:
            texts += [_GAP + message.content.strip() for message in messages[:-1]]
            texts += [
                self.response(message.content)
                for message in messages
                if message.role == "assistant"
            ]
        flat, lengths = self.tokenizer.encode_batch(texts)
        rows = iter(np.split(flat, np.cumsum(lengths)[:-1]))
        return [self._assemble(messages, rows) for messages in conversations]

    def _assemble(
        self, messages: Sequence[Message], rows: Iterator[I64]
    ) -> tuple[list[int], list[Reply]]:
        ids, ends = list(self._bos), []
        for message in messages[:-1]:
            ids += self._header(message.role)
            if message.role == "assistant":
                ends.append(len(ids))
            ids += next(rows).tolist() + self._end
        ids += self._header(messages[-1].role)
        ends.append(len(ids))
        replies = []
        for history_end in ends:
            start = len(ids)
            ids += self._gap + next(rows).tolist() + self._eos
            replies.append(Reply(history_end, start, start + len(self._gap), len(ids)))
        return ids, replies

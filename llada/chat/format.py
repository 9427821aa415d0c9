"""LLaDA's chat format: conversations <-> token ids.

A question, and what the model continues (the line breaks are not part of it):

    <|startoftext|>
    <|start_header_id|>user<|end_header_id|>\\n\\n{text}<|eot_id|>
    <|start_header_id|>assistant<|end_header_id|>\\n\\n

White space at both ends of a turn is stripped, replies included, as the published template does.

The text between special tokens is encoded on its own, as a Hugging Face tokenizer encodes the
rendered template. A prompt ends with "\\n\\n" encoded alone, because that is what the model sees
before it answers. In an earlier turn, "\\n\\n" and the text after it are encoded together. The ids
may differ between the two, so training uses for each the ids it has at inference.

Other formats are chat templates: llada.chat.template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llada.arrays import I64
from llada.errors import UserError
from llada.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The same format as a Hugging Face chat template (Jinja)."""
END_OF_TURN = "<|eot_id|>"
_GAP = "\n\n"
"""Text between the header of a turn and its content."""
_REMEDY = "add LLaDA's special tokens with `llada data prepare-sft --add-special-tokens`"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ROLES.
        content: the text.
    """

    role: str
    content: str


class Reply(NamedTuple):
    """Where one reply of an encoded conversation lies, and its prompt, as offsets into the tokens.

    The prompt is tokens[:history_end] + tokens[turn_start:response_start]; the response, which is
    what training masks, is tokens[response_start:turn_end].

    The history is stored once and shared by all replies. Take question q1, reply r1, question q2
    and reply r2, with U and A for the headers of user and assistant, GAP for the text after a
    header, and made-up lengths:

        offset  tokens
             0  BOS U q1 EOT A
            12  r1 EOT U q2 EOT A
            30  GAP r1 EOS
            40  GAP r2 EOS
            50  (end)

    If GAP has 2 tokens, r1 is Reply(12, 30, 32, 40) and r2 is Reply(30, 40, 42, 50).
    """

    history_end: int
    turn_start: int
    response_start: int
    turn_end: int


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text or an answer: EOS, and the end of a turn if it has one."""
    ids = {tokenizer.eos_id}
    end_of_turn = tokenizer.id_of(END_OF_TURN)
    if end_of_turn is not None:
        ids.add(end_of_turn)
    return ids


class ChatFormat:
    """Encodes conversations in LLaDA's format.

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
        # Lists of one id each, so that a sequence is assembled by adding lists.
        self._bos = [tokenizer.bos_id]
        self._eos = [tokenizer.eos_id]
        self._header_start = [self._special_id("<|start_header_id|>")]
        self._header_end = [self._special_id("<|end_header_id|>")]
        self._end_of_turn = [self._special_id(END_OF_TURN)]
        self._roles = {role: tokenizer.encode(role).tolist() for role in ROLES}
        self._gap = tokenizer.encode(_GAP).tolist()

    def prompt(self, messages: Sequence[Message]) -> I64:
        """The ids after which the model writes the next reply to `messages`."""
        ids = list(self._bos)
        for message in messages:
            ids += self._header(message.role)
            ids += self.tokenizer.encode(_GAP + message.content.strip()).tolist()
            ids += self._end_of_turn
        ids += self._header("assistant")
        ids += self._gap
        return np.array(ids, dtype=np.int64)

    def check(self, messages: Sequence[Message]) -> None:
        """Do nothing: this format, unlike a template, can express every conversation."""

    def response(self, content: str) -> str:
        """The text of a reply as it is trained on: stripped of white space at both ends."""
        return content.strip()

    def encode(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[Reply]]]:
        """Encode conversations whose last message is the assistant's.

        Returns:
            Of every conversation the tokens and the replies (see Reply): the history up to the
            header of the last reply, then for every reply the gap before it, its text encoded
            alone, and EOS. With a single reply that is prompt, response, EOS.
        """
        # All texts go through the tokenizer in one call, which uses all cores. `_assemble` takes
        # the encoded texts in the same order: the turns of the history, then the replies.
        texts: list[str] = []
        for messages in conversations:
            texts += [_GAP + message.content.strip() for message in messages[:-1]]
            texts += [
                self.response(message.content)
                for message in messages
                if message.role == "assistant"
            ]
        flat, lengths = self.tokenizer.encode_batch(texts)
        encoded_texts = iter(np.split(flat, np.cumsum(lengths)[:-1]))
        return [self._assemble(messages, encoded_texts) for messages in conversations]

    def _assemble(
        self, messages: Sequence[Message], encoded_texts: Iterator[I64]
    ) -> tuple[list[int], list[Reply]]:
        """Tokens and replies of one conversation; takes its own texts from the iterator."""
        ids = list(self._bos)

        # The history. A reply's prompt ends with the header of that reply.
        history_ends = []
        for message in messages[:-1]:
            ids += self._header(message.role)
            if message.role == "assistant":
                history_ends.append(len(ids))
            ids += next(encoded_texts).tolist()
            ids += self._end_of_turn
        ids += self._header(messages[-1].role)
        history_ends.append(len(ids))

        # The replies, each with the end of its prompt.
        replies = []
        for history_end in history_ends:
            turn_start = len(ids)
            ids += self._gap
            response_start = len(ids)
            ids += next(encoded_texts).tolist()
            ids += self._eos
            replies.append(Reply(history_end, turn_start, response_start, len(ids)))
        return ids, replies

    def _header(self, role: str) -> list[int]:
        return self._header_start + self._roles[role] + self._header_end

    def _special_id(self, token: str) -> int:
        token_id = self.tokenizer.id_of(token)
        if token_id is None:
            raise UserError(
                f"{self.tokenizer.name}: the tokenizer has no {token}, which the chat format needs;"
                f" {_REMEDY}"
            )
        return token_id

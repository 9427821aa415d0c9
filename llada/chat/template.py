"""Any Hugging Face chat template: conversations <-> token ids.

A template is rendered as transformers does it, and its prompt gets the ids that transformers gives
it, with one difference: only what the template itself writes can be a special token, never the text
of a turn. To know which is which, every prompt is rendered twice, with the texts and with stand-ins
for them; a prompt in which the two differ by more than the texts is refused. A reply is encoded
alone and ends with EOS, like those of LLaDA's own format (llada.chat.format).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada.chat.format import TEMPLATE, ChatFormat, Message, Reply
from llada.errors import UserError
from llada.tokenizer import Tokenizer, Unit

I64 = npt.NDArray[np.int64]
Parts = tuple[int | str, ...]
"""A rendered prompt: special tokens' ids, and the texts between them; no two texts are neighbours.
"""

_OPEN, _CLOSE, _PAD = "\ufdd0", "\ufdd1", "\x1f"
"""Around the number of a turn that stands for its text: two code points that are no characters, and
white space that may be trimmed.
"""
_STAND_IN = re.compile(f"({_PAD}?){_OPEN}([0-9]+){_CLOSE}({_PAD}?)")


class TemplateError(UserError):
    """A conversation that a chat template cannot express.

    Args:
        reason: under which it is counted, a plural.
        message: what is wrong with this one.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def chat_format(tokenizer: Tokenizer, template: str | None = None) -> ChatFormat | TemplateFormat:
    """The format of `template`, else of the tokenizer's own chat template, else LLaDA's.

    Raises:
        UserError: a template that cannot be used; LLaDA's format without its special tokens.
    """
    template = tokenizer.chat_template if template is None else template
    return (
        ChatFormat(tokenizer)
        if template in (None, TEMPLATE)
        else TemplateFormat(tokenizer, template)
    )


class TemplateFormat:
    """Encodes conversations with a chat template; see ChatFormat.

    Args:
        tokenizer: of the model.
        template: Jinja, as in tokenizer_config.json.

    Raises:
        UserError: a template that is not valid, is not the same every day, or does not show a
            question.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        self._template = _compiled(template, f"{tokenizer.name}: the chat template")
        self._special = tokenizer.specials
        longest_first = sorted(self._special, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        try:
            self._parts([Message("user", "question")])
        except TemplateError as problem:
            raise UserError(
                f"{tokenizer.name}: the chat template cannot be used: {problem}"
            ) from None
        self._trim = self._trimming_of_replies()

    def check(self, messages: Sequence[Message]) -> None:
        """Raise TemplateError for a conversation with a reply whose prompt the template cannot
        express.
        """
        for place in _places(messages):
            self._parts(messages[:place])

    def prompt(self, messages: Sequence[Message]) -> I64:
        """The ids after which the model writes the next reply to `messages`.
        Raises TemplateError.
        """
        [ids] = self._ids([self._parts(messages)])
        return np.array(ids, dtype=np.int64)

    def response(self, content: str) -> str:
        """The text of a reply that is trained on: without the white space at its ends that the
        template trims.
        """
        left, right = self._trim
        return _trimmed(content, left, right)

    def encode(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[Reply]]]:
        """Tokens and replies of conversations whose last message is the assistant's. Raises
        TemplateError.

        The tokens are the prompt of the last reply, then of every reply that part of its own prompt
        which is not the start of these, its text and EOS.
        """
        places = [_places(messages) for messages in conversations]
        pairs = list(zip(conversations, places, strict=True))
        prompts = iter(
            self._ids([self._parts(messages[:place]) for messages, own in pairs for place in own])
        )
        texts = [self.response(messages[place].content) for messages, own in pairs for place in own]
        flat, lengths = self.tokenizer.encode_batch(texts)
        responses = iter(np.split(flat, np.cumsum(lengths)[:-1]))
        return [self._assemble([next(prompts) for _ in own], responses) for own in places]

    def _assemble(
        self, prompts: list[list[int]], responses: Iterator[I64]
    ) -> tuple[list[int], list[Reply]]:
        history = prompts[-1]
        ids, replies = list(history), []
        for prompt in prompts:
            shared = _shared(prompt, history)
            start = len(ids)
            ids += prompt[shared:]
            middle = len(ids)
            ids += [*next(responses).tolist(), self.tokenizer.eos_id]
            replies.append(Reply(shared, start, middle, len(ids)))
        return ids, replies

    def _ids(self, prompts: Sequence[Parts]) -> list[list[int]]:
        """The ids of prompts; a text between the same special tokens is encoded once, in however
        many prompts it stands.
        """
        rows = [_units(parts) for parts in prompts]
        numbers: dict[Unit, int] = {}
        for row in rows:
            for unit in row:
                if unit is not None:
                    numbers.setdefault(unit, len(numbers))
        encoded = self.tokenizer.encode_between(list(numbers)) if numbers else []
        found = []
        for parts, row in zip(prompts, rows, strict=True):
            ids: list[int] = []
            for part, unit in zip(parts, row, strict=True):
                if unit is not None:
                    ids += encoded[numbers[unit]]
                elif isinstance(part, int):
                    ids.append(part)
            found.append(ids)
        return found

    def _parts(self, messages: Sequence[Message]) -> Parts:
        """The rendered prompt of a reply to `messages`."""
        pieces = self._pieces(messages, add_generation_prompt=True)
        merged: list[int | str] = []
        for text, is_own in pieces:
            for part in self._split(text) if is_own else [text]:
                if isinstance(part, str) and merged and isinstance(merged[-1], str):
                    merged[-1] += part
                elif part != "":
                    merged.append(part)
        if not merged:
            raise TemplateError(
                "conversations that the chat template leaves empty",
                "the chat template writes nothing",
            )
        return tuple(merged)

    def _split(self, literal: str) -> Iterator[int | str]:
        """What the template wrote, at its special tokens."""
        start = 0
        for match in self._names.finditer(literal):
            yield literal[start : match.start()]
            yield self._special[match.group()]
            start = match.end()
        yield literal[start:]

    def _pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[tuple[str, bool]]:
        """The rendered text in pieces, each with whether the template wrote it; the others are the
        turns' texts as it trims them.
        """
        for number, message in enumerate(messages, start=1):
            if _OPEN in message.content or _CLOSE in message.content:
                raise TemplateError(
                    "conversations with U+FDD0 or U+FDD1",
                    f"turn {number} holds U+FDD0 or U+FDD1, which are no characters and stand for"
                    " the turns of a chat template here",
                )
        contents = [message.content for message in messages]
        marked = self._render(
            messages,
            [f"{_PAD}{_OPEN}{i}{_CLOSE}{_PAD}" if text else "" for i, text in enumerate(contents)],
            add_generation_prompt,
        )
        pieces: list[tuple[str, bool]] = []
        seen, start = set(), 0
        for match in _STAND_IN.finditer(marked):
            left, right, place = match[1], match[3], int(match[2])
            seen.add(place)
            pieces += [
                (marked[start : match.start()], True),
                (_trimmed(contents[place], not left, not right), False),
            ]
            start = match.end()
        pieces.append((marked[start:], True))
        dropped = next((i for i, text in enumerate(contents) if text and i not in seen), None)
        if dropped is not None:
            raise TemplateError(
                "conversations with a turn that the chat template leaves out",
                f"the chat template leaves out turn {dropped + 1}, the {messages[dropped].role}'s",
            )
        if "".join(text for text, _ in pieces) != self._render(
            messages, contents, add_generation_prompt
        ):
            raise TemplateError(
                "conversations with text that the chat template changes",
                "the chat template does more to the text of a turn than trim its ends",
            )
        return pieces

    def _render(
        self, messages: Sequence[Message], contents: Sequence[str], add_generation_prompt: bool
    ) -> str:
        turns = [
            {"role": message.role, "content": text}
            for message, text in zip(messages, contents, strict=True)
        ]
        variables: dict[str, Any] = {
            **self.tokenizer.template_variables,
            "messages": turns,
            "tools": None,
            "documents": None,
        }
        try:
            return self._template.render(**variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it may raise anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(
                "conversations that the chat template refuses",
                f"the chat template refuses it: {said}",
            ) from None

    def _trimming_of_replies(self) -> tuple[bool, bool]:
        """Whether the template trims the left and the right end of a reply, as far as it
        shows one.
        """
        talk = [Message("user", "question"), Message("assistant", f"{_PAD}reply{_PAD}")]
        try:
            pieces = self._pieces(talk, add_generation_prompt=False)
        except TemplateError:
            return False, False
        shown = [text for text, is_own in pieces if not is_own][-1]
        return not shown.startswith(_PAD), not shown.endswith(_PAD)


def _places(messages: Sequence[Message]) -> list[int]:
    """Where the replies are."""
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


def _trimmed(text: str, left: bool, right: bool) -> str:
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _shared(first: list[int], second: list[int]) -> int:
    """Length of the start that two lists share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


def _units(parts: Parts) -> list[Unit | None]:
    """For every part the text with its neighbours; None for a special token."""

    def special(index: int) -> int | None:
        part = parts[index] if 0 <= index < len(parts) else None
        return part if isinstance(part, int) else None

    return [
        (special(i - 1), part, special(i + 1)) if isinstance(part, str) else None
        for i, part in enumerate(parts)
    ]


# -- rendering, as transformers does it ------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks replies for other trainers; here it is what it
    encloses.
    """

    tags = {"generation"}  # noqa: RUF012 (as the library wants it)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _compiled(template: str, name: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        tree = environment.parse(template)
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{name} is not valid Jinja: line {error.lineno}: {error.message}"
        ) from None
    except RecursionError:
        raise UserError(f"{name} is nested too deep for Jinja") from None
    asked = meta.find_undeclared_variables(tree)
    if "strftime_now" in asked:
        raise UserError(
            f"{name} calls strftime_now: prompts would change with the day; write a fixed date into"
            " a copy of it"
        )
    if "lipsum" in {node.name for node in tree.find_all(nodes.Name)} or "random" in {
        node.name for node in tree.find_all(nodes.Filter)
    }:
        raise UserError(
            f"{name} draws at random (lipsum, random): its prompts would never be the same"
        )
    if any(node.attr.startswith("_") for node in tree.find_all(nodes.NSRef)):
        raise UserError(
            f"{name} sets an attribute that begins with '_', which transformers refuses"
        )
    return compiled


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own, which escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

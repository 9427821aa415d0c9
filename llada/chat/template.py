"""Any Hugging Face chat template: conversations <-> token ids.

A template is rendered and encoded as transformers does it, with one difference: only what the
template itself writes can be a special token, never the text of a turn.

To tell the two apart, every prompt is rendered twice: with the texts, and with a placeholder for
each. A prompt in which the two differ by more than the texts is refused. A reply is encoded alone
and ends with EOS, like those of LLaDA's own format (llada.chat.format).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jinja2
import numpy as np
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada.arrays import I64
from llada.chat.format import TEMPLATE, ChatFormat, Message, Reply
from llada.errors import UserError, one_line
from llada.tokenizer import TextBetween, Tokenizer

Prompt = tuple[int | str, ...]
"""A rendered prompt: ids of special tokens and the texts between them, never two texts in a row."""

# The placeholder of turn 3 is PAD OPEN "3" CLOSE PAD. OPEN and CLOSE are code points that Unicode
# reserves as non-characters, so sound text does not hold them. PAD counts as white space: where it
# is missing after rendering, the template has stripped that end of the turn.
_OPEN = "\ufdd0"
_CLOSE = "\ufdd1"
_PAD = "\x1f"
_PLACEHOLDER = re.compile(f"({_PAD}?){_OPEN}([0-9]+){_CLOSE}({_PAD}?)")


class RenderedText(NamedTuple):
    """A stretch of a rendered prompt: written by the template, or the text of a turn."""

    text: str
    by_template: bool


class TemplateError(UserError):
    """A conversation that a chat template cannot express.

    Args:
        reason: plural noun under which such conversations are counted.
        message: what is wrong with this one.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def chat_format(tokenizer: Tokenizer, template: str | None = None) -> ChatFormat | TemplateFormat:
    """The format of `template`, or of the tokenizer's own chat template, or LLaDA's.

    Raises:
        UserError: a template that cannot be used, or LLaDA's format without its special tokens.
    """
    if template is None:
        template = tokenizer.chat_template
    if template is None or template == TEMPLATE:
        return ChatFormat(tokenizer)
    return TemplateFormat(tokenizer, template)


class TemplateFormat:
    """Encodes conversations with a chat template; has the methods of ChatFormat.

    Args:
        tokenizer: the model's tokenizer.
        template: Jinja, as in tokenizer_config.json.

    Raises:
        UserError: a template that is not valid, is not the same every day, does not show a
            question, or does not mark who speaks.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        self._template = _compile(template, f"{tokenizer.name}: the chat template")

        # One pattern that matches any special token. Of two tokens with the same start the longer
        # one must match, hence the order. Without tokens, "(?!)" matches nothing.
        self._special_ids = tokenizer.special_ids
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        try:
            self._split_prompt([Message("user", "question")])
        except TemplateError as error:
            raise UserError(
                f"{tokenizer.name}: the chat template cannot be used: {error}"
            ) from None
        self._require_marked_turns()
        self._strips_left, self._strips_right = self._stripped_ends_of_replies()

    # -- what ChatFormat does too ------------------------------------------------------------------

    def check(self, messages: Sequence[Message]) -> None:
        """Raise TemplateError if the template cannot express the prompt of some reply."""
        for index in _reply_indices(messages):
            self._split_prompt(messages[:index])

    def prompt(self, messages: Sequence[Message]) -> I64:
        """The ids after which the model writes the next reply to `messages`.

        Raises:
            TemplateError: the template cannot express them.
        """
        [ids] = self._encode_prompts([self._split_prompt(messages)])
        return np.array(ids, dtype=np.int64)

    def response(self, content: str) -> str:
        """The text of a reply as it is trained on, stripped where the template strips replies."""
        return _strip(content, self._strips_left, self._strips_right)

    def encode(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[Reply]]]:
        """Encode conversations whose last message is the assistant's.

        Returns:
            Of every conversation the tokens and the replies (see Reply): the prompt of the last
            reply, then for every reply the rest of its own prompt, which does not agree with that
            of the last, its text encoded alone, and EOS.

        Raises:
            TemplateError: a conversation that the template cannot express.
        """
        # All prompts and all responses of all conversations go through the tokenizer in one call
        # each, in the order in which they are taken out again below.
        reply_indices = [_reply_indices(messages) for messages in conversations]
        prompts: list[Prompt] = []
        responses: list[str] = []
        for messages, indices in zip(conversations, reply_indices, strict=True):
            for index in indices:
                prompts.append(self._split_prompt(messages[:index]))
                responses.append(self.response(messages[index].content))
        encoded_prompts = iter(self._encode_prompts(prompts))
        flat, lengths = self.tokenizer.encode_batch(responses)
        encoded_responses = iter(np.split(flat, np.cumsum(lengths)[:-1]))

        return [
            self._assemble([next(encoded_prompts) for _ in indices], encoded_responses)
            for indices in reply_indices
        ]

    def _assemble(
        self, prompts: list[list[int]], encoded_responses: Iterator[I64]
    ) -> tuple[list[int], list[Reply]]:
        """Tokens and replies of one conversation from the prompts of its replies."""
        history = prompts[-1]
        ids = list(history)
        replies = []
        for prompt in prompts:
            # Usually a prompt is the start of the last one, but for the header of its reply.
            history_end = _common_prefix(prompt, history)
            turn_start = len(ids)
            ids += prompt[history_end:]
            response_start = len(ids)
            ids += next(encoded_responses).tolist()
            ids.append(self.tokenizer.eos_id)
            replies.append(Reply(history_end, turn_start, response_start, len(ids)))
        return ids, replies

    # -- from text to ids --------------------------------------------------------------------------

    def _encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of prompts.

        The prompts of one conversation share most of their texts, so a text between the same
        special tokens is encoded once.
        """
        rows = [_texts_in_context(prompt) for prompt in prompts]
        distinct: dict[TextBetween, int] = {}
        for row in rows:
            for text in row:
                if text is not None:
                    distinct.setdefault(text, len(distinct))
        encoded: list[list[int]] = []
        if distinct:
            encoded = self.tokenizer.encode_between(list(distinct))

        all_ids = []
        for prompt, row in zip(prompts, rows, strict=True):
            ids: list[int] = []
            for part, text in zip(prompt, row, strict=True):
                if text is not None:
                    ids += encoded[distinct[text]]
                elif isinstance(part, int):
                    ids.append(part)
            all_ids.append(ids)
        return all_ids

    def _split_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Render the prompt of a reply to `messages`, and split it at the special tokens."""
        merged: list[int | str] = []
        for text, by_template in self._render_parts(messages, add_generation_prompt=True):
            # The text of a turn stays whole: a special token that it spells is ordinary text.
            parts = self._split_at_specials(text) if by_template else [text]
            for part in parts:
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

    def _split_at_specials(self, text: str) -> Iterator[int | str]:
        """The special tokens in a text of the template, as ids, and what is between them."""
        start = 0
        for match in self._any_special.finditer(text):
            yield text[start : match.start()]
            yield self._special_ids[match.group()]
            start = match.end()
        yield text[start:]

    # -- rendering ---------------------------------------------------------------------------------

    def _render_parts(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[RenderedText]:
        """Render a conversation, with what the template writes and the texts of turns kept apart.

        Raises:
            TemplateError: a turn whose text is missing, or is changed by more than stripping.
        """
        for number, message in enumerate(messages, start=1):
            if _OPEN in message.content or _CLOSE in message.content:
                raise TemplateError(
                    "conversations with U+FDD0 or U+FDD1",
                    f"turn {number} contains U+FDD0 or U+FDD1, which are not characters and"
                    " stand for the turns of a chat template here",
                )
        contents = [message.content for message in messages]
        # An empty text stays empty: templates may treat it specially.
        placeholders = [
            f"{_PAD}{_OPEN}{i}{_CLOSE}{_PAD}" if text else "" for i, text in enumerate(contents)
        ]
        rendered = self._render(messages, placeholders, add_generation_prompt)

        # Cut the rendered text at the placeholders, and put the texts in their place.
        parts: list[RenderedText] = []
        shown = set()
        start = 0
        for match in _PLACEHOLDER.finditer(rendered):
            pad_before, turn, pad_after = match[1], int(match[2]), match[3]
            shown.add(turn)
            parts.append(RenderedText(rendered[start : match.start()], by_template=True))
            text = _strip(contents[turn], left=not pad_before, right=not pad_after)
            parts.append(RenderedText(text, by_template=False))
            start = match.end()
        parts.append(RenderedText(rendered[start:], by_template=True))

        for turn, message in enumerate(messages):
            if message.content and turn not in shown:
                raise TemplateError(
                    "conversations with a turn that the chat template leaves out",
                    f"the chat template leaves out turn {turn + 1}, the {message.role}'s",
                )
        # The proof: the parts must add up to what the template makes of the real texts.
        whole = self._render(messages, contents, add_generation_prompt)
        if "".join(part.text for part in parts) != whole:
            raise TemplateError(
                "conversations with text that the chat template changes",
                "the chat template does more to the text of a turn than trim its ends",
            )
        return parts

    def _render(
        self, messages: Sequence[Message], contents: Sequence[str], add_generation_prompt: bool
    ) -> str:
        """Render the roles of `messages` with other `contents`."""
        turns = [
            {"role": message.role, "content": text}
            for message, text in zip(messages, contents, strict=True)
        ]
        try:
            return self._template.render(
                **self.tokenizer.template_variables,
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = one_line(error) or type(error).__name__
            raise TemplateError(
                "conversations that the chat template refuses",
                f"the chat template refuses it: {reason}",
            ) from None

    def _require_marked_turns(self) -> None:
        """Raise UserError if nothing but plain text, the same for all turns, separates them.

        A model could not tell a question from an answer. Special tokens are enough, as in
        "question EOS answer EOS", where turns alternate.
        """
        messages = [
            Message("user", "first question"),
            Message("assistant", "first answer"),
            Message("user", "second question"),
        ]
        try:
            parts = self._render_parts(messages, add_generation_prompt=False)
        except TemplateError:
            return  # not a template of several turns
        texts = [index for index, part in enumerate(parts) if not part.by_template]
        if len(texts) != len(messages):
            return
        before_answer, before_question = (
            "".join(part.text for part in parts[start + 1 : stop])
            for start, stop in itertools.pairwise(texts)
        )
        if before_answer == before_question and not self._any_special.search(before_answer):
            raise UserError(
                f"{self.tokenizer.name}: the chat template does not mark who speaks: before an"
                f" answer stands {before_answer!r}, as before a question"
            )

    def _stripped_ends_of_replies(self) -> tuple[bool, bool]:
        """Whether the template strips the left and the right end of a reply.

        (False, False) if it does not show a reply at all.
        """
        messages = [Message("user", "question"), Message("assistant", f"{_PAD}reply{_PAD}")]
        try:
            parts = self._render_parts(messages, add_generation_prompt=False)
        except TemplateError:
            return False, False
        reply = [part.text for part in parts if not part.by_template][-1]
        return not reply.startswith(_PAD), not reply.endswith(_PAD)


def _reply_indices(messages: Sequence[Message]) -> list[int]:
    """The indices of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message.role == "assistant"]


def _strip(text: str, left: bool, right: bool) -> str:
    if left:
        text = text.lstrip()
    if right:
        text = text.rstrip()
    return text


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix of two lists."""
    shorter = min(len(first), len(second))
    # The usual case, as one comparison in C.
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])


def _texts_in_context(prompt: Prompt) -> list[TextBetween | None]:
    """For every part of a prompt the text with the special tokens beside it; None for an id."""
    texts: list[TextBetween | None] = []
    for i, part in enumerate(prompt):
        if isinstance(part, int):
            texts.append(None)
        else:
            texts.append(TextBetween(_id_at(prompt, i - 1), part, _id_at(prompt, i + 1)))
    return texts


def _id_at(prompt: Prompt, index: int) -> int | None:
    """The special token at `index`, None beyond both ends."""
    if not 0 <= index < len(prompt):
        return None
    part = prompt[index]
    assert isinstance(part, int), "the neighbors of a text are special tokens"
    return part


# -- rendering, as transformers does it ------------------------------------------------------------


class _Generation(Extension):
    """Jinja tag `{% generation %}...{% endgeneration %}`, replaced by what it encloses.

    transformers uses the tag to mark replies for other trainers.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja reads a class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _compile(template: str, name: str) -> jinja2.Template:
    """Compile a template.

    Raises:
        UserError: not valid Jinja, or a template whose prompts could differ between two renderings
            or from those of transformers.
    """
    # The options are those of transformers: they decide where line breaks of the template end up.
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

    if "strftime_now" in meta.find_undeclared_variables(tree):
        raise UserError(
            f"{name} calls strftime_now: prompts would change with the day; write a fixed date into"
            " a copy of it"
        )
    names = {node.name for node in tree.find_all(nodes.Name)}
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    if "lipsum" in names or "random" in filters:
        raise UserError(
            f"{name} draws at random (lipsum, random): its prompts would differ every time"
        )
    if any(node.attr.startswith("_") for node in tree.find_all(nodes.NSRef)):
        raise UserError(
            f"{name} sets an attribute that begins with '_', which transformers refuses"
        )
    return compiled


def _raise_exception(message: str) -> None:
    """The function `raise_exception` of templates."""
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of templates. Jinja's own escapes characters for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

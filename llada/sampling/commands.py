"""`llada sample` and `llada infill`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from llada.chat.format import Message
from llada.chat.template import chat_format
from llada.errors import UserError
from llada.sampling.diffusion import SamplingOptions, cut_at_end, generate
from llada.sampling.diffusion import infill as fill
from llada.sampling.gaps import parse
from llada.sampling.models import Sampler, load
from llada.sampling.show import Playback


def sample(path: str, prompt: str, chat: bool, options: SamplingOptions, show: bool = False) -> str:
    """What the model at `path` writes after a prompt, or answers with `chat`; up to its EOS or the
    end of its turn.

    A question is put into the chat template that the model's tokenizer has, else into LLaDA's
    format.

    Raises UserError for a model that cannot be used and, with `chat`, a chat template that cannot
    be used or a tokenizer without the tokens of LLaDA's format.
    """
    return write(load(path), prompt, chat, options, show)[0]


def write(
    model: Sampler, prompt: str, chat: bool, options: SamplingOptions, show: bool = False
) -> tuple[str, bool]:
    """The text, and whether it ends with EOS or the end of a turn."""
    tokenizer = model.tokenizer
    _check_text(prompt, "PROMPT")
    ids = (
        chat_format(tokenizer).prompt([Message("user", prompt)])
        if chat
        else tokenizer.encode(prompt)
    )
    player = Playback(tokenizer, model.specials.mask_id, len(ids)) if show else nullcontext()
    with _enough_memory(model, len(ids) + options.length), player as playback:
        out = generate(
            model, torch.from_numpy(ids)[None].to(model.device), model.specials, options, playback
        )[0].tolist()
    text = cut_at_end(out, model.end_ids)
    return tokenizer.decode(text, skip_special_tokens=True), len(text) < len(out)


def infill(
    path: str, text: str, options: SamplingOptions, one_a_token: bool = False, show: bool = False
) -> str:
    """The text with its gaps filled by the model at `path`.

    Args:
        path: of the model.
        text: with gaps, see `llada.sampling.gaps`.
        options: length and block_length are not used.
        one_a_token: take as many steps as there are tokens to fill, whatever options.steps says.
        show: play it.

    Raises:
        UserError: a model that cannot be used, a text without a gap.
    """
    return fill_gaps(load(path), text, options, one_a_token, show)


def fill_gaps(
    model: Sampler,
    text: str,
    options: SamplingOptions,
    one_a_token: bool = False,
    show: bool = False,
) -> str:
    """The text with its gaps filled."""
    _check_text(text, "TEXT")
    gapped = parse(text, model.tokenizer)
    if one_a_token:
        options = replace(
            options,
            steps=sum(end - start for start, end in gapped.spans),
            length=gapped.tokens.shape[1],
        )
    length = gapped.tokens.shape[1]
    player = Playback(model.tokenizer, model.specials.mask_id) if show else nullcontext()
    with _enough_memory(model, length), player as playback:
        filled = fill(model, gapped.tokens.to(model.device), model.specials, options, playback)[
            0
        ].tolist()
    return model.tokenizer.decode(filled, skip_special_tokens=True)


def _check_text(text: str, setting: str) -> None:
    """Raises UserError for what the terminal could not decode, which Python keeps as lone
    surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{setting}: not UTF-8 at character {error.start + 1}") from None


@contextmanager
def _enough_memory(model: Sampler, length: int) -> Iterator[None]:
    """Say how long a text is where that matters: longer than the training's, or too long for the
    memory of the device.
    """
    if length > model.longest:
        print(
            f"note: {length} tokens are more than the {model.longest} that the model was"
            " trained on",
            file=sys.stderr,
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError.
        if not isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) and "not enough memory" not in str(error):
            raise
        raise UserError(
            f"MODEL: a text of {length} tokens does not fit into the memory of {model.device};"
            " shorten it"
        ) from None

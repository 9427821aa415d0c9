"""`llada sample` and `llada infill`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace

import torch

from llada.chat import Message
from llada.chat_template import chat_format
from llada.sampling.diffusion import SamplingOptions, cut_at_end, generate
from llada.sampling.diffusion import infill as fill
from llada.sampling.gaps import parse
from llada.sampling.models import Sampler, load
from llada.sampling.show import Playback


def sample(path: str, prompt: str, chat: bool, options: SamplingOptions, show: bool = False) -> str:
    """What the model at `path` writes after a prompt, or answers with `chat`; up to its EOS or the end of its turn.

    A question is put into the chat template that the model's tokenizer has, else into LLaDA's format.

    Raises UserError for a model that cannot be used and, with `chat`, a chat template that cannot be used or a tokenizer without the
    tokens of LLaDA's format.
    """
    return write(load(path), prompt, chat, options, show)[0]


def write(model: Sampler, prompt: str, chat: bool, options: SamplingOptions, show: bool = False) -> tuple[str, bool]:
    """The text, and whether it ends with EOS or the end of a turn."""
    tokenizer = model.tokenizer
    ids = chat_format(tokenizer).prompt([Message("user", prompt)]) if chat else tokenizer.encode(prompt)
    _note_if_long(model, len(ids) + options.length)
    with Playback(tokenizer, model.specials.mask_id, len(ids)) if show else nullcontext() as playback:
        out = generate(model, torch.from_numpy(ids)[None].to(model.device), model.specials, options, playback)[0].tolist()
    text = cut_at_end(out, model.end_ids)
    return tokenizer.decode(text), len(text) < len(out)


def infill(path: str, text: str, options: SamplingOptions, one_a_token: bool = False, show: bool = False) -> str:
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


def fill_gaps(model: Sampler, text: str, options: SamplingOptions, one_a_token: bool = False, show: bool = False) -> str:
    """The text with its gaps filled."""
    gapped = parse(text, model.tokenizer)
    if one_a_token:
        options = replace(options, steps=sum(end - start for start, end in gapped.spans), length=gapped.tokens.shape[1])
    _note_if_long(model, gapped.tokens.shape[1])
    with Playback(model.tokenizer, model.specials.mask_id) if show else nullcontext() as playback:
        return model.tokenizer.decode(fill(model, gapped.tokens.to(model.device), model.specials, options, playback)[0].tolist())


def _note_if_long(model: Sampler, length: int) -> None:
    if length > model.longest:
        print(f"note: {length} tokens are more than the {model.longest} that the model was trained on", file=sys.stderr)

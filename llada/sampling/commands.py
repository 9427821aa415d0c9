"""The commands `llada sample` and `llada infill`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from llada.chat.format import Message
from llada.chat.template import chat_format
from llada.errors import UserError
from llada.sampling import diffusion
from llada.sampling.autoregressive import CausalModel, check_options
from llada.sampling.diffusion import SamplingOptions, cut_at_end
from llada.sampling.infilling import parse
from llada.sampling.loading import MaskPredictor, load, load_writer
from llada.sampling.playback import Playback


def sample(path: str, prompt: str, chat: bool, options: SamplingOptions, show: bool = False) -> str:
    """Continue a prompt, or answer it.

    Args:
        path: Model; see `llada.sampling.loading.load`.
        prompt: A text to continue, or with `chat` a question.
        chat: Put the prompt into the chat template of the model's tokenizer, or LLaDA's if it has
            none.
        options: See SamplingOptions.
        show: Show every step.

    Returns:
        The text up to its EOS or the end of the turn.

    Raises:
        UserError: A model that cannot be used; with `chat`, a chat template that cannot be used or
            a tokenizer without the tokens of LLaDA's format.
    """
    text, _ = write(load_writer(path), prompt, chat, options, show)
    return text


def write(
    model: MaskPredictor | CausalModel,
    prompt: str,
    chat: bool,
    options: SamplingOptions,
    show: bool = False,
) -> tuple[str, bool]:
    """As `sample`; return the text, and whether it ends with EOS or the end of a turn."""
    tokenizer = model.tokenizer
    _check_text(prompt, "PROMPT")
    if chat:
        ids = chat_format(tokenizer).prompt([Message("user", prompt)])
    else:
        ids = tokenizer.encode(prompt)
    if isinstance(model, CausalModel):
        if show:
            raise UserError("--show: this model writes from left to right, without denoising")
        check_options(options)
        with _check_length(model, len(ids) + options.length):
            response = model.write(ids.tolist(), options)
    else:
        tokens = torch.from_numpy(ids)[None].to(model.device)
        player = Playback(tokenizer, model.special_ids.mask_id, len(ids)) if show else nullcontext()
        with _check_length(model, len(ids) + options.length), player as on_step:
            out = diffusion.generate(model, tokens, model.special_ids, options, on_step)
        response = out[0].tolist()
    before_end = cut_at_end(response, model.end_ids)
    text = tokenizer.decode(before_end, skip_special_tokens=True)
    return text, len(before_end) < len(response)


def infill(
    path: str,
    text: str,
    options: SamplingOptions,
    show: bool = False,
) -> str:
    """Fill the gaps of a text.

    Args:
        path: Model; see `llada.sampling.loading.load`.
        text: Text with gaps; see `llada.sampling.infilling`.
        options: `length` and `block_length` are not used. Without `steps`, one per token to fill.
        show: Show every step.

    Raises:
        UserError: A model that cannot be used, or a text without a gap.
    """
    return fill_gaps(load(path), text, options, show)


def fill_gaps(
    model: MaskPredictor,
    text: str,
    options: SamplingOptions,
    show: bool = False,
) -> str:
    """As `infill`, with a loaded model."""
    tokenizer = model.tokenizer
    _check_text(text, "TEXT")
    parsed = parse(text, tokenizer)
    length = parsed.tokens.shape[1]
    if options.steps is None:
        num_masks = sum(end - start for start, end in parsed.spans)
        # The options require steps and length to fit together, though length is not used.
        options = replace(options, steps=num_masks, length=length)
    tokens = parsed.tokens.to(model.device)
    player = Playback(tokenizer, model.special_ids.mask_id) if show else nullcontext()
    with _check_length(model, length), player as on_step:
        filled = diffusion.infill(model, tokens, model.special_ids, options, on_step)
    return tokenizer.decode(filled[0].tolist(), skip_special_tokens=True)


def _check_text(text: str, setting: str) -> None:
    """Raise UserError for bytes that are not UTF-8, which Python decodes as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{setting}: not UTF-8 at character {error.start + 1}") from None


@contextmanager
def _check_length(model: MaskPredictor | CausalModel, length: int) -> Iterator[None]:
    """Warn about a text longer than in training, and name the length if memory runs out."""
    if length > model.max_sequence_length:
        print(
            f"note: {length} tokens are more than the {model.max_sequence_length} that the model"
            " was trained on",
            file=sys.stderr,
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError.
        out_of_memory = isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) or "not enough memory" in str(error)
        if not out_of_memory:
            raise
        raise UserError(
            f"MODEL: a text of {length} tokens does not fit into the memory of {model.device};"
            " shorten it"
        ) from None

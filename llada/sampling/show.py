"""Denoising on a terminal, step by step."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from llada.sampling.diffusion import Event
from llada.tokenizer import Tokenizer

_GAP = "▒"


class Playback:
    """Draws the canvas after every step: what is written, what this step wrote, and what is still
    hidden.

    On a terminal the picture is replaced in place, elsewhere every step is a line.

    Args:
        tokenizer: of the model.
        mask_id: of [MASK].
        first: position from which on to show, in tokens.
        seconds: shortest time a picture stays.
    """

    def __init__(
        self, tokenizer: Tokenizer, mask_id: int, first: int = 0, seconds: float = 0.05
    ) -> None:
        self._tokenizer, self._mask_id, self._first, self._seconds = (
            tokenizer,
            mask_id,
            first,
            seconds,
        )
        self._live: Any = None

    def __call__(self, event: Event) -> None:
        from rich.text import Text

        text = Text()
        for piece, style in self.pieces(event.tokens[0], event.committed[0]):
            text.append(piece, style)
        title = f"step {event.step}/{event.steps}"
        if self._live is None:
            print(f"{title}: {' '.join(text.plain.split())}", flush=True)
            return
        from rich.panel import Panel

        self._live.update(Panel(text, title=title, title_align="left"), refresh=True)
        time.sleep(self._seconds)

    def pieces(self, tokens: torch.Tensor, committed: torch.Tensor) -> list[tuple[str, str]]:
        """(text, style) of runs of hidden, new and older tokens; what follows EOS is left out where
        it is EOS too.
        """
        ids, new = tokens.tolist()[self._first :], committed.tolist()[self._first :]
        runs: list[tuple[str, list[int]]] = []
        for token_id, fresh in zip(ids, new, strict=True):
            style = "dim" if token_id == self._mask_id else "bold green" if fresh else ""
            if not runs or runs[-1][0] != style:
                runs.append((style, []))
            runs[-1][1].append(token_id)
        return [
            (_GAP * len(run) if style == "dim" else self._decode(run), style) for style, run in runs
        ]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def __enter__(self) -> Playback:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

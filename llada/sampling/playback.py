"""Shows the steps of a denoising on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

from llada.sampling.diffusion import DenoisingStep
from llada.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.live import Live

_HIDDEN = "▒"
# Styles of rich
_HIDDEN_STYLE = "dim"
_NEW_STYLE = "bold green"
_OLD_STYLE = ""


class Playback:
    """Draws the text after every step: written tokens, those of this step, and hidden ones.

    On a terminal each picture replaces the last one. Elsewhere every step is a line.

    Args:
        tokenizer: Tokenizer of the model.
        mask_id: Id of [MASK].
        first: First position to show, in tokens.
        seconds: How long each picture stays at least.
    """

    def __init__(
        self, tokenizer: Tokenizer, mask_id: int, first: int = 0, seconds: float = 0.05
    ) -> None:
        self._tokenizer = tokenizer
        self._mask_id = mask_id
        self._first = first
        self._seconds = seconds
        self._live: Live | None = None

    def __call__(self, step: DenoisingStep) -> None:
        from rich.text import Text

        text = Text()
        for run, style in self.styled_runs(step.tokens[0], step.committed[0]):
            text.append(run, style)
        title = f"step {step.number}/{step.total}"
        if self._live is None:
            print(f"{title}: {' '.join(text.plain.split())}", flush=True)
            return
        from rich.panel import Panel

        self._live.update(Panel(text, title=title, title_align="left"), refresh=True)
        time.sleep(self._seconds)

    def styled_runs(self, tokens: torch.Tensor, committed: torch.Tensor) -> list[tuple[str, str]]:
        """Split the text into runs of hidden, new and older tokens.

        Args:
            tokens: int64 [s].
            committed: bool [s], the tokens of this step.

        Returns:
            (text, style) of each run, without special tokens.
        """
        token_ids = tokens.tolist()[self._first :]
        is_new = committed.tolist()[self._first :]
        runs: list[tuple[str, list[int]]] = []
        for token_id, new in zip(token_ids, is_new, strict=True):
            style = _NEW_STYLE if new else _OLD_STYLE
            if token_id == self._mask_id:
                style = _HIDDEN_STYLE
            if not runs or runs[-1][0] != style:
                runs.append((style, []))
            runs[-1][1].append(token_id)
        styled = []
        for style, run in runs:
            if style == _HIDDEN_STYLE:
                text = _HIDDEN * len(run)
            else:
                text = self._tokenizer.decode(run, skip_special_tokens=True)
            styled.append((text, style))
        return styled

    def __enter__(self) -> Playback:
        if sys.stdout.isatty():
            from rich.live import Live

            # Refreshed by each step, not by a timer.
            self._live = Live(auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

"""Lengths of the replies of a corpus of conversations, as a table for `llada data inspect`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS
from llada.data.shard_format import prompt_tokens

SEQUENCE_LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Common sequence lengths; the report says how many replies fit into each."""


def format_reply_lengths(corpus: Corpus) -> list[str]:
    """Return the lines of a table of the replies of both splits; none for a corpus of text.

    The table shows the lengths of prompts, of responses (EOS included) and of both together, and
    the share of the replies that fit common sequence lengths.
    """
    if corpus.manifest.kind != CONVERSATIONS or not corpus.manifest.shards:
        return []
    replies = np.concatenate([corpus.replies(entry) for entry in corpus.manifest.shards])
    _, _, _, response_start, turn_end = replies.T
    prompts = prompt_tokens(replies)
    responses = turn_end - response_start
    totals = prompts + responses
    shares = []
    for length in SEQUENCE_LENGTHS:
        share = float(np.mean(totals <= length))
        shares.append(f"{length:,}: {100 * share:.1f} %")
    return [
        "",
        f"lengths in tokens of {len(totals):,} replies:",
        f"  {'':<9} {'mean':>9} {'median':>9} {'p90':>9} {'p99':>9} {'max':>9}",
        _format_lengths("prompt", prompts),
        _format_lengths("response", responses),
        _format_lengths("both", totals),
        f"replies that fit with their prompt into a row of {', '.join(shares)}",
    ]


def _format_lengths(name: str, lengths: npt.NDArray[np.int64]) -> str:
    # The quantiles are lengths that occur: the smallest that this share of the replies do not
    # exceed.
    quantiles = np.quantile(lengths, (0.5, 0.9, 0.99), method="inverted_cdf")
    values = "".join(f" {value:>9,}" for value in (*quantiles.tolist(), int(lengths.max())))
    return f"  {name:<9} {lengths.mean():>9,.1f}{values}"

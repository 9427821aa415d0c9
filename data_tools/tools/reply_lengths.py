"""How long the replies of a corpus of conversations are, as text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS

SEQUENCE_LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Of which it is said how many replies fit."""


def length_statistics(corpus: Corpus) -> list[str]:
    """A table of the tokens of prompts, responses (their EOS counted) and both, over the replies of
    both splits, and the share of the replies that fit usual sequence lengths; nothing for a corpus
    of text.
    """
    if corpus.manifest.kind != CONVERSATIONS or not corpus.manifest.shards:
        return []
    rows = np.concatenate([corpus.replies(entry)[:, 1:] for entry in corpus.manifest.shards])
    history_end, turn_start, response_start, turn_end = rows.T
    prompts, responses = history_end + response_start - turn_start, turn_end - response_start
    totals = prompts + responses
    shares = [
        f"{length:,}: {100 * float(np.mean(totals <= length)):.1f} %" for length in SEQUENCE_LENGTHS
    ]
    return [
        "",
        f"lengths in tokens of {len(rows):,} replies:",
        f"  {'':<9} {'mean':>9} {'median':>9} {'p90':>9} {'p99':>9} {'max':>9}",
        *(
            _row(name, lengths)
            for name, lengths in (("prompt", prompts), ("response", responses), ("both", totals))
        ),
        f"replies that fit with their prompt into a row of {', '.join(shares)}",
    ]


def _row(name: str, lengths: npt.NDArray[np.int64]) -> str:
    """Quantiles are lengths that occur: the smallest that at least so many of the replies do not
    exceed.
    """
    quantiles = np.quantile(lengths, (0.5, 0.9, 0.99), method="inverted_cdf")
    values = "".join(f" {value:>9,}" for value in (*quantiles.tolist(), int(lengths.max())))
    return f"  {name:<9} {lengths.mean():>9,.1f}{values}"

"""`llada data verify`: check a prepared corpus, its copy of the tokenizer included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_tools.job.options import MAX_WORKERS, check_count
from llada.data.corpus import Corpus
from llada.data.manifest import Manifest, ShardEntry
from llada.data.verify import verify_corpus
from llada.errors import UserError


def verify_prepared_corpus(
    folder: str | Path, workers: int = 1, progress: Callable[[ShardEntry], object] = lambda _: None
) -> list[str]:
    """Return everything that is wrong with a prepared corpus, one line each; empty if it is valid.

    Args:
        folder: folder of the corpus.
        workers: number of shards that are checked at the same time.
        progress: called with the entry of each shard when it is done.

    Raises:
        UserError: the number of workers is not allowed.
    """
    check_count("--workers", workers, MAX_WORKERS)
    problems = verify_corpus(folder, workers=workers, progress=progress)
    try:
        manifest = Manifest.load(folder)
    except UserError:
        return problems  # `verify_corpus` has reported it
    # Corpus.open would stop at the first file of a wrong size.
    try:
        Corpus(Path(folder), manifest).tokenizer()
    except UserError as error:
        problems.append(str(error))
    return problems

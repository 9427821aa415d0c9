"""What a prepared corpus holds, as numbers, text and a picture, and whether it is sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.job.finish import summary
from data_tools.job.options import MAX_WORKERS, check_count
from data_tools.tools.reply_lengths import length_statistics
from llada.data.corpus import SPLITS, Corpus, Manifest, Shards, verify_corpus
from llada.data.shards import ShardEntry
from llada.errors import UserError
from llada.files import new_file
from llada.tokenizer import Tokenizer

I32 = npt.NDArray[np.int32]

_BAR = 40
_SHOWN_TOKENS = 40
_EXACT_DOCUMENTS = 1 << 22
_BLOCK = 1 << 10


# -- statistics ------------------------------------------------------------------------------------


def statistics(
    corpus: Corpus,
    samples: int = 3,
    sequence_length: int | None = None,
    exact: int = _EXACT_DOCUMENTS,
) -> dict[str, Any]:
    """Numbers of every split that has documents, ready for JSON.

    Args:
        corpus: opened.
        samples: documents of each split whose start is decoded.
        sequence_length: L; then windows of L tokens and the tokens that lie in no window are
            counted too.
        exact: documents of a split up to which the length of every one is read; of more, lengths
            are those of about as many, in blocks evenly over the split. Counts, tokens, bytes and
            means are always exact.

    Raises:
        UserError: a damaged corpus, a sequence length less than 1.
    """
    if sequence_length is not None and sequence_length < 1:
        raise UserError(f"--sequence-length: {sequence_length} is less than 1")
    manifest = corpus.manifest
    tokenizer = corpus.tokenizer()
    splits: dict[str, Any] = {}
    for split in SPLITS:
        if manifest.of(split):
            splits[split] = _of_split(corpus, split, sequence_length, exact)
            splits[split]["samples"] = _samples(corpus.shards(split), samples, tokenizer)
    return {
        "folder": str(corpus.folder),
        "kind": manifest.kind,
        "format_version": manifest.format_version,
        "dtype": manifest.dtype,
        "source_files": len(manifest.sources),
        "tokenizer": {
            name: getattr(manifest, name)
            for name in ("vocab_size", "rows", "mask_id", "eos_id", "tokenizer_fingerprint")
        },
        "skipped": manifest.skipped,
        "splits": splits,
    }


def _of_split(
    corpus: Corpus, split: str, sequence_length: int | None, exact: int
) -> dict[str, Any]:
    documents, tokens, text_bytes = corpus.manifest.totals(split)
    entries = corpus.manifest.of(split)
    lengths = sampled_lengths(corpus.shards(split), exact)
    counts = np.bincount(np.floor(np.log2(lengths)).astype(np.int64))
    found = {
        "shards": len(entries),
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "replies": sum(entry.replies for entry in entries),
        "lengths": {
            "documents_read": len(lengths),
            "mean": tokens / documents,
            **{
                name: int(np.percentile(lengths, q, method="inverted_cdf"))
                for name, q in (("median", 50), ("p90", 90), ("p99", 99))
            },
            "max": int(lengths.max()),
            "histogram": [
                {"from": 2**power, "to": 2 ** (power + 1) - 1, "documents": int(counts[power])}
                for power in range(int(np.argmax(counts > 0)), len(counts))
            ],
        },
    }
    if sequence_length is not None:
        tail = sum(entry.tokens % sequence_length for entry in entries)
        windows = sum(entry.tokens // sequence_length for entry in entries)
        found["windows"] = {
            "sequence_length": sequence_length,
            "windows": windows,
            "tail_tokens": tail,
            "tail_share": tail / tokens,
        }
    return found


def sampled_lengths(shards: Shards, exact: int) -> I32:
    """Lengths of all documents, or of about `exact` in blocks of neighbours at even
    distances [n].
    """
    firsts = np.cumsum([0, *(entry.documents for entry in shards.entries)])
    total = int(firsts[-1])
    if total <= exact:
        return np.concatenate([shard.lengths[:] for shard in shards])
    blocks = []
    count = max(1, exact // _BLOCK)
    for number in range(count):
        # about the middle of every stretch
        start = (2 * number + 1) * total // (2 * count) - _BLOCK // 2
        i = int(np.searchsorted(firsts, start, side="right")) - 1
        blocks.append(shards[i].lengths[start - firsts[i] : start - firsts[i] + _BLOCK])
    return np.concatenate(blocks)


def _samples(shards: Shards, samples: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The start of documents at even distances."""
    total = sum(entry.documents for entry in shards.entries)
    chosen = np.linspace(0, total - 1, num=min(samples, total)).astype(np.int64).tolist()
    return [
        {"document": number, "start": tokenizer.decode(_start_of(shards, number))}
        for number in chosen
    ]


def _start_of(shards: Shards, number: int) -> npt.NDArray[np.int64]:
    """The first tokens of a document, counted over all shards."""
    for shard in shards:
        if number < shard.num_documents:
            start = int(shard.pointers[number]) // shard.dtype.itemsize
            return shard.tokens(start, start + min(int(shard.lengths[number]), _SHOWN_TOKENS))
        number -= shard.num_documents
    raise IndexError(number)


# -- as text, as a picture -------------------------------------------------------------------------


def describe(folder: str | Path, samples: int = 3, sequence_length: int | None = None) -> str:
    """`statistics` for people. Raises UserError for an unsound folder."""
    corpus = Corpus.open(folder)
    return as_text(statistics(corpus, samples, sequence_length), corpus)


def as_text(found: dict[str, Any], corpus: Corpus) -> str:
    """What `statistics` found, in lines."""
    ids = found["tokenizer"]
    lines = [
        (
            f"{found['folder']}: format {found['format_version']}, {found['dtype']},"
            f" {found['source_files']:,} source files"
        ),
        (
            f"tokenizer: {ids['vocab_size']:,} ids, {ids['rows']:,} rows, mask {ids['mask_id']},"
            f" EOS {ids['eos_id']}"
        ),
        summary(corpus.manifest),
    ]
    for split, numbers in found["splits"].items():
        lines += ["", *_split_lines(split, numbers)]
    return "\n".join([*lines, *length_statistics(corpus)])


def _split_lines(split: str, numbers: dict[str, Any]) -> list[str]:
    lengths = numbers["lengths"]
    read, documents = lengths["documents_read"], numbers["documents"]
    sampled = "" if read == documents else f", of {read:,} of the {documents:,} documents"
    lines = [
        f"{split}: documents by length in tokens, EOS counted{sampled}",
        (
            f"  mean {lengths['mean']:,.1f}, median {lengths['median']:,}, 90 % up to"
            f" {lengths['p90']:,}, 99 % up to {lengths['p99']:,}, longest {lengths['max']:,}"
        ),
    ]
    highest = max(bar["documents"] for bar in lengths["histogram"])
    for bar in lengths["histogram"]:
        count = bar["documents"]
        lines.append(
            f"  {bar['from']:>9,} to {bar['to']:<9,} {count:>11,}"
            f" {'#' * max(int(count > 0), round(_BAR * count / highest))}".rstrip()
        )
    if "windows" in numbers:
        windows = numbers["windows"]
        lines.append(
            f"{split}: {windows['windows']:,} windows of {windows['sequence_length']:,} tokens;"
            f" {windows['tail_tokens']:,} tokens ({windows['tail_share']:.2%}) lie in the tails of"
            " shards"
        )
    return lines + [
        f"{split} document {sample['document']}: {sample['start']!r}"
        for sample in numbers["samples"]
    ]


def draw(found: dict[str, Any], path: str | Path) -> None:
    """A picture (PNG) of the length histograms. It replaces a file of that name. Raises UserError
    for another suffix or no such folder.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"--png: '{path}' does not end with .png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    splits = found["splits"]
    figure = Figure(figsize=(8, 3.2 * len(splits)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (split, numbers) in zip(
        figure.subplots(len(splits), squeeze=False)[:, 0], splits.items(), strict=True
    ):
        bars = numbers["lengths"]["histogram"]
        axes.bar(
            [bar["from"] for bar in bars],
            [bar["documents"] for bar in bars],
            width=[bar["from"] for bar in bars],
            align="edge",
            edgecolor="white",
        )
        axes.set_xscale("log", base=2)
        axes.set(
            xlabel="tokens, EOS counted",
            ylabel="documents",
            title=f"{split}: {numbers['documents']:,} documents",
        )
    with new_file(path, force=True, setting="--png") as file:
        figure.savefig(file, format="png", dpi=120)


# -- soundness -------------------------------------------------------------------------------------


def check(
    folder: str | Path, workers: int = 1, progress: Callable[[ShardEntry], object] = lambda _: None
) -> list[str]:
    """Everything that is wrong with a prepared corpus, its copy of the tokenizer included; empty
    when it is sound.

    Args:
        folder: of the corpus.
        workers, progress: see `llada.data.corpus.verify_corpus`.
    """
    check_count("--workers", workers, MAX_WORKERS)
    found = verify_corpus(folder, workers=workers, progress=progress)
    try:
        manifest = Manifest.load(folder)
    except UserError:
        return found  # it says so
    try:
        Corpus(Path(folder), manifest).tokenizer()
    except UserError as error:
        found.append(str(error))
    return found

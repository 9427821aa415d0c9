"""The statistics of a prepared corpus as text and as a picture."""

from __future__ import annotations

from pathlib import Path

from data_tools.job.finish import summary
from data_tools.tools.corpus_statistics import CorpusStatistics, HistogramBar, SplitStatistics
from data_tools.tools.reply_lengths import format_reply_lengths
from llada.data.corpus import Corpus
from llada.errors import UserError
from llada.outputs import new_file

_BAR_WIDTH = 40
"""Characters of the longest bar of a histogram."""


def format_statistics(statistics: CorpusStatistics, corpus: Corpus) -> str:
    """Format statistics as text, with the summary of the corpus."""
    ids = statistics["tokenizer"]
    lines = [
        (
            f"{statistics['folder']}: format {statistics['format_version']},"
            f" {statistics['dtype']}, {statistics['source_files']:,} source files"
        ),
        (
            f"tokenizer: {ids['vocab_size']:,} ids, {ids['rows']:,} rows, mask {ids['mask_id']},"
            f" EOS {ids['eos_id']}"
        ),
        summary(corpus.manifest),
    ]
    for split, numbers in statistics["splits"].items():
        lines.append("")
        lines += _format_split(split, numbers)
    lines += format_reply_lengths(corpus)
    return "\n".join(lines)


def _format_split(split: str, numbers: SplitStatistics) -> list[str]:
    lengths = numbers["lengths"]
    sampled = ""
    if lengths["documents_read"] != numbers["documents"]:
        sampled = f", of {lengths['documents_read']:,} of the {numbers['documents']:,} documents"
    lines = [
        f"{split}: documents by length in tokens, EOS counted{sampled}",
        (
            f"  mean {lengths['mean']:,.1f}, median {lengths['median']:,}, 90 % up to"
            f" {lengths['p90']:,}, 99 % up to {lengths['p99']:,}, longest {lengths['max']:,}"
        ),
        *_format_histogram(lengths["histogram"]),
    ]
    if "windows" in numbers:
        windows = numbers["windows"]
        lines.append(
            f"{split}: {windows['windows']:,} windows of {windows['sequence_length']:,} tokens;"
            f" {windows['tail_tokens']:,} tokens ({windows['tail_share']:.2%}) lie in the tails of"
            " shards"
        )
    for sample in numbers["samples"]:
        lines.append(f"{split} document {sample['document']}: {sample['start']!r}")
    return lines


def _format_histogram(histogram: list[HistogramBar]) -> list[str]:
    lines = []
    highest = max(bar["documents"] for bar in histogram)
    for bar in histogram:
        count = bar["documents"]
        width = round(_BAR_WIDTH * count / highest)
        if count:
            width = max(1, width)  # a bar for even a single document
        line = f"  {bar['from']:>9,} to {bar['to']:<9,} {count:>11,} {'#' * width}"
        lines.append(line.rstrip())
    return lines


def draw_lengths(statistics: CorpusStatistics, path: str | Path) -> None:
    """Draw the histograms of document lengths into a PNG file, which is replaced if it exists.

    Raises:
        UserError: the path has another suffix, or its folder does not exist.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"--png: '{path}' does not end with .png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    splits = statistics["splits"]
    figure = Figure(figsize=(8, 3.2 * len(splits)), layout="constrained")
    # Not pyplot, which might need a display.
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(splits), squeeze=False)[:, 0]
    for axes, (split, numbers) in zip(all_axes, splits.items(), strict=True):
        bars = numbers["lengths"]["histogram"]
        # A bar from 2^k to 2^(k+1) is 2^k wide, so all bars look alike on a logarithmic axis.
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

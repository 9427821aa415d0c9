"""`llada data tokenizer train`: train a tokenizer on a sample of the whole input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs
from data_tools.readers.report import Report
from data_tools.tokenizers.fit import MEASURED_BYTES, Fit, measure_fit
from data_tools.tokenizers.passages import sample_passages
from data_tools.tokenizers.sentencepiece_training import train_sentencepiece
from llada.errors import UserError, did_you_mean
from llada.outputs import new_folder
from llada.tokenizer import Tokenizer, train_byte_level_bpe

KINDS = ("byte-bpe", "unigram", "bpe")
"""Kinds of tokenizers; the last two are SentencePiece models."""
SAMPLE_BYTES = 100_000_000
MAX_VOCAB_SIZE = 10_000_000
"""The trainers allocate memory for every id."""
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_special_tokens.json",
)


@dataclass(frozen=True)
class TrainingResult:
    """A trained tokenizer and what it was trained on.

    Attributes:
        tokenizer: trained tokenizer.
        fit: how it cuts about a megabyte of the sample.
        text_bytes: UTF-8 bytes of all texts.
        sample_bytes: UTF-8 bytes of the sample it was trained on.
    """

    tokenizer: Tokenizer
    fit: Fit
    text_bytes: int
    sample_bytes: int


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    kind: str = "byte-bpe",
    sample_bytes: int = SAMPLE_BYTES,
    options: ReadOptions | None = None,
    force: bool = False,
) -> TrainingResult:
    """Train a tokenizer on a sample of the documents and save it as the folder `output`.

    The same documents give the same files.

    Args:
        inputs: files and folders.
        vocab_size: number of ids, of which LLaDA's six special tokens take the last ones.
        output: folder to make.
        kind: one of KINDS.
        sample_bytes: most bytes of text to train on, chosen from all documents. Memory grows with
            the sample, not with the input.
        options: how inputs are read.
        force: whether to replace a tokenizer at `output`.

    Raises:
        UserError: something is wrong with inputs, options or output; nothing is left behind.
    """
    if kind not in KINDS:
        raise UserError(
            f"--kind: '{kind}' is not one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size: {vocab_size} exceeds the maximum of {MAX_VOCAB_SIZE:,}")
    if sample_bytes < 1:
        raise UserError(f"--sample-bytes: {sample_bytes} is less than 1")
    options = options or ReadOptions()
    with new_folder(output, force, "a tokenizer", _TOKENIZER_FILES) as folder:
        sample = sample_passages(read_inputs(inputs, options, Report()), sample_bytes)
        if kind == "byte-bpe":
            tokenizer = train_byte_level_bpe(iter(sample.passages), vocab_size)
        else:
            tokenizer = train_sentencepiece(sample.passages, vocab_size, kind)
        tokenizer.save(folder)
    # Every n-th passage, which together have about MEASURED_BYTES.
    stride = max(1, sample.kept_bytes // MEASURED_BYTES)
    fit = measure_fit(tokenizer, sample.passages[::stride])
    return TrainingResult(tokenizer, fit, sample.text_bytes, sample.kept_bytes)

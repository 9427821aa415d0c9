"""`llada data prepare`: texts -> a folder of shards that pretraining reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.job.build import CorpusSettings, ExecutionOptions, write_corpus
from data_tools.job.splits import Encoded
from data_tools.job.work_plan import WorkPlan
from data_tools.job.worker import Decontamination, Steps, held_out_hash
from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_texts
from data_tools.readers.report import Report
from data_tools.readers.sources import parse_extensions
from data_tools.tokenizers.encoders import choose_encoder, open_encoder
from llada.data.corpus import TEXT, Manifest
from llada.tokenizer import Tokenizer

I64 = npt.NDArray[np.int64]

_SAMPLE, _LONGEST_SAMPLE, _SAMPLED_SOURCES = 1 << 20, 1 << 16, 64
"""Characters of the input on which encoders are compared, of one document of it, and about how many
sources they are of.
"""


@dataclass(frozen=True)
class TextType:
    """Documents that are texts."""

    options: ReadOptions
    name: str = TEXT

    def text(self, document: str) -> str:
        return document

    def choose(self, tokenizer: Tokenizer, plan: WorkPlan, wanted: str) -> tuple[str, str]:
        encoder, note = choose_encoder(tokenizer, list(self._sample(plan)), wanted)
        return encoder.name, note

    def _sample(self, plan: WorkPlan) -> Iterator[str]:
        """Text of the input: the start of every n-th source."""
        left = _SAMPLE
        for source in plan.sources[:: max(1, len(plan.sources) // _SAMPLED_SOURCES)]:
            share = max(left // 4, _LONGEST_SAMPLE)
            for document in read_texts(source, None, self.options, Report()):
                text = document[:_LONGEST_SAMPLE]
                yield text
                left, share = left - len(text), share - len(text)
                if left <= 0:
                    return
                if share <= 0:
                    break

    def open(self, tokenizer: Tokenizer, backend: str) -> Steps:
        encoder = open_encoder(tokenizer, backend)

        def read(source: InputFile, part: Slice, report: Report) -> Iterator[str]:
            return read_texts(source, part, self.options, report)

        def encode(texts: list[str], report: Report) -> Encoded:
            raw = [text.encode("utf-8") for text in texts]
            flat, lengths = encoder.encode(texts)
            sizes = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
            return Encoded(
                _with_eos(flat, lengths, tokenizer.eos_id),
                lengths + 1,
                sizes,
                list(map(held_out_hash, raw)),
            )

        return Steps(read, encode)


def _with_eos(flat: I64, lengths: I64, eos_id: int) -> I64:
    """The ids of all documents, each followed by EOS."""
    ends = np.cumsum(lengths + 1) - 1
    out = np.empty(len(flat) + len(lengths), dtype=np.int64)
    text = np.ones(len(out), dtype=bool)
    text[ends] = False
    out[text] = flat
    out[ends] = eos_id
    return out


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    validation_fraction: float = 0.005,
    add_special_tokens: bool = False,
    text_field: str = "text",
    extensions: Sequence[str] | None = None,
    skip_bad: bool = False,
    min_length: int = 1,
    max_length: int = 64 << 20,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    shard_tokens: int = 2**28,
    unit_bytes: int | None = None,
    dedup: bool = False,
    decontamination: Decontamination | None = None,
    force: bool = False,
    effort: ExecutionOptions | None = None,
) -> Manifest:
    """Tokenize and shard.

    Args:
        inputs: files, folders, patterns, `hf:` datasets.
        tokenizer_path: Hugging Face folder, tokenizer.json or SentencePiece model.
        output: folder to make; made in OUTPUT.partial, and renamed when it is whole.
        validation_fraction: share of the documents, chosen by the hash of their text, that goes to
            the validation split.
        add_special_tokens: append LLaDA's special tokens that the tokenizer lacks; the result is
            saved with the corpus.
        text_field, extensions, skip_bad, min_length, max_length, split, name, revision, streaming:
        see ReadOptions.
        shard_tokens: a shard is closed by the document with which it has this many.
        unit_bytes: text in a unit of work; None: a 64th of the whole, from 4 MiB to 256 MiB.
        dedup: leave out documents with the text of an earlier one.
        decontamination: what to do with documents that overlap evaluation texts.
        force: replace a prepared corpus at `output`, or discard an unfinished one of other inputs
            or settings.
        effort: how much of it is done here, and how; None: all, in this process.

    Raises:
        UserError: anything wrong with inputs, tokenizer, options or output.
        RunError: the output cannot be written, a worker is killed. Finished units are kept.
        TryAgain: other tasks have to do their share before this one can go on.
        Unfinished: this task has done its share, others have not.
    """
    own_extensions = parse_extensions(extensions)
    options = ReadOptions(
        text_field,
        own_extensions,
        skip_bad,
        min_length,
        max_length,
        split,
        name,
        revision,
        streaming,
    )
    recorded = {
        "text_field": text_field,
        "extensions": sorted(own_extensions) if own_extensions else None,
        "skip_bad": skip_bad,
        "min_length": min_length,
        "max_length": max_length,
        "dataset": {"split": split, "name": name, "revision": revision, "streaming": streaming},
    }
    settings = CorpusSettings(
        tokenizer_path,
        validation_fraction,
        add_special_tokens,
        shard_tokens,
        unit_bytes,
        dedup,
        decontamination,
        force=force,
        recorded=recorded,
    )
    return write_corpus(inputs, output, settings, TextType(options), effort or ExecutionOptions())

"""Documents of text, for `llada data prepare`: each is encoded whole and ends with EOS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from data_tools.documents.base import DocumentEncoder, DocumentType, EncodedDocuments
from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_texts
from data_tools.readers.report import Report
from data_tools.tokenizers.encoders import Encoder, choose_encoder, open_encoder
from llada.arrays import I64
from llada.data.manifest import TEXT
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

# Encoders are compared on a sample of the input. It is small because the tokenizer's own library,
# which may be slow, has to encode it too.
_SAMPLE_CHARACTERS = 1 << 20
_SAMPLE_CHARACTERS_PER_DOCUMENT = 1 << 16
_SAMPLED_SOURCES = 64


@dataclass(frozen=True)
class TextType(DocumentType[str]):
    """Documents that are texts.

    Attributes:
        read_options: how input files are read.
    """

    name: ClassVar[str] = TEXT
    read_options: ReadOptions = field(default_factory=ReadOptions)

    def manifest_options(self) -> JsonObject:
        options = self.read_options
        extensions = None
        if options.extensions:
            extensions = sorted(options.extensions)
        return {
            "text_field": options.text_field,
            "extensions": extensions,
            "skip_bad": options.skip_bad,
            "min_length": options.min_length,
            "max_length": options.max_length,
            "dataset": {
                "split": options.split,
                "name": options.name,
                "revision": options.revision,
                "streaming": options.streaming,
            },
        }

    def text(self, document: str) -> str:
        return document

    def choose_backend(
        self, tokenizer: Tokenizer, sources: Sequence[InputFile], requested: str
    ) -> tuple[str, str]:
        encoder, reason = choose_encoder(tokenizer, list(self._sample(sources)), requested)
        return encoder.name, reason

    def _sample(self, sources: Sequence[InputFile]) -> Iterator[str]:
        """Yield beginnings of the first documents of every n-th source."""
        step = max(1, len(sources) // _SAMPLED_SOURCES)
        remaining = _SAMPLE_CHARACTERS
        # Every n-th, because neighbors in a sorted list are often alike.
        for source in sources[::step]:
            # A quarter of what remains, so that the first sources do not use up the sample, and
            # that a sample of few sources is still large.
            source_share = max(remaining // 4, _SAMPLE_CHARACTERS_PER_DOCUMENT)
            for document in read_texts(source, None, self.read_options, Report()):
                text = document[:_SAMPLE_CHARACTERS_PER_DOCUMENT]
                yield text
                remaining -= len(text)
                source_share -= len(text)
                if remaining <= 0:
                    return
                if source_share <= 0:
                    break

    def open(self, tokenizer: Tokenizer, backend: str) -> DocumentEncoder[str]:
        encoder = open_encoder(tokenizer, backend)
        return TextEncoder(self.read_options, encoder, tokenizer.eos_id)


class TextEncoder:
    """Encodes texts.

    Args:
        read_options: how input files are read.
        encoder: encoder of texts, which appends no EOS.
        eos_id: id that ends every document.
    """

    def __init__(self, read_options: ReadOptions, encoder: Encoder, eos_id: int) -> None:
        self._read_options = read_options
        self._encoder = encoder
        self._eos_id = eos_id

    def read(self, source: InputFile, slice_: Slice, report: Report) -> Iterator[str]:
        return read_texts(source, slice_, self._read_options, report)

    def encode(self, documents: list[str], report: Report) -> EncodedDocuments:
        # The bytes of a text decide its split.
        raw = [text.encode("utf-8") for text in documents]
        flat, lengths = self._encoder.encode(documents)
        return EncodedDocuments(
            flat_tokens=_append_eos(flat, lengths, self._eos_id),
            lengths=lengths + 1,
            text_bytes=np.fromiter(map(len, raw), dtype=np.int64, count=len(raw)),
            split_keys=raw,
        )


def _append_eos(flat: I64, lengths: I64, eos_id: int) -> I64:
    """Append EOS to every document.

    For flat = [5, 6, 7] and lengths = [2, 1], the result is [5, 6, EOS, 7, EOS].

    Args:
        flat: ids of all documents without EOS, int64 [tokens].
        lengths: number of ids of each document, int64 [documents].

    Returns:
        int64 [tokens + documents].
    """
    # [2, 4] in the example.
    eos_positions = np.cumsum(lengths + 1) - 1
    with_eos = np.empty(len(flat) + len(lengths), dtype=np.int64)
    is_text = np.ones(len(with_eos), dtype=bool)
    is_text[eos_positions] = False
    with_eos[is_text] = flat
    with_eos[eos_positions] = eos_id
    return with_eos

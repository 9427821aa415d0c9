"""The interface between a type of document and the job that prepares a corpus of it.

`DocumentType` is a plain value that is sent to worker processes. `DocumentEncoder` is what it
becomes there, once the tokenizer is loaded. The modules `text` and `conversations` define one type
each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from data_tools.readers.input_file import InputFile, Slice
from data_tools.readers.options import ReadOptions
from data_tools.readers.report import Report
from llada.arrays import I64
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

Document = TypeVar("Document")


@dataclass(frozen=True)
class EncodedDocuments:
    """A batch of documents as token ids.

    Attributes:
        flat_tokens: ids of all documents, concatenated, EOS included, int64 [tokens].
        lengths: tokens of each document, EOS included, int64 [documents].
        text_bytes: UTF-8 bytes of each document's text, int64 [documents].
        split_keys: bytes whose hash decides each document's split [documents].
        replies: rows of REPLY_FIELDS sorted by document, with documents counted from the first of
            the batch, int64 [replies, 5]; None for documents of text.
    """

    flat_tokens: I64
    lengths: I64
    text_bytes: I64
    split_keys: Sequence[bytes]
    replies: I64 | None = None


class DocumentEncoder(Protocol[Document]):
    """Reads and encodes documents of one type with one tokenizer."""

    def read(self, source: InputFile, slice_: Slice, report: Report) -> Iterator[Document]:
        """Yield the documents in a slice of a source; `report` counts what is left out."""
        ...

    def encode(self, documents: list[Document], report: Report) -> EncodedDocuments:
        """Encode a batch in order; `report` counts what is left out.

        A document of which nothing remains is not in the result.
        """
        ...


class DocumentType(ABC, Generic[Document]):
    """One type of document: how it is read, identified, encoded and indexed.

    Instances are sent to worker processes, so they hold settings only.

    Attributes:
        name: TEXT or CONVERSATIONS of `llada.data.manifest`; recorded as the manifest's kind.
        read_options: how input files are read.
        chat_template: Jinja template to save with the tokenizer; None keeps the tokenizer's own.
    """

    name: ClassVar[str]
    read_options: ReadOptions

    @property
    def chat_template(self) -> str | None:
        return None

    @abstractmethod
    def manifest_options(self) -> JsonObject:
        """Return the settings that the manifest records, as JSON values."""

    @abstractmethod
    def text(self, document: Document) -> str:
        """Return the whole text of a document; documents with equal text are duplicates."""

    @abstractmethod
    def choose_backend(
        self, tokenizer: Tokenizer, sources: Sequence[InputFile], requested: str
    ) -> tuple[str, str]:
        """Choose the library that encodes.

        Args:
            tokenizer: tokenizer of the corpus.
            sources: input files, from which a sample may be read.
            requested: one of `data_tools.tokenizers.encoders.BACKENDS`.

        Returns:
            The name of the encoder, and why a faster one was not chosen ("" if there is nothing to
            explain).
        """

    @abstractmethod
    def open(self, tokenizer: Tokenizer, backend: str) -> DocumentEncoder[Document]:
        """Return an encoder; `backend` is a name from `choose_backend`."""

    def replies(self, shard: Path) -> I64 | None:
        """Return the rows of REPLY_FIELDS of a shard; None if documents have no replies.

        Args:
            shard: path of the shard, without suffix.
        """
        return None

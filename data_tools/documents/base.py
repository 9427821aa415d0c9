"""The interface between a type of document and the job that prepares a corpus of it.

`DocumentType` is a plain value that travels to worker processes. `DocumentEncoder` is what it
becomes there, once the tokenizer is loaded. The two types are in `text` and `conversations`.
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
from llada.data.shard_format import I64
from llada.tokenizer import Tokenizer

Document = TypeVar("Document")
JsonObject = dict[str, object]
"""An object of a JSON file, with JSON values."""


@dataclass(frozen=True)
class EncodedDocuments:
    """A batch of documents as token ids.

    Attributes:
        flat_tokens: ids of all documents one after the other, each document's EOS included, int64
            [tokens].
        lengths: tokens of each document, int64 [documents].
        text_bytes: UTF-8 bytes of each document's text, int64 [documents].
        split_keys: for each document, the bytes whose hash decides its split [documents].
        replies: rows of REPLY_FIELDS sorted by document, the document counted from the first of the
            batch, int64 [replies, 5]; None for documents without replies.
    """

    flat_tokens: I64
    lengths: I64
    text_bytes: I64
    split_keys: Sequence[bytes]
    replies: I64 | None = None


class DocumentEncoder(Protocol[Document]):
    """Reads and encodes documents of one type with one tokenizer."""

    def read(self, source: InputFile, part: Slice, report: Report) -> Iterator[Document]:
        """Yield the documents in a part of a source; `report` counts what is left out."""
        ...

    def encode(self, documents: list[Document], report: Report) -> EncodedDocuments:
        """Encode a batch in order.

        A document of which nothing remains is not in the result; `report` counts what is left out.
        """
        ...


class DocumentType(ABC, Generic[Document]):
    """One type of document: how it is read, identified, encoded and indexed.

    Instances are sent to worker processes, so they hold settings only.

    Attributes:
        name: TEXT or CONVERSATIONS of `llada.data.corpus`; recorded in the manifest.
        read_options: how input files are read.
        chat_template: Jinja template that is saved with the tokenizer; None keeps the tokenizer's
            own.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def read_options(self) -> ReadOptions: ...

    @property
    def chat_template(self) -> str | None:
        return None

    @abstractmethod
    def manifest_options(self) -> JsonObject:
        """Return the settings of this type for the manifest."""

    @abstractmethod
    def text(self, document: Document) -> str:
        """Return all text of a document; two documents with equal text are duplicates."""

    @abstractmethod
    def choose_backend(
        self, tokenizer: Tokenizer, sources: Sequence[InputFile], requested: str
    ) -> tuple[str, str]:
        """Choose the library that encodes.

        Args:
            tokenizer: tokenizer of the corpus.
            sources: input files, of which a sample may be read.
            requested: one of `data_tools.tokenizers.encoders.BACKENDS`.

        Returns:
            The name of the encoder, and why a faster one was not chosen ("" if there is nothing to
            explain).
        """

    @abstractmethod
    def open(self, tokenizer: Tokenizer, backend: str) -> DocumentEncoder[Document]:
        """Return an encoder; `backend` is a name from `choose_backend`."""

    def reply_index(self, shard: Path) -> I64 | None:
        """Return the reply index of a shard, rows of REPLY_FIELDS; None if this type has none.

        Args:
            shard: path of the shard without a suffix.
        """
        return None

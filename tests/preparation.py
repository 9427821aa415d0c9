"""Corpora prepared in this process, with all options as keyword arguments.

The options are the fields of `CorpusOptions`, and of `ReadOptions` or `ConversationSettings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_tools.documents.conversations import (
    ConversationSettings,
    ConversationType,
    read_chat_template,
)
from data_tools.documents.text import TextType
from data_tools.job.build import prepare_corpus
from data_tools.job.options import CorpusOptions, ExecutionOptions
from data_tools.readers.options import ReadOptions
from data_tools.readers.sources import parse_extensions
from llada.data.manifest import Manifest


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    extensions: Sequence[str] | None = None,
    execution: ExecutionOptions | None = None,
    **options: Any,
) -> Manifest:
    """Prepare text, as `llada data prepare` does; `extensions` are those of `--ext`."""
    corpus = take_corpus_options(options)
    reading = ReadOptions(extensions=parse_extensions(extensions), **options)
    return prepare_corpus(inputs, tokenizer_path, output, TextType(reading), corpus, execution)


def prepare_sft(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    chat_template: str = "llada",
    skip_bad: bool = False,
    execution: ExecutionOptions | None = None,
    **options: Any,
) -> Manifest:
    """Prepare conversations, as `llada data prepare-sft` does."""
    corpus = take_corpus_options(options)
    template = read_chat_template(chat_template, tokenizer_path)
    settings = ConversationSettings(chat_template=template, **options)
    reading = ReadOptions(text_field=None, skip_bad=skip_bad)
    document_type = ConversationType(settings, chat_template, reading)
    return prepare_corpus(inputs, tokenizer_path, output, document_type, corpus, execution)


def take_corpus_options(options: dict[str, Any]) -> CorpusOptions:
    """Remove the options of a corpus from `options` and return them."""
    names = [field.name for field in fields(CorpusOptions) if field.name in options]
    return CorpusOptions(**{name: options.pop(name) for name in names})

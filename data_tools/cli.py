"""The `llada data` commands.

Each command turns its options into arguments of one function of the library, and prints what it
returns. Slow imports are inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.defaults import SHARD_TOKENS, VALIDATION_FRACTION
from data_tools.job.options import CorpusOptions, ExecutionOptions
from data_tools.options import (
    AddSpecialTokens,
    ConversationFlags,
    CorpusFlags,
    CorpusFolder,
    ExecutionFlags,
    Extensions,
    Force,
    Inputs,
    MoreInputs,
    OutputPath,
    ShardTokens,
    SkipBad,
    TextField,
    TextFlags,
    TokenizerPath,
    ValidationFraction,
    expand_groups,
)
from llada.errors import UserError

if TYPE_CHECKING:
    from data_tools.documents.base import Document, DocumentType

app = typer.Typer(no_args_is_help=True, help="Prepare, inspect, verify and convert corpora.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and inspect tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")


# -- preparing a corpus ----------------------------------------------------------------------------


@app.command()
@expand_groups
def prepare(
    input: Inputs,
    tokenizer: TokenizerPath,
    output: OutputPath,
    text: TextFlags,
    corpus: CorpusFlags,
    execution: ExecutionFlags,
    more: MoreInputs = None,
) -> None:
    """Tokenize text into a corpus for pretraining."""
    execution_options = execution.to_options(text.backend)
    document_type = text.document_type()
    corpus_options = corpus.to_options(text.decontamination())
    inputs = [*input, *(more or [])]
    _prepare(inputs, tokenizer, output, document_type, corpus_options, execution_options)


@app.command("prepare-sft")
@expand_groups
def prepare_sft(
    input: Inputs,
    tokenizer: TokenizerPath,
    output: OutputPath,
    conversations: ConversationFlags,
    corpus: CorpusFlags,
    execution: ExecutionFlags,
    more: MoreInputs = None,
) -> None:
    """Encode conversations into a corpus for fine-tuning."""
    execution_options = execution.to_options()
    document_type = conversations.document_type(tokenizer)
    corpus_options = corpus.to_options()
    inputs = [*input, *(more or [])]
    _prepare(inputs, tokenizer, output, document_type, corpus_options, execution_options)


def _prepare(
    inputs: list[str],
    tokenizer: str,
    output: str,
    document_type: DocumentType[Document],
    corpus_options: CorpusOptions,
    execution_options: ExecutionOptions,
) -> None:
    """Prepare a corpus, and print a summary, or what other tasks still have to do."""
    from data_tools.job.build import Unfinished, prepare_corpus
    from data_tools.job.finish import summary

    try:
        manifest = prepare_corpus(
            inputs, tokenizer, output, document_type, corpus_options, execution_options
        )
    except Unfinished as unfinished:
        typer.echo(str(unfinished))
    else:
        typer.echo(f"{summary(manifest)}\n{output}")


# -- prepared corpora ------------------------------------------------------------------------------


@app.command()
def merge(
    folders: Annotated[list[str], typer.Argument(help="Folders of two or more prepared corpora.")],
    output: OutputPath,
    shard_tokens: ShardTokens = SHARD_TOKENS,
    force: Force = False,
) -> None:
    """Merge several corpora that have the same tokenizer into one."""
    from data_tools.job.finish import summary
    from data_tools.tools.merge import merge as run

    manifest = run(
        folders, output, shard_tokens=shard_tokens, force=force, progress=sys.stderr.isatty()
    )
    typer.echo(f"{summary(manifest)}\n{output}")


@app.command()
def split(
    folder: CorpusFolder,
    parts: Annotated[int, typer.Option(help="Number of parts.")],
    output: OutputPath,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier result at --output.")
    ] = False,
) -> None:
    """Split a corpus into parts with about equal numbers of tokens."""
    from data_tools.tools.split import split as run

    manifests = run(folder, parts, output, force=force, progress=sys.stderr.isatty())
    for number, manifest in enumerate(manifests):
        documents, tokens, _ = manifest.totals("train")
        held_out_documents, held_out_tokens, _ = manifest.totals("validation")
        typer.echo(
            f"{output}/part-{number:05d}: train {documents:,} documents, {tokens:,} tokens;"
            f" validation {held_out_documents:,} documents, {held_out_tokens:,} tokens"
        )


@app.command()
def export(
    folder: CorpusFolder,
    output: Annotated[str, typer.Option(help="File to create: .jsonl, .jsonl.gz or .jsonl.zst.")],
    split: Annotated[
        str | None, typer.Option(help="train or validation. Default: both, train first.")
    ] = None,
    text_field: TextField = "text",
    force: Force = False,
) -> None:
    """Decode the documents of a corpus to JSON Lines."""
    from data_tools.tools.export import export as run

    exported = run(
        folder,
        output,
        split=split,
        text_field=text_field,
        force=force,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{output}: {exported.documents:,} documents, {exported.text_bytes:,} bytes of text")
    if exported.text_bytes != exported.prepared_bytes:
        typer.echo(
            f"not the text as it was prepared, which has {exported.prepared_bytes:,} bytes: the"
            " tokenizer does not decode every text unchanged"
        )


@app.command("import")
def import_(
    shards: Annotated[
        list[str],
        typer.Argument(help="Megatron datasets: .bin, .idx, or the name without suffix."),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Tokenizer they were made with: folder, tokenizer.json or SentencePiece model."
        ),
    ],
    output: OutputPath,
    validation_fraction: ValidationFraction = VALIDATION_FRACTION,
    add_special_tokens: AddSpecialTokens = False,
    shard_tokens: ShardTokens = SHARD_TOKENS,
    force: Force = False,
) -> None:
    """Import Megatron datasets that another tool tokenized, as a corpus."""
    from data_tools.job.finish import summary
    from data_tools.tools.import_datasets import ImportOptions, import_datasets

    imported = import_datasets(
        shards,
        tokenizer,
        output,
        ImportOptions(validation_fraction, add_special_tokens, shard_tokens),
        force=force,
        progress=sys.stderr.isatty(),
    )
    typer.echo(summary(imported.manifest))
    if imported.eos_added:
        typer.echo(f"EOS appended to {imported.eos_added:,} documents that did not end with it")
    for doubt in imported.doubts:
        typer.echo(f"warning: {doubt}", err=True)
    if imported.special_inside:
        typer.echo(
            f"{imported.special_inside:,} documents contain BOS or EOS before their end; kept as"
            " they are"
        )
    typer.echo(output)


@app.command()
def inspect(
    folder: CorpusFolder,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of documents to show from each split.")
    ] = 3,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Also count windows of this many tokens, and the tokens left over."),
    ] = None,
    png: Annotated[
        str | None, typer.Option(help="Plot the histogram of document lengths to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show statistics and samples of a corpus."""
    import json

    from data_tools.tools.corpus_statistics import corpus_statistics
    from data_tools.tools.statistics_report import draw_lengths, format_statistics
    from llada.data.corpus import Corpus

    corpus = Corpus.open(folder)
    statistics = corpus_statistics(corpus, samples, sequence_length)
    if png is not None:
        draw_lengths(statistics, png)
    if as_json:
        typer.echo(json.dumps(statistics, ensure_ascii=False))
    else:
        typer.echo(format_statistics(statistics, corpus))


@app.command()
def verify(
    folder: CorpusFolder,
    workers: Annotated[int, typer.Option(help="Number of shards to check in parallel.")] = 1,
) -> None:
    """Check a corpus: checksums, and every token, document and count."""
    from data_tools.job.progress import progress_bar
    from data_tools.tools.verify import verify_prepared_corpus
    from llada.data.manifest import Manifest

    try:
        total = sum(entry.tokens for entry in Manifest.load(folder).shards)
    except UserError:
        total = 0  # the verification reports the problem
    with progress_bar(sys.stderr.isatty(), "verifying", total) as advance:
        problems = verify_prepared_corpus(folder, workers, lambda entry: advance(entry.tokens))
    # The last line of a failed command is its error, which is enough for a single problem.
    if len(problems) == 1:
        raise UserError(problems[0])
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise UserError(f"{folder}: {len(problems)} problems, the first: {problems[0]}")
    shards = Manifest.load(folder).shards
    documents = sum(entry.documents for entry in shards)
    tokens = sum(entry.tokens for entry in shards)
    typer.echo(f"ok: {len(shards)} shards, {documents:,} documents, {tokens:,} tokens")


# -- tokenizers ------------------------------------------------------------------------------------


@tokenizer_app.command()
def train(
    input: Inputs,
    vocab_size: Annotated[
        int, typer.Option(help="Number of ids, including LLaDA's 6 special tokens.")
    ],
    output: OutputPath,
    more: MoreInputs = None,
    kind: Annotated[
        str, typer.Option(help="byte-bpe, or a SentencePiece model: unigram or bpe.")
    ] = "byte-bpe",
    sample_bytes: Annotated[
        int, typer.Option(help="Bytes of text to train on, sampled from the whole input.")
    ] = 100_000_000,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Train a lossless tokenizer; LLaDA's special tokens take the last ids."""
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.sources import parse_extensions
    from data_tools.tokenizers.training import train_tokenizer

    trained = train_tokenizer(
        [*input, *(more or [])],
        vocab_size,
        output,
        kind=kind,
        sample_bytes=sample_bytes,
        options=ReadOptions(text_field, parse_extensions(ext), skip_bad),
        force=force,
    )
    tokenizer = trained.tokenizer
    num_ids = f"{tokenizer.vocab_size:,} ids"
    if tokenizer.vocab_size < vocab_size:
        num_ids += f" (requested {vocab_size:,}; the text has too few distinct pairs)"
    typer.echo(
        f"{output}: {num_ids}, {tokenizer.padded_vocab_size:,} rows, mask {tokenizer.mask_id},"
        f" EOS {tokenizer.eos_id}"
    )
    typer.echo(f"trained on {trained.sample_bytes:,} of {trained.text_bytes:,} bytes of text")
    typer.echo(f"{trained.fit}, a sample of these")


@tokenizer_app.command()
def info(
    path: Annotated[
        str, typer.Argument(help="Hugging Face folder, tokenizer.json or SentencePiece model.")
    ],
    input: Annotated[
        list[str] | None,
        typer.Option("--input", help="File or folder to measure it on; repeatable."),
    ] = None,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
) -> None:
    """Show the size, type, special tokens, encoder and compression of a tokenizer."""
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.sources import parse_extensions
    from data_tools.tokenizers.description import describe_tokenizer

    options = ReadOptions(text_field, parse_extensions(ext), skip_bad)
    typer.echo(describe_tokenizer(path, input or [], options))

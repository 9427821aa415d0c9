"""The `llada data` commands: thin, and quick to import."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from llada.errors import UserError

if TYPE_CHECKING:
    from data_tools.job.build import ExecutionOptions
    from llada.data.corpus import Manifest

app = typer.Typer(no_args_is_help=True, help="Tokenize, shard, inspect and verify corpora.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and look at tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input", help="File, folder, pattern or hf:DATASET; repeat it, or list more after it."
    ),
]
MoreInputs = Annotated[list[str] | None, typer.Argument(help="Further inputs.")]
TextField = Annotated[str, typer.Option(help="JSONL field with the text.")]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--ext", help="Extensions read in folders, as in --ext py,md; default: text and code."
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Count bad lines, elements and rows instead of stopping.")
]
AddSpecial = Annotated[
    bool,
    typer.Option(
        "--add-special-tokens", help="Append LLaDA's special tokens that the tokenizer lacks."
    ),
]
TokenizerPath = Annotated[
    str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")
]
Split = Annotated[str, typer.Option(help="Of hf: inputs, as in train[:1%].")]
Name = Annotated[
    str | None, typer.Option(help="Of hf: inputs: the configuration, as in sample-10BT.")
]
Revision = Annotated[str | None, typer.Option(help="Of hf: inputs: commit or tag.")]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read hf: inputs without downloading them whole.")
]
Dedup = Annotated[
    bool, typer.Option("--dedup", help="Leave out exact copies of earlier documents.")
]
UnitBytes = Annotated[
    int | None,
    typer.Option(
        help="Text in a unit of work; default: a 64th of the whole, from 4 MiB to 256 MiB."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes on this machine; default: one for each core it may use."),
]
Task = Annotated[int, typer.Option(help="Number of this task, from 0, among --tasks.")]
Tasks = Annotated[
    int, typer.Option(help="Tasks that share the output folder, as those of a Slurm array.")
]
Wait = Annotated[
    float,
    typer.Option(help="Seconds to wait for other tasks where their results are needed (--dedup)."),
]
ShardTokens = Annotated[int, typer.Option(min=1, help="Tokens with which a shard is full.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --output.")]
Output = Annotated[str, typer.Option(help="Folder to make.")]
Folder = Annotated[str, typer.Argument(help="Folder of a prepared corpus.")]


@app.command()
def prepare(
    input: Inputs,
    tokenizer: TokenizerPath,
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents held out, by hash of their text.")
    ] = 0.005,
    add_special_tokens: AddSpecial = False,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
    min_length: Annotated[
        int, typer.Option(help="Leave out shorter texts, in bytes of UTF-8.")
    ] = 1,
    max_length: Annotated[
        int, typer.Option(help="Leave out longer texts, in bytes of UTF-8; bounds memory.")
    ] = 64 << 20,
    split: Split = "train",
    name: Name = None,
    revision: Revision = None,
    streaming: Streaming = False,
    dedup: Dedup = False,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Leave out documents that overlap the texts of this evaluation file; repeat it for"
                " more."
            )
        ),
    ] = None,
    decontaminate_ngram: Annotated[
        int, typer.Option(min=1, help="Words in a row that make an overlap.")
    ] = 13,
    decontaminate_count: Annotated[
        bool, typer.Option("--decontaminate-count", help="Count such documents and keep them.")
    ] = False,
    shard_tokens: ShardTokens = 2**28,
    unit_bytes: UnitBytes = None,
    workers: Workers = None,
    task: Task = 0,
    tasks: Tasks = 1,
    wait: Wait = 600.0,
    backend: Annotated[
        str, typer.Option(help="Encoder: auto, gigatoken, fastokens or library.")
    ] = "auto",
    force: Force = False,
) -> None:
    """Tokenize text into a folder of shards that training reads."""
    from data_tools.documents.text import prepare as run
    from data_tools.job.worker import Decontamination

    rule = (
        Decontamination(tuple(decontaminate), decontaminate_ngram, not decontaminate_count)
        if decontaminate
        else None
    )
    _report(
        output,
        lambda: run(
            [*input, *(more or [])],
            tokenizer,
            output,
            validation_fraction=validation_fraction,
            add_special_tokens=add_special_tokens,
            text_field=text_field,
            extensions=ext,
            skip_bad=skip_bad,
            min_length=min_length,
            max_length=max_length,
            split=split,
            name=name,
            revision=revision,
            streaming=streaming,
            shard_tokens=shard_tokens,
            unit_bytes=unit_bytes,
            dedup=dedup,
            decontamination=rule,
            force=force,
            effort=_effort(workers, task, tasks, wait, backend),
        ),
    )


def _effort(
    workers: int | None, task: int, tasks: int, wait: float, backend: str
) -> ExecutionOptions:
    from data_tools.job.build import ExecutionOptions

    return ExecutionOptions(
        len(os.sched_getaffinity(0)) if workers is None else workers,
        task,
        tasks,
        wait,
        backend,
        sys.stderr,
    )


def _report(output: str, prepare: Callable[[], Manifest]) -> None:
    """Say what was made, or what is left to other tasks."""
    from data_tools.job.build import Unfinished
    from data_tools.job.finish import summary

    try:
        typer.echo(f"{summary(prepare())}\n{output}")
    except Unfinished as others:
        typer.echo(str(others))


@app.command("prepare-sft")
def prepare_sft(
    input: Inputs,
    tokenizer: Annotated[
        str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")
    ],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    prompt_field: Annotated[str, typer.Option(help="JSONL field with the prompt.")] = "prompt",
    response_field: Annotated[
        str, typer.Option(help="JSONL field with the response.")
    ] = "response",
    messages_field: Annotated[
        str, typer.Option(help="JSONL field with a list of turns, each with role and content.")
    ] = "messages",
    conversations_field: Annotated[
        str, typer.Option(help="JSONL field with a list of turns, each with from and value.")
    ] = "conversations",
    system_field: Annotated[
        str, typer.Option(help="JSONL field with a system prompt, if there is one.")
    ] = "system",
    context_field: Annotated[
        str | None,
        typer.Option(help="JSONL field whose text, if any, follows the prompt of a pair."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help=(
                "auto, prompt-response, messages, sharegpt or alpaca; auto: by the fields of the"
                " record."
            )
        ),
    ] = "auto",
    chat_template: Annotated[
        str,
        typer.Option(
            help=(
                "llada (its own format), tokenizer (the tokenizer's chat template) or a Jinja file."
            )
        ),
    ] = "llada",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest reply with its prompt and EOS, in tokens; longer ones are left out."
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut such replies to --max-tokens, without EOS.")
    ] = False,
    drop_trailing: Annotated[
        bool, typer.Option("--drop-trailing", help="Leave out turns after the last reply.")
    ] = False,
    join_turns: Annotated[
        bool, typer.Option("--join-turns", help="Make consecutive turns of one role one turn.")
    ] = False,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the conversations held out, by hash of their question.")
    ] = 0.005,
    add_special_tokens: AddSpecial = False,
    skip_bad: SkipBad = False,
    dedup: Dedup = False,
    shard_tokens: ShardTokens = 2**28,
    unit_bytes: UnitBytes = None,
    workers: Workers = None,
    task: Task = 0,
    tasks: Tasks = 1,
    wait: Wait = 600.0,
    force: Force = False,
) -> None:
    """Encode conversations into a folder of shards that fine-tuning reads."""
    from data_tools.documents.conversations import prepare_sft as run
    from data_tools.documents.turns import Fields

    fields = Fields(
        prompt_field,
        response_field,
        messages_field,
        conversations_field,
        system_field,
        context_field,
        format,
        drop_trailing,
        join_turns,
    )
    _report(
        output,
        lambda: run(
            [*input, *(more or [])],
            tokenizer,
            output,
            fields=fields,
            chat_template=chat_template,
            max_tokens=max_tokens,
            truncate=truncate,
            validation_fraction=validation_fraction,
            add_special_tokens=add_special_tokens,
            skip_bad=skip_bad,
            shard_tokens=shard_tokens,
            unit_bytes=unit_bytes,
            dedup=dedup,
            force=force,
            effort=_effort(workers, task, tasks, wait, "auto"),
        ),
    )


@app.command()
def merge(
    folders: Annotated[list[str], typer.Argument(help="Folders of prepared corpora, two or more.")],
    output: Output,
    shard_tokens: ShardTokens = 2**28,
    force: Force = False,
) -> None:
    """Make one prepared corpus of several of one tokenizer."""
    from data_tools.job.finish import summary
    from data_tools.tools.merge import merge as run

    manifest = run(
        folders, output, shard_tokens=shard_tokens, force=force, progress=sys.stderr.isatty()
    )
    typer.echo(f"{summary(manifest)}\n{output}")


@app.command()
def split(
    folder: Folder,
    parts: Annotated[int, typer.Option(help="How many.")],
    output: Output,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a split corpus at --output.")
    ] = False,
) -> None:
    """Cut a prepared corpus into several of about equal tokens."""
    from data_tools.tools.split import split as run

    for number, manifest in enumerate(
        run(folder, parts, output, force=force, progress=sys.stderr.isatty())
    ):
        (documents, tokens, _), (held_out, held_out_tokens, _) = (
            manifest.totals("train"),
            manifest.totals("validation"),
        )
        typer.echo(
            f"{output}/part-{number:05d}: train {documents:,} documents, {tokens:,} tokens; "
            f"validation {held_out:,} documents, {held_out_tokens:,} tokens"
        )


@app.command()
def export(
    folder: Folder,
    output: Annotated[str, typer.Option(help="File to make: .jsonl, .jsonl.gz or .jsonl.zst.")],
    split: Annotated[
        str | None, typer.Option(help="train or validation; default: both, in this order.")
    ] = None,
    text_field: TextField = "text",
    force: Force = False,
) -> None:
    """Decode the documents of a prepared corpus to JSON Lines."""
    from data_tools.tools.export import export as run

    made = run(
        folder,
        output,
        split=split,
        text_field=text_field,
        force=force,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{output}: {made.documents:,} documents, {made.text_bytes:,} bytes of text")
    if made.text_bytes != made.prepared_bytes:
        typer.echo(
            f"not the text as it was prepared, which has {made.prepared_bytes:,} bytes: the"
            " tokenizer gives some texts back changed"
        )


@app.command("import")
def import_(
    shards: Annotated[
        list[str],
        typer.Argument(help="Megatron datasets: .bin, .idx, or their name without suffix."),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="The tokenizer they were made with: folder, tokenizer.json or SentencePiece model."
        ),
    ],
    output: Output,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents held out, by hash of their text.")
    ] = 0.005,
    add_special_tokens: AddSpecial = False,
    shard_tokens: ShardTokens = 2**28,
    force: Force = False,
) -> None:
    """Make a prepared corpus of Megatron datasets that other tools tokenized."""
    from data_tools.job.finish import summary
    from data_tools.tools.import_datasets import ImportOptions, import_datasets

    made = import_datasets(
        shards,
        tokenizer,
        output,
        ImportOptions(validation_fraction, add_special_tokens, shard_tokens),
        force=force,
        progress=sys.stderr.isatty(),
    )
    typer.echo(summary(made.manifest))
    if made.eos_added:
        typer.echo(f"EOS appended to {made.eos_added:,} documents that did not end with it")
    for doubt in made.doubts:
        typer.echo(f"warning: {doubt}", err=True)
    if made.special_inside:
        typer.echo(
            f"{made.special_inside:,} documents hold BOS or EOS before their end; kept as they are"
        )
    typer.echo(output)


@app.command()
def inspect(
    folder: Folder,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each split to show.")] = 3,
    sequence_length: Annotated[
        int | None, typer.Option(help="Count windows of so many tokens, and the tokens in none.")
    ] = None,
    png: Annotated[
        str | None, typer.Option(help="Draw the histogram of document lengths into this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a prepared corpus holds."""
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
    folder: Folder, workers: Annotated[int, typer.Option(help="Shards looked at at a time.")] = 1
) -> None:
    """Recompute checksums and check every token, document and count of a prepared corpus."""
    from data_tools.job.progress import progress_bar
    from data_tools.tools.verify import verify_prepared_corpus
    from llada.data.corpus import Manifest

    try:
        total = sum(entry.tokens for entry in Manifest.load(folder).shards)
    except UserError:
        total = 0  # the verification says what is wrong
    with progress_bar(sys.stderr.isatty(), "verifying", total) as done:
        found = verify_prepared_corpus(folder, workers, lambda entry: done(entry.tokens))
    if len(found) == 1:
        raise UserError(found[0])
    for line in found:
        typer.echo(line)
    if found:
        raise UserError(f"{folder}: {len(found)} problems, the first: {found[0]}")
    shards = Manifest.load(folder).shards
    typer.echo(
        f"ok: {len(shards)} shards, {sum(s.documents for s in shards):,} documents,"
        f" {sum(s.tokens for s in shards):,} tokens"
    )


@tokenizer_app.command()
def train(
    input: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Ids in all, LLaDA's 6 special tokens included.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    kind: Annotated[
        str, typer.Option(help="byte-bpe, or a SentencePiece model: unigram, bpe.")
    ] = "byte-bpe",
    sample_bytes: Annotated[
        int, typer.Option(help="Bytes of text to train on, chosen over the whole input.")
    ] = 100_000_000,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Train a tokenizer that gives every text back; LLaDA's special tokens take the last ids."""
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.sources import parse_extensions
    from data_tools.tokenizers.training import train_tokenizer

    made = train_tokenizer(
        [*input, *(more or [])],
        vocab_size,
        output,
        kind=kind,
        sample_bytes=sample_bytes,
        options=ReadOptions(text_field, parse_extensions(ext), skip_bad),
        force=force,
    )
    ids = made.tokenizer
    fewer = (
        f" (the text has pairs for no more than that, {vocab_size:,} were asked for)"
        if ids.vocab_size < vocab_size
        else ""
    )
    typer.echo(
        f"{output}: {ids.vocab_size:,} ids{fewer}, {ids.rows:,} rows, mask {ids.mask_id}, EOS"
        f" {ids.eos_id}"
    )
    typer.echo(f"trained on {made.sample_bytes:,} of {made.text_bytes:,} bytes of text")
    typer.echo(f"{made.fit}, a sample of these")


@tokenizer_app.command()
def info(
    path: Annotated[
        str, typer.Argument(help="Hugging Face folder, tokenizer.json or SentencePiece model.")
    ],
    input: Annotated[
        list[str] | None,
        typer.Option("--input", help="File or folder to measure it on; repeat it."),
    ] = None,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
) -> None:
    """Show size, kind and special tokens of a tokenizer, what encodes for it, and how it cuts a
    text.
    """
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.sources import parse_extensions
    from data_tools.tokenizers.description import describe_tokenizer

    typer.echo(
        describe_tokenizer(
            path, input or [], ReadOptions(text_field, parse_extensions(ext), skip_bad)
        )
    )

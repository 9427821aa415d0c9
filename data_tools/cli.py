"""The `llada data` commands: thin, and quick to import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llada.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Tokenize, shard, inspect and verify corpora.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and look at tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")

Inputs = Annotated[list[str], typer.Option("--input", help="File or folder; repeat it, or list more after it.")]
MoreInputs = Annotated[list[str] | None, typer.Argument(help="Further inputs.")]
TextField = Annotated[str, typer.Option(help="JSONL field with the text.")]
Extensions = Annotated[
    list[str] | None, typer.Option("--ext", help="Extensions read in folders, as in --ext py,md; default: text and code.")
]
SkipBad = Annotated[bool, typer.Option(help="Count bad JSONL lines instead of stopping.")]
Force = Annotated[bool, typer.Option(help="Replace what is at --output.")]
Folder = Annotated[str, typer.Argument(help="Folder of a prepared corpus.")]


@app.command()
def prepare(
    input: Inputs,
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents held out, by hash of their text.")] = 0.005,
    add_special_tokens: Annotated[bool, typer.Option(help="Append LLaDA's special tokens that the tokenizer lacks.")] = False,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens after which a new shard starts.")] = 2**28,
    force: Force = False,
) -> None:
    """Tokenize text into a folder of shards that training reads."""
    from data_tools.prepare import prepare as run
    from data_tools.prepare import summary

    manifest = run(
        [*input, *(more or [])],
        tokenizer,
        output,
        validation_fraction=validation_fraction,
        add_special_tokens=add_special_tokens,
        text_field=text_field,
        extensions=ext,
        skip_bad=skip_bad,
        shard_tokens=shard_tokens,
        force=force,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{summary(manifest)}\n{output}")


@app.command()
def inspect(folder: Folder, samples: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3) -> None:
    """Show what a prepared corpus holds."""
    from data_tools.inspect import describe

    typer.echo(describe(folder, samples))


@app.command()
def verify(folder: Folder) -> None:
    """Recompute checksums and check every token, document and count of a prepared corpus."""
    from llada.data.shards import Corpus, problems

    found = problems(folder)
    for line in found:
        typer.echo(line)
    if found:
        raise UserError(f"'{folder}': {len(found)} problem{'s' if len(found) > 1 else ''}, the first: {found[0]}")
    manifest = Corpus.open(folder).manifest
    typer.echo(f"ok: {len(manifest.shards)} shards, {sum(shard.tokens for shard in manifest.shards):,} tokens")


@tokenizer_app.command()
def train(
    input: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Ids in all, LLaDA's 6 special tokens included.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Train a byte-level BPE; LLaDA's special tokens take the last ids."""
    import os
    import shutil

    from data_tools.readers import ReadOptions, Report, parse_extensions, read
    from llada.tokenizer import train_byte_level_bpe

    target = Path(output)
    if target.exists() and not (force and (target / "tokenizer_config.json").is_file()):
        raise UserError(f"--output: '{output}' exists" + ("" if force else "; --force replaces a tokenizer"))
    options = ReadOptions(text_field, parse_extensions(ext), skip_bad)
    made = train_byte_level_bpe(read([*input, *(more or [])], options, Report()), vocab_size)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        made.save(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fewer = f" (the text has pairs for no more than that, {vocab_size:,} were asked for)" if made.vocab_size < vocab_size else ""
    typer.echo(f"{output}: {made.vocab_size:,} ids{fewer}, {made.rows:,} rows, mask {made.mask_id}, EOS {made.eos_id}")


@tokenizer_app.command()
def info(path: Annotated[str, typer.Argument(help="Hugging Face folder, tokenizer.json or SentencePiece model.")]) -> None:
    """Show size and special tokens of a tokenizer."""
    from llada.tokenizer import Tokenizer

    found = Tokenizer.load(path, require_mask=False)
    typer.echo(f"{path}: {found.vocab_size:,} ids, {found.rows:,} rows, fingerprint {found.fingerprint}")
    for role, (content, token_id) in sorted(found.special_tokens().items(), key=lambda item: item[1][1]):
        typer.echo(f"{token_id:>8}  {content}  ({role})")
    if found.mask_id < 0:
        typer.echo("no mask token: `llada data prepare --add-special-tokens` appends LLaDA's")

"""The `llada data` commands: thin, and quick to import."""

from __future__ import annotations

import sys
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
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count bad JSONL lines instead of stopping.")]
AddSpecial = Annotated[bool, typer.Option("--add-special-tokens", help="Append LLaDA's special tokens that the tokenizer lacks.")]
ShardTokens = Annotated[int, typer.Option(min=1, help="Tokens with which a shard is full.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --output.")]
Folder = Annotated[str, typer.Argument(help="Folder of a prepared corpus.")]


@app.command()
def prepare(
    input: Inputs,
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents held out, by hash of their text.")] = 0.005,
    add_special_tokens: AddSpecial = False,
    text_field: TextField = "text",
    ext: Extensions = None,
    skip_bad: SkipBad = False,
    shard_tokens: ShardTokens = 2**28,
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


@app.command("prepare-sft")
def prepare_sft(
    input: Inputs,
    tokenizer: Annotated[str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    more: MoreInputs = None,
    prompt_field: Annotated[str, typer.Option(help="JSONL field with the prompt.")] = "prompt",
    response_field: Annotated[str, typer.Option(help="JSONL field with the response.")] = "response",
    messages_field: Annotated[str, typer.Option(help="JSONL field with a list of turns; it goes before the other two.")] = "messages",
    validation_fraction: Annotated[float, typer.Option(help="Share of the conversations held out, by hash of their question.")] = 0.005,
    add_special_tokens: AddSpecial = False,
    skip_bad: SkipBad = False,
    shard_tokens: ShardTokens = 2**28,
    force: Force = False,
) -> None:
    """Encode conversations into a folder of shards that fine-tuning reads."""
    from data_tools.prepare import summary
    from data_tools.sft import Fields
    from data_tools.sft import prepare_sft as run

    manifest = run(
        [*input, *(more or [])],
        tokenizer,
        output,
        fields=Fields(prompt_field, response_field, messages_field),
        validation_fraction=validation_fraction,
        add_special_tokens=add_special_tokens,
        skip_bad=skip_bad,
        shard_tokens=shard_tokens,
        force=force,
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{summary(manifest)}\n{output}")


@app.command()
def inspect(folder: Folder, samples: Annotated[int, typer.Option(min=0, help="Documents of each split to show.")] = 3) -> None:
    """Show what a prepared corpus holds."""
    from data_tools.inspect import describe

    typer.echo(describe(folder, samples))


@app.command()
def verify(folder: Folder) -> None:
    """Recompute checksums and check every token, document and count of a prepared corpus."""
    from data_tools.inspect import check
    from llada.data.corpus import Manifest

    found = check(folder)
    for line in found:
        typer.echo(line)
    if found:
        raise UserError(f"{folder}: {len(found)} problem{'s' if len(found) > 1 else ''}, the first: {found[0]}")
    shards = Manifest.load(folder).shards
    typer.echo(f"ok: {len(shards)} shards, {sum(s.documents for s in shards):,} documents, {sum(s.tokens for s in shards):,} tokens")


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
    from data_tools.prepare import train_tokenizer

    made, ratio = train_tokenizer(
        [*input, *(more or [])], vocab_size, output, text_field=text_field, extensions=ext, skip_bad=skip_bad, force=force
    )
    fewer = f" (the text has pairs for no more than that, {vocab_size:,} were asked for)" if made.vocab_size < vocab_size else ""
    typer.echo(f"{output}: {made.vocab_size:,} ids{fewer}, {made.rows:,} rows, mask {made.mask_id}, EOS {made.eos_id}")
    typer.echo(f"{ratio:.2f} bytes per token on a sample of the input")


@tokenizer_app.command()
def info(path: Annotated[str, typer.Argument(help="Hugging Face folder, tokenizer.json or SentencePiece model.")]) -> None:
    """Show size and special tokens of a tokenizer."""
    from llada.tokenizer import SPECIAL_TOKENS, Tokenizer

    found = Tokenizer.load(path, require_mask=False)
    typer.echo(f"{path}: {found.vocab_size:,} ids, {found.rows:,} rows, fingerprint {found.fingerprint}")
    ids = {"bos": found.bos_id, "eos": found.eos_id, "pad": found.pad_id, "mask": found.mask_id}
    for role, token_id in ids.items():
        if token_id is None or token_id < 0:
            typer.echo(f"{role:>4}: none")
        else:
            typer.echo(f"{role:>4}: {token_id} {found.token(token_id)}")
    missing = [name for name in SPECIAL_TOKENS if found.id_of(name) is None]
    if missing:
        typer.echo(f"without {' '.join(missing)}; `llada data prepare --add-special-tokens` appends them")

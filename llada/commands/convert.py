"""The commands `llada convert to-hf` and `llada convert from-hf`."""

from __future__ import annotations

from typing import Annotated

import typer

from llada.commands.common import clean_up_on_sigterm, slow_imports

convert_app = typer.Typer(
    no_args_is_help=True, help="Convert checkpoints to and from Hugging Face folders."
)


@convert_app.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, or run folder (its latest checkpoint).")
    ],
    out: Annotated[str, typer.Argument(help="Folder to create.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: the precision of the run.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Maximum size of a weight file, such as 5GB or 500MiB.")
    ] = "5GB",
    average: Annotated[
        int,
        typer.Option(help="Average the run's last N checkpoints, up to this one."),
    ] = 1,
    license: Annotated[
        str, typer.Option(help="License identifier for the model card, such as apache-2.0.")
    ] = "unknown",
    verify: Annotated[
        bool,
        typer.Option(help="Compare the exported model in transformers with the training model."),
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Save tokens and logits of the training model to a safetensors file."),
    ] = None,
    skip_checksums: Annotated[
        bool,
        typer.Option("--skip-checksums", help="Do not verify the checkpoint's checksums."),
    ] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            help=(
                "llada, or for an autoregressive model llama, which transformers loads without the"
                " folder's code. Default: the one that fits."
            )
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Export CHECKPOINT to a Hugging Face folder that transformers can load."""
    clean_up_on_sigterm()
    with slow_imports():
        from llada.hf.exporting import ExportOptions, export

    options = ExportOptions(
        dtype=dtype,
        force=force,
        max_shard_size=max_shard_size,
        average=average,
        license=license,
        checksums=not skip_checksums,
        layout=layout,
    )
    typer.echo(export(checkpoint, out, verify, reference, options))


@convert_app.command("from-hf")
def from_hf(
    folder: Annotated[
        str, typer.Argument(help="Published LLaDA model, or model with the Llama architecture.")
    ],
    out: Annotated[str, typer.Argument(help="Checkpoint folder to create.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help=(
                "Precision of the stored weights, fp32 or bf16. Default: bf16 stays bf16, and fp16"
                " becomes fp32."
            )
        ),
    ] = None,
    add_mask_token: Annotated[
        bool,
        typer.Option(
            "--add-mask-token",
            help="Add a mask token to the tokenizer and a row for it to the model.",
        ),
    ] = False,
    add_special_tokens: Annotated[
        bool,
        typer.Option(
            "--add-special-tokens",
            help="Add all of LLaDA's special tokens that the tokenizer lacks.",
        ),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or file. Default: the model's folder."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Also read pytorch_model.bin; use only if you trust its author."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Convert the model in a Hugging Face FOLDER to a checkpoint.

    A run with any parallel layout can start from it (run.init_from).
    """
    with slow_imports():
        from llada.hf.importing import ImportOptions
        from llada.hf.importing import from_hf as run

    clean_up_on_sigterm()
    options = ImportOptions(
        dtype, add_mask_token, add_special_tokens, tokenizer, allow_pickle, force
    )
    typer.echo(run(folder, out, options))


def add_to(app: typer.Typer) -> None:
    """Add the group to `llada`."""
    app.add_typer(convert_app, name="convert")

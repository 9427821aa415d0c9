"""The commands that let a model write: `llada sample` and `llada infill`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llada.commands.common import slow_imports

Model = Annotated[
    str, typer.Argument(help="Exported folder, checkpoint, or run (its latest checkpoint).")
]
Steps = Annotated[
    int | None, typer.Option(help="Number of model calls. Default: one per generated token.")
]
Temperature = Annotated[
    float, typer.Option(help="0: always the most likely token; higher: more varied.")
]
Guidance = Annotated[float, typer.Option(help="Strength of classifier-free guidance; 0: none.")]
Remasking = Annotated[
    str,
    typer.Option(
        help="Which predictions a step keeps: low_confidence (the most confident) or random."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Show = Annotated[bool, typer.Option("--show", help="Animate the denoising.")]


def sample(
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(
            help="Text to continue or, with --chat, a question; '-' reads it from stdin."
        ),
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer PROMPT in the model's chat format.")
    ] = False,
    length: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 64,
    steps: Steps = None,
    block_length: Annotated[
        int | None,
        typer.Option(help="Tokens per block; blocks are generated from left to right."),
    ] = None,
    temperature: Temperature = 0.0,
    cfg: Guidance = 0.0,
    remasking: Remasking = "low_confidence",
    seed: Seed = 0,
    show: Show = False,
) -> None:
    """Continue or answer PROMPT with MODEL."""
    with slow_imports():
        from llada.sampling.commands import sample as run
    from llada.sampling.diffusion import SamplingOptions

    options = SamplingOptions(length, steps, block_length, temperature, cfg, remasking, seed)
    typer.echo(run(model, _argument_or_stdin(prompt), chat, options, show))


def infill(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(
            help=(
                "Text with gaps: [MASK] for one token, [MASK*8] for eight; '-' reads it from stdin."
            )
        ),
    ],
    steps: Steps = None,
    temperature: Temperature = 0.0,
    cfg: Guidance = 0.0,
    remasking: Remasking = "low_confidence",
    seed: Seed = 0,
    show: Show = False,
) -> None:
    """Fill the gaps in TEXT with MODEL, using the context on both sides."""
    with slow_imports():
        from llada.sampling.commands import infill as run
    from llada.sampling.diffusion import SamplingOptions

    options = SamplingOptions(
        steps=steps,
        temperature=temperature,
        cfg=cfg,
        remasking=remasking,
        seed=seed,
    )
    typer.echo(run(model, _argument_or_stdin(text), options, show))


def _argument_or_stdin(text: str) -> str:
    if text == "-":
        return sys.stdin.read()
    return text


def add_to(app: typer.Typer) -> None:
    """Add the commands to `llada`."""
    app.command()(sample)
    app.command()(infill)

"""The `llada` command: thin; each command imports what it needs when it runs, so `llada --help`
answers at once.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import typer

from data_tools.cli import app as data_app
from launch.cli import add_to as add_launch_commands
from llada import failures
from llada.errors import RunError, StepError, TryAgain, UserError
from llada.torchrun import explain_exit

Config = Annotated[str, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, as in train.steps=100.")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train masked diffusion language models.",
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data", help="Tokenize, shard, inspect and verify corpora.")
convert_app = typer.Typer(
    no_args_is_help=True, help="Checkpoints to and from the format of Hugging Face."
)
app.add_typer(convert_app, name="convert")
add_launch_commands(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from llada import __version__

        typer.echo(f"llada {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Train masked diffusion language models."""


Rewind = Annotated[
    int | None,
    typer.Option(
        min=0,
        help=(
            "Go back to the checkpoint after so many steps; lr=RATE sets the learning rate from"
            " there on."
        ),
    ),
]
AllowChanged = Annotated[
    bool, typer.Option(help="Resume although settings, data or versions changed; recorded.")
]


@app.command()
def pretrain(
    config: Config,
    overrides: Overrides = None,
    allow_changed: AllowChanged = False,
    rewind: Rewind = None,
) -> None:
    """Pretrain CONFIG: alone, or as each rank of torchrun or srun. Continues from the run's latest
    checkpoint.
    """
    _train("pretrain", config, overrides, allow_changed, rewind)


@app.command()
def sft(
    config: Config,
    overrides: Overrides = None,
    allow_changed: AllowChanged = False,
    rewind: Rewind = None,
) -> None:
    """Fine-tune CONFIG on conversations: alone, or as each rank of torchrun or srun. Continues from
    the latest checkpoint.
    """
    _train("sft", config, overrides, allow_changed, rewind)


@contextmanager
def _slow_imports() -> Iterator[None]:
    """Import without garbage collections, which take a quarter of the time and find nothing; what
    is imported is here to stay.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(
    task: Literal["pretrain", "sft"],
    config: str,
    overrides: list[str] | None,
    allow_changed: bool,
    rewind: int | None,
) -> None:
    from llada.training.signals import StopRequest

    stop = StopRequest().install()  # before the slow imports
    from llada.training.configure import load_config

    resolved = load_config(config, overrides, task=task, rewind=rewind)
    with _slow_imports():
        from llada.training.loop import train

    code = train(resolved, stop, allow_changed, rewind)
    stop.close()
    if code:
        explain_exit(
            "not finished: stopped with a checkpoint; run the same command again to continue"
        )
    raise typer.Exit(code)


@app.command("config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved CONFIG: every setting, defaults and overrides applied; then its size,
    FLOPs and checkpoints as comments.
    """
    from llada.config import to_yaml
    from llada.planning.summary import describe
    from llada.training.configure import load_config

    resolved = load_config(config, overrides)
    typer.echo(to_yaml(resolved), nl=False)
    for line in describe(resolved):
        typer.echo(f"# {line}")


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders; the others are compared with the first.")
    ],
    step: Annotated[
        str | None,
        typer.Option(
            help=(
                "Validation to compare: a number of steps, or `last` of each; the newest that all"
                " have if left out."
            )
        ),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Compare this corpus only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the validations of RUNS item by item: differences with their errors."""
    import orjson

    from llada.training import comparison

    opened = comparison.open_runs(runs, step, corpus)
    differences = comparison.compare(opened)
    if as_json:
        typer.echo(
            orjson.dumps(comparison.as_json(opened, differences), option=orjson.OPT_INDENT_2)
        )
    else:
        typer.echo(comparison.in_words(opened, differences))


@convert_app.command("to-hf")
def to_hf(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a run: its latest.")],
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; as the run computed if left out.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, as 5GB or 500MiB.")
    ] = "5GB",
    average: Annotated[
        int,
        typer.Option(help="Write the mean of so many of the run's checkpoints, up to this one."),
    ] = 1,
    license: Annotated[
        str, typer.Option(help="Identifier of the licence for the model card, as apache-2.0.")
    ] = "unknown",
    verify: Annotated[
        bool, typer.Option(help="Compare the folder in plain transformers with the training model.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Keep the training model's tokens and logits in this safetensors file."),
    ] = None,
    skip_checksums: Annotated[
        bool,
        typer.Option(
            "--skip-checksums", help="Do not compare the files with their checksums first."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an export that is there.")
    ] = False,
) -> None:
    """Write CHECKPOINT as a Hugging Face folder that transformers loads."""
    _clean_up_on_sigterm()
    with _slow_imports():
        from llada.hf.convert import convert

    options = {
        "dtype": dtype,
        "force": force,
        "max_shard_size": max_shard_size,
        "average": average,
        "license_": license,
    }
    typer.echo(convert(checkpoint, out, verify, reference, checksums=not skip_checksums, **options))


@convert_app.command("from-hf")
def from_hf(
    folder: Annotated[
        str, typer.Argument(help="Published LLaDA folder, or a Llama-architecture model.")
    ],
    out: Annotated[str, typer.Argument(help="Checkpoint folder to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="fp32 or bf16 of the stored weights; bf16 stays, fp16 becomes fp32 if left out."
        ),
    ] = None,
    add_mask_token: Annotated[
        bool,
        typer.Option("--add-mask-token", help="Give the tokenizer a mask token, with a new row."),
    ] = False,
    add_special_tokens: Annotated[
        bool,
        typer.Option(
            "--add-special-tokens",
            help="Give the tokenizer all of LLaDA's special tokens that it lacks.",
        ),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or file of the tokenizer; the model's own folder if left out."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin, whose maker you trust.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there.")
    ] = False,
) -> None:
    """Write the model of a Hugging Face FOLDER as a checkpoint that a run of any layout starts from
    (run.init_from).
    """
    with _slow_imports():
        from llada.hf.importing import ImportOptions
        from llada.hf.importing import from_hf as run

    _clean_up_on_sigterm()
    options = ImportOptions(
        dtype, add_mask_token, add_special_tokens, tokenizer, allow_pickle, force
    )
    typer.echo(run(folder, out, options))


def _clean_up_on_sigterm() -> None:
    """End as with Ctrl-C, which removes what is half written: SIGTERM is what schedulers and
    containers send.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)


Model = Annotated[
    str, typer.Argument(help="Exported folder, checkpoint, or run: its latest checkpoint.")
]
Steps = Annotated[int | None, typer.Option(help="Calls of the model; one a token if left out.")]
Temperature = Annotated[float, typer.Option(help="0: the best token; higher is more varied.")]
Guidance = Annotated[float, typer.Option(help="Strength of classifier-free guidance; 0: none.")]
Remasking = Annotated[
    str, typer.Option(help="What a step keeps: low_confidence (the surest) or random.")
]
Seed = Annotated[int, typer.Option(help="Key of the noise.")]
Show = Annotated[bool, typer.Option("--show", help="Play the denoising step by step.")]


@app.command()
def sample(
    model: Model,
    prompt: Annotated[
        str,
        typer.Argument(
            help="Text to continue, or with --chat a question; '-' reads it from stdin."
        ),
    ] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Answer PROMPT in the chat format.")] = False,
    length: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    steps: Steps = None,
    block_length: Annotated[
        int | None, typer.Option(help="Tokens of a block; blocks go from left to right.")
    ] = None,
    temperature: Temperature = 0.0,
    cfg: Guidance = 0.0,
    remasking: Remasking = "low_confidence",
    seed: Seed = 0,
    show: Show = False,
) -> None:
    """Continue PROMPT, or answer it, with MODEL."""
    with _slow_imports():
        from llada.sampling.commands import sample as run
    from llada.sampling.diffusion import SamplingOptions

    options = SamplingOptions(
        length, length if steps is None else steps, block_length, temperature, cfg, remasking, seed
    )
    typer.echo(run(model, sys.stdin.read() if prompt == "-" else prompt, chat, options, show))


@app.command()
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
    """Fill the gaps of TEXT from both sides with MODEL."""
    with _slow_imports():
        from llada.sampling.commands import infill as run
    from llada.sampling.diffusion import SamplingOptions

    options = SamplingOptions(
        steps=1 if steps is None else steps,
        temperature=temperature,
        cfg=cfg,
        remasking=remasking,
        seed=seed,
    )
    typer.echo(run(model, sys.stdin.read() if text == "-" else text, options, steps is None, show))


@data_app.command("step")
def data_step(
    config: Config,
    step: Annotated[int, typer.Argument(min=1, help="Training step, from 1.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to print.")] = 8,
) -> None:
    """Print corpora, documents, t and masks of step STEP, without a model."""
    from llada.training.configure import load_config
    from llada.training.preview import describe_step

    typer.echo(describe_step(load_config(config, overrides), step, samples))


@app.command()
def demo(
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Text or code, files or folders; the Python standard library if left out."
        ),
    ] = None,
    config: Annotated[
        str, typer.Option(help="Config of the pretraining.")
    ] = "configs/demo/pretrain.yaml",
    sft_config: Annotated[
        str, typer.Option(help="Config of the fine-tuning.")
    ] = "configs/demo/sft.yaml",
    dir: Annotated[
        str | None,
        typer.Option(help="Where everything goes; runs/demo, or runs/demo_smoke with --smoke."),
    ] = None,
    smoke: Annotated[
        bool, typer.Option(help="A few steps only, to see that every stage works.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option(help="Start over instead of going on with what is there.")
    ] = False,
) -> None:
    """Real text to a model that writes: tokenizer, corpus, pretraining, fine-tuning, Hugging Face
    folder, report.
    """
    from llada.training.signals import StopRequest

    stop = StopRequest().install()
    from llada.demo import run_demo

    code = run_demo(
        stop,
        input,
        (config, sft_config),
        dir or ("runs/demo_smoke" if smoke else "runs/demo"),
        smoke,
        fresh,
    )
    stop.close()
    raise typer.Exit(code)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Report what this machine has for training, and what to do about what it lacks. Exit 1 if that
    blocks training.
    """
    from llada.doctor import examine

    found = examine()
    typer.echo(found.to_json() if as_json else str(found))
    raise typer.Exit(found.code)


def main() -> None:
    """Entry point. Users' mistakes: one line, exit 2. Failures: one last line, exit 1."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal without ± shows \xb1 instead of a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        # Megatron-Core and torch announce absent extras and coming renames, 20 lines a start;
        # nothing a user could act on.
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    try:
        app(standalone_mode=True)
    except UserError as error:
        _leave(f"error: {error}", 2)
    except RunError as error:
        if isinstance(error, StepError):
            failures.report("step")
        _leave(f"failed: {error}", 1)
    except TryAgain as error:
        _leave(f"not finished: {error}", 75)
    except KeyboardInterrupt as interrupt:
        _leave(f"interrupted{interrupt}", 130)
    except Exception as error:
        # not foreseen: the traceback for us, and one clear last line for everyone
        traceback.print_exc()
        _leave(f"failed: {type(error).__name__}: {error}", 1)


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    line = " ".join(message.split())
    print(line, file=sys.stderr, flush=True)
    if code in (2, 75):  # of a failure, the first rank that had it is not always the cause
        explain_exit(line)
    # Not sys.exit: other ranks may be stuck in a collective with this one, and their threads must
    # not delay the end.
    os._exit(code)

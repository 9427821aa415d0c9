"""Options that several `llada data` commands share, each declared once.

Types such as `Inputs` are for single parameters. `CorpusFlags` and `ExecutionFlags` are groups: a
command that takes a group as a parameter gets an option for each of its fields, through
`expand_groups`. Default values are those of `data_tools.job.options`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, TypeVar, get_type_hints

import typer

from data_tools.defaults import SHARD_TOKENS
from data_tools.job.options import CorpusOptions, DecontaminationOptions, ExecutionOptions

R = TypeVar("R")

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input", help="File, folder, pattern or hf:DATASET; repeat it, or list more after it."
    ),
]
MoreInputs = Annotated[list[str] | None, typer.Argument(help="Further inputs.")]
TokenizerPath = Annotated[
    str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")
]
OutputFolder = Annotated[str, typer.Option(help="Folder to make.")]
CorpusFolder = Annotated[str, typer.Argument(help="Folder of a prepared corpus.")]
TextField = Annotated[str, typer.Option(help="JSONL field with the text.")]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--ext",
        help="Extensions to read in folders, as in --ext py,md; default: text and code.",
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Count bad lines, elements and rows instead of stopping."),
]
ValidationFraction = Annotated[
    float, typer.Option(help="Share of the documents held out, by hash of their text.")
]
AddSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--add-special-tokens",
        help="Append the special tokens of LLaDA that the tokenizer lacks.",
    ),
]
ShardTokens = Annotated[int, typer.Option(min=1, help="Tokens with which a shard is full.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --output.")]


@dataclass(frozen=True)
class CorpusFlags:
    """How `prepare` and `prepare-sft` write a corpus."""

    add_special_tokens: AddSpecialTokens = False
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Leave out exact copies of earlier documents.")
    ] = False
    shard_tokens: ShardTokens = SHARD_TOKENS
    unit_bytes: Annotated[
        int | None,
        typer.Option(
            help=(
                "Bytes of text in a unit of work; default: a 64th of the whole, from 4 MiB to 256"
                " MiB."
            )
        ),
    ] = None
    force: Force = False

    def to_options(
        self,
        validation_fraction: float,
        decontamination: DecontaminationOptions | None = None,
    ) -> CorpusOptions:
        return CorpusOptions(
            validation_fraction,
            self.add_special_tokens,
            self.shard_tokens,
            self.unit_bytes,
            self.dedup,
            decontamination,
            self.force,
        )


@dataclass(frozen=True)
class ExecutionFlags:
    """How `prepare` and `prepare-sft` share out their work."""

    workers: Annotated[
        int | None,
        typer.Option(help="Processes on this machine; default: one for each core it may use."),
    ] = None
    task: Annotated[int, typer.Option(help="Number of this task, from 0, among --tasks.")] = 0
    tasks: Annotated[
        int, typer.Option(help="Tasks that share the output folder, like those of a Slurm array.")
    ] = 1
    wait: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for other tasks where their results are needed (--dedup)."
        ),
    ] = ExecutionOptions.wait

    def to_options(self, backend: str = ExecutionOptions.backend) -> ExecutionOptions:
        workers = self.workers
        if workers is None:
            # Not os.cpu_count: a Slurm job may use fewer cores than the machine has.
            workers = len(os.sched_getaffinity(0))
        return ExecutionOptions(
            workers, self.task, self.tasks, self.wait, backend, stream=sys.stderr
        )


def expand_groups(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command one option for each field of the parameters that are groups of options.

    typer makes an option of each parameter in a function's signature and knows no groups. So the
    function it sees has the fields of a group in place of the group:

        def prepare(output: str, execution: ExecutionFlags)             as written
        def prepare(*, output: str, workers: ..., task: ..., ...)       as typer sees it
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        annotation = parameter.annotation
        if isinstance(annotation, type) and is_dataclass(annotation):
            groups[parameter.name] = annotation
            parameters += _parameters_of(annotation)
        else:
            # typer calls with keywords, and of these the ones with defaults may come first.
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def expanded(**values: object) -> R:
        for name, group in groups.items():
            group_values = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**group_values)
        return command(**values)

    expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {own.name: own.annotation for own in parameters}
    return expanded


def _parameters_of(group: type) -> list[inspect.Parameter]:
    """Return a keyword parameter for each field of a group."""
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=types[field.name],
        )
        for field in fields(group)
    ]

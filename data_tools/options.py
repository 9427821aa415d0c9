"""Options of the `llada data` commands, each declared once.

Types such as `Inputs` declare one option. Classes such as `CorpusFlags` declare a group: a command
that takes a group as a parameter gets an option per field, through `expand_groups`. A group also
turns its values into the options of the library.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar, get_type_hints

import typer

from data_tools.defaults import SHARD_TOKENS, VALIDATION_FRACTION
from data_tools.job.options import CorpusOptions, DecontaminationOptions, ExecutionOptions

if TYPE_CHECKING:
    from data_tools.documents.conversations import ConversationType
    from data_tools.documents.text import TextType

R = TypeVar("R")

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input", help="File, folder, pattern or hf:DATASET; repeatable, or list more after it."
    ),
]
MoreInputs = Annotated[list[str] | None, typer.Argument(help="Further inputs.")]
TokenizerPath = Annotated[
    str, typer.Option(help="Hugging Face folder, tokenizer.json or SentencePiece model.")
]
OutputPath = Annotated[str, typer.Option(help="Folder to create.")]
CorpusFolder = Annotated[str, typer.Argument(help="Folder of a prepared corpus.")]
TextField = Annotated[str, typer.Option(help="JSON field or table column that contains the text.")]
Extensions = Annotated[
    list[str] | None,
    typer.Option(
        "--ext",
        help="Extensions to read in folders, such as py,md. Default: text and code.",
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Count bad lines, elements and rows instead of stopping."),
]
ValidationFraction = Annotated[
    float, typer.Option(help="Fraction of the documents to hold out, by hash of their text.")
]
AddSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--add-special-tokens",
        help="Append the LLaDA special tokens that the tokenizer lacks.",
    ),
]
ShardTokens = Annotated[int, typer.Option(min=1, help="Number of tokens at which a shard is full.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result at --output.")]


@dataclass(frozen=True)
class TextFlags:
    """What `prepare` reads, and how texts are filtered and encoded."""

    text_field: TextField = "text"
    ext: Extensions = None
    skip_bad: SkipBad = False
    min_length: Annotated[int, typer.Option(help="Minimum length of a text, in UTF-8 bytes.")] = 1
    max_length: Annotated[
        int, typer.Option(help="Maximum length of a text, in UTF-8 bytes; bounds memory.")
    ] = 64 << 20
    split: Annotated[str, typer.Option(help="Split of hf: inputs, such as train[:1%].")] = "train"
    name: Annotated[
        str | None, typer.Option(help="Configuration of hf: inputs, such as sample-10BT.")
    ] = None
    revision: Annotated[str | None, typer.Option(help="Commit or tag of hf: inputs.")] = None
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read hf: inputs without a complete download.")
    ] = False
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Leave out documents that overlap with the texts of this evaluation file;"
                " repeatable."
            )
        ),
    ] = None
    decontaminate_ngram: Annotated[
        int, typer.Option(min=1, help="Consecutive words that count as an overlap.")
    ] = DecontaminationOptions.ngram
    decontaminate_count: Annotated[
        bool, typer.Option("--decontaminate-count", help="Count such documents, but keep them.")
    ] = False
    backend: Annotated[
        str, typer.Option(help="Encoder: auto, gigatoken, fastokens or library.")
    ] = ExecutionOptions.backend

    def document_type(self) -> TextType:
        from data_tools.documents.text import TextType
        from data_tools.readers.options import ReadOptions
        from data_tools.readers.sources import parse_extensions

        options = ReadOptions(
            text_field=self.text_field,
            extensions=parse_extensions(self.ext),
            skip_bad=self.skip_bad,
            min_length=self.min_length,
            max_length=self.max_length,
            split=self.split,
            name=self.name,
            revision=self.revision,
            streaming=self.streaming,
        )
        return TextType(options)

    def decontamination(self) -> DecontaminationOptions | None:
        if not self.decontaminate:
            return None
        return DecontaminationOptions(
            files=tuple(self.decontaminate),
            ngram=self.decontaminate_ngram,
            drop=not self.decontaminate_count,
        )


@dataclass(frozen=True)
class ConversationFlags:
    """Where `prepare-sft` finds conversations in records, and how it encodes them."""

    prompt_field: Annotated[str, typer.Option(help="Field with the prompt.")] = "prompt"
    response_field: Annotated[str, typer.Option(help="Field with the response.")] = "response"
    messages_field: Annotated[
        str, typer.Option(help="Field with a list of turns, each with role and content.")
    ] = "messages"
    conversations_field: Annotated[
        str, typer.Option(help="Field with a list of turns, each with from and value.")
    ] = "conversations"
    system_field: Annotated[str, typer.Option(help="Field with an optional system prompt.")] = (
        "system"
    )
    context_field: Annotated[
        str | None,
        typer.Option(help="Field whose text, if any, is appended to the prompt of a pair."),
    ] = None
    format: Annotated[
        str,
        typer.Option(
            help=(
                "Conversation format: auto (detected from a record's fields), prompt-response,"
                " messages, sharegpt or alpaca."
            )
        ),
    ] = "auto"
    chat_template: Annotated[
        str,
        typer.Option(
            help=(
                "llada (LLaDA's format), tokenizer (the tokenizer's chat template) or a Jinja file."
            )
        ),
    ] = "llada"
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of a reply with its prompt and EOS; longer ones are left out."
        ),
    ] = None
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer replies to --max-tokens, without EOS.")
    ] = False
    drop_trailing: Annotated[
        bool, typer.Option("--drop-trailing", help="Drop turns after the last reply.")
    ] = False
    join_turns: Annotated[
        bool, typer.Option("--join-turns", help="Merge consecutive turns of one role.")
    ] = False
    skip_bad: SkipBad = False

    def document_type(self, tokenizer: str) -> ConversationType:
        """Return the type; `tokenizer` is the path of one whose chat template may be chosen."""
        from data_tools.documents.conversation_records import ConversationFields
        from data_tools.documents.conversations import (
            ConversationSettings,
            ConversationType,
            read_chat_template,
        )
        from data_tools.readers.options import ReadOptions

        fields = ConversationFields(
            prompt=self.prompt_field,
            response=self.response_field,
            messages=self.messages_field,
            conversations=self.conversations_field,
            system=self.system_field,
            context=self.context_field,
            form=self.format,
            drop_trailing=self.drop_trailing,
            join_turns=self.join_turns,
        )
        template = read_chat_template(self.chat_template, tokenizer)
        settings = ConversationSettings(fields, template, self.max_tokens, self.truncate)
        options = ReadOptions(text_field=None, skip_bad=self.skip_bad)
        return ConversationType(settings, self.chat_template, options)


@dataclass(frozen=True)
class CorpusFlags:
    """How `prepare` and `prepare-sft` write a corpus."""

    validation_fraction: Annotated[
        float,
        typer.Option(
            help=(
                "Fraction of the documents to hold out, by hash of their text (of conversations: of"
                " the turns before the first reply)."
            )
        ),
    ] = VALIDATION_FRACTION
    add_special_tokens: AddSpecialTokens = False
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Leave out exact copies of earlier documents.")
    ] = False
    shard_tokens: ShardTokens = SHARD_TOKENS
    unit_bytes: Annotated[
        int | None,
        typer.Option(
            help=(
                "Bytes of text in a unit of work. Default: a 64th of the whole, from 4 MiB to 256"
                " MiB."
            )
        ),
    ] = None
    force: Force = False

    def to_options(self, decontamination: DecontaminationOptions | None = None) -> CorpusOptions:
        return CorpusOptions(
            validation_fraction=self.validation_fraction,
            add_special_tokens=self.add_special_tokens,
            shard_tokens=self.shard_tokens,
            unit_bytes=self.unit_bytes,
            dedup=self.dedup,
            decontamination=decontamination,
            force=self.force,
        )


@dataclass(frozen=True)
class ExecutionFlags:
    """How `prepare` and `prepare-sft` divide their work."""

    workers: Annotated[
        int | None,
        typer.Option(help="Processes on this machine. Default: one per available core."),
    ] = None
    task: Annotated[int, typer.Option(help="Index of this task, from 0 to --tasks - 1.")] = 0
    tasks: Annotated[
        int, typer.Option(help="Number of tasks that share the output folder (a job array).")
    ] = 1
    wait: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for other tasks when their results are needed (--dedup)."
        ),
    ] = ExecutionOptions.wait

    def to_options(self, backend: str = ExecutionOptions.backend) -> ExecutionOptions:
        workers = self.workers
        if workers is None:
            # os.cpu_count counts all cores of the machine, of which a Slurm job may use fewer.
            workers = len(os.sched_getaffinity(0))
        return ExecutionOptions(
            workers, self.task, self.tasks, self.wait, backend, stream=sys.stderr
        )


def expand_groups(command: Callable[..., R]) -> Callable[..., R]:
    """Replace each parameter of a command that is a group of options by the fields of the group.

    typer makes an option of each parameter in a function's signature and has no groups. So it is
    given a function with the fields instead of the group:

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
            # Keyword-only, so that parameters with defaults may come before others.
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
    """Return a keyword-only parameter per field of a group."""
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

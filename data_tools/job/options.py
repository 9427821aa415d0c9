"""Options of a preparation that do not depend on the type of its documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

from data_tools.defaults import SHARD_TOKENS, VALIDATION_FRACTION
from llada.errors import UserError

MAX_WORKERS = 4096
MAX_TASKS = 1_000_000
"""Larger numbers are typing errors."""


@dataclass(frozen=True)
class ExecutionOptions:
    """Who does the work and how progress is shown. Nothing here changes what is written.

    Attributes:
        workers: number of processes on this machine.
        task: number of this task, from 0.
        tasks: number of tasks that share the output folder, like those of a Slurm array.
        wait: seconds to wait for the results of other tasks (with `dedup`).
        backend: encoder to use, one of `data_tools.tokenizers.encoders.BACKENDS`.
        stream: stream on which progress is shown, as a bar on a terminal, else as a line every
            half minute; None shows nothing.

    Raises:
        UserError: a value out of range.
    """

    workers: int = 1
    task: int = 0
    tasks: int = 1
    wait: float = 600.0
    backend: str = "auto"
    stream: TextIO | None = None

    def __post_init__(self) -> None:
        check_count("--workers", self.workers, MAX_WORKERS)
        check_count("--tasks", self.tasks, MAX_TASKS)
        if not self.wait >= 0:  # refuses nan too
            raise UserError(f"--wait: {self.wait} is not a number of seconds, 0 or more")
        if not 0 <= self.task < self.tasks:
            raise UserError(
                f"--task: {self.task} is not one of 0..{self.tasks - 1}, the numbers of the tasks"
                f" (--tasks {self.tasks})"
            )


def check_count(setting: str, value: int, maximum: int) -> None:
    """Raise UserError unless `value` is in 1..maximum; messages call it `setting`."""
    if value < 1:
        raise UserError(f"{setting}: {value} is less than 1")
    if value > maximum:
        raise UserError(f"{setting}: {value} exceeds the maximum of {maximum:,}")


def check_validation_fraction(value: float) -> None:
    """Raise UserError unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"--validation-fraction: {value} is not in [0, 1)")


@dataclass(frozen=True)
class DecontaminationOptions:
    """What is done with documents that share an n-gram of words with an evaluation text.

    Attributes:
        files: files of evaluation texts.
        ngram: number of words in an n-gram.
        drop: whether to leave such documents out; otherwise they are counted and kept.
    """

    files: tuple[str, ...]
    ngram: int = 13
    drop: bool = True


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is written.

    Attributes:
        validation_fraction: share of the documents in the validation split, chosen by a hash of
            each document.
        add_special_tokens: whether to append LLaDA's special tokens that the tokenizer lacks, and
            save the result with the corpus.
        shard_tokens: number of tokens with which a shard is full; its last document may exceed it.
        unit_bytes: bytes of text in a unit of work; None for a 64th of the whole, from 4 MiB to
            256 MiB.
        dedup: whether to leave out documents with the text of an earlier one.
        decontamination: what is done with documents that overlap evaluation texts; None to not
            look for any.
        force: whether to replace a prepared corpus at the output, or discard an unfinished one of
            other inputs or settings.

    Raises:
        UserError: a value out of range.
    """

    validation_fraction: float = VALIDATION_FRACTION
    add_special_tokens: bool = False
    shard_tokens: int = SHARD_TOKENS
    unit_bytes: int | None = None
    dedup: bool = False
    decontamination: DecontaminationOptions | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_validation_fraction(self.validation_fraction)
        if self.shard_tokens < 1:
            raise UserError(f"--shard-tokens: {self.shard_tokens} is less than 1")
        if self.unit_bytes is not None and self.unit_bytes < 1:
            raise UserError(f"--unit-bytes: {self.unit_bytes} is less than 1")

    def manifest_options(self) -> dict[str, object]:
        """Return the options that the manifest records, as JSON values.

        `force` is not recorded: it does not change what is in the corpus.
        """
        decontaminate = None
        if self.decontamination is not None:
            decontaminate = {
                "files": list(self.decontamination.files),
                "ngram": self.decontamination.ngram,
                "drop": self.decontamination.drop,
            }
        return {
            "validation_fraction": self.validation_fraction,
            "add_special_tokens": self.add_special_tokens,
            "shard_tokens": self.shard_tokens,
            "unit_bytes": self.unit_bytes,
            "dedup": self.dedup,
            "decontaminate": decontaminate,
        }

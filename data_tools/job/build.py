"""From inputs to the folder of a corpus, whatever its documents are: plan, units over processes and
tasks, end.

The work is cut into units (`data_tools.job.work_plan`) that any number of processes, on any number
of machines that see the output folder, do in any order. Everything is written to OUTPUT.partial,
where each finished unit stays; the folder takes its name when the last is done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.filters import dedup as duplicates
from data_tools.job.finish import finish
from data_tools.job.output import Output
from data_tools.job.pool import Job, run
from data_tools.job.progress import Progress
from data_tools.job.work_plan import WorkPlan, digest_of, make_plan
from data_tools.job.worker import Decontamination, Kind, UnitJob, entry_path, open_contamination
from data_tools.readers.report import Report
from data_tools.readers.sources import find_sources
from llada.data.corpus import Manifest
from llada.errors import RunError, TryAgain, UserError
from llada.files import checksum, refuse_inside
from llada.tokenizer import Tokenizer

_POLL_SECONDS = 1.0
_TRIES, _RETRY_SECONDS = 10, 0.1
MOST_WORKERS, MOST_TASKS = 4096, 1_000_000
"""More are a slip of the keyboard."""


class Unfinished(Exception):
    """The share of this task is done, that of others is not."""


@dataclass(frozen=True)
class ExecutionOptions:
    """Who does the work and how it is shown: nothing here changes what is written.

    Attributes:
        workers: processes on this machine.
        task, tasks: this is task number `task` of `tasks` that share the output folder, like those
        of a Slurm array.
        wait: seconds to wait for the other tasks where their results are needed (`dedup`).
        backend: of the encoder, one of `data_tools.tokenizers.encoders.BACKENDS`.
        stream: for progress: a bar on a terminal, a line every half minute elsewhere; None:
            nothing.
    """

    workers: int = 1
    task: int = 0
    tasks: int = 1
    wait: float = 600.0
    backend: str = "auto"
    stream: Any = None

    def __post_init__(self) -> None:
        check_count("--workers", self.workers, MOST_WORKERS)
        check_count("--tasks", self.tasks, MOST_TASKS)
        if not self.wait >= 0:
            raise UserError(f"--wait: {self.wait} is not a number of seconds, 0 or more")
        if not 0 <= self.task < self.tasks:
            raise UserError(
                f"--task: {self.task} is not one of 0..{self.tasks - 1}, the numbers of the tasks"
                f" (--tasks {self.tasks})"
            )


def check_count(setting: str, value: int, most: int) -> None:
    """Raises UserError unless a number of processes or tasks is in 1..most."""
    if value < 1:
        raise UserError(f"{setting}: {value} is less than 1")
    if value > most:
        raise UserError(f"{setting}: {value} is more than {most:,}, the most that are allowed")


@dataclass(frozen=True)
class CorpusSettings:
    """How a corpus is written, whatever its documents are.

    Attributes:
        tokenizer_path, validation_fraction, add_special_tokens, shard_tokens, unit_bytes, dedup,
        decontamination, force: see
            `data_tools.documents.text.prepare`.
        chat_template: saved with the tokenizer; None: the one it has.
        recorded: further options for the manifest.
    """

    tokenizer_path: str | Path
    validation_fraction: float = 0.005
    add_special_tokens: bool = False
    shard_tokens: int = 2**28
    unit_bytes: int | None = None
    dedup: bool = False
    decontamination: Decontamination | None = None
    force: bool = False
    chat_template: str | None = None
    recorded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"--validation-fraction: {self.validation_fraction} is not in [0, 1)")
        for name, value in (("shard-tokens", self.shard_tokens), ("unit-bytes", self.unit_bytes)):
            if value is not None and value < 1:
                raise UserError(f"--{name}: {value} is less than 1")

    def options(self) -> dict[str, Any]:
        """For the manifest."""
        names = ("validation_fraction", "add_special_tokens", "shard_tokens", "unit_bytes", "dedup")
        rule = self.decontamination
        return {
            **{name: getattr(self, name) for name in names},
            "decontaminate": (
                None
                if rule is None
                else {"files": list(rule.files), "ngram": rule.ngram, "drop": rule.drop}
            ),
            **self.recorded,
        }


def write_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: CorpusSettings,
    kind: Kind,
    effort: ExecutionOptions,
) -> Manifest:
    """Write the folder of a corpus: shards of both splits, the tokenizer, the manifest.

    Args:
        inputs: see `find_sources`.
        output: folder to make.
        settings: how.
        kind: of the documents.
        effort: how much of it is done here.

    Raises:
        UserError, RunError, TryAgain: see `data_tools.documents.text.prepare`.
        Unfinished: other tasks have units left.
    """
    place = Output(output, settings.force, effort.tasks > 1)
    for folder in filter(os.path.isdir, inputs):
        # else the next preparation reads what this one wrote
        refuse_inside(output, Path(folder), "--output")
    tokenizer = Tokenizer.load(
        settings.tokenizer_path, require_mask=not settings.add_special_tokens
    )
    if settings.add_special_tokens:
        tokenizer = tokenizer.with_special_tokens()
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    report = Report()
    sources = find_sources(inputs, kind.options, report)
    options = settings.options()
    decided = {
        **options,
        "kind": kind.name,
        "tokenizer": tokenizer.fingerprint,
        **_evaluation_stamps(settings.decontamination),
    }
    digest = digest_of(decided, sources)
    if (done := place.finished(digest, decided)) is not None:
        Progress(effort.stream).say(
            f"{output} is there already, made of the same inputs with the same settings"
        )
        return done
    if place.is_written(digest):
        return place.publish()
    plan = place.unfinished(digest, decided) or make_plan(
        decided, sources, kind.options, settings.unit_bytes, report
    )
    encoder, note = kind.choose(tokenizer, plan, effort.backend)
    rules = (
        settings.validation_fraction,
        settings.shard_tokens,
        settings.dedup,
        settings.decontamination,
    )
    job = UnitJob(place.partial, kind, tokenizer, encoder, *rules)
    try:
        with place.working(plan, tokenizer), Progress(effort.stream) as progress:
            progress.say(f"{len(plan.units):,} units; {encoder}" + (f" ({note})" if note else ""))
            if (evaluation := open_contamination(settings.decontamination)) is not None:
                progress.say(evaluation.summary())
            _Passes(job, plan, effort, progress).run()
            return finish(place, plan, tokenizer, kind.name, settings.shard_tokens, options)
    except KeyboardInterrupt as interrupt:
        Progress(effort.stream).say(f"interrupted{interrupt}")
        raise
    except (RunError, UserError, Unfinished):
        if (done := _finished_meanwhile(place, digest)) is not None:
            return done
        raise


def _finished_meanwhile(place: Output, digest: str) -> Manifest | None:
    """The corpus, if another process that worked on it too has ended it, or is about to and may
    need help.
    """
    for _ in range(_TRIES):
        if (done := place.finished_by_another(digest)) is not None:
            return done
        if not place.is_written(digest):
            return None
        with suppress(OSError, RunError):
            return place.publish()
        time.sleep(_RETRY_SECONDS)
    return None


def _evaluation_stamps(rule: Decontamination | None) -> dict[str, Any]:
    """What tells that evaluation texts have changed."""
    return (
        {}
        if rule is None
        else {
            "evaluation": [
                checksum(Path(file))["xxh3"] for file in rule.files if Path(file).is_file()
            ]
        }
    )


class _Passes:
    """The passes over the units of a plan, as far as they are this task's and not done yet."""

    def __init__(
        self, job: UnitJob, plan: WorkPlan, effort: ExecutionOptions, progress: Progress
    ) -> None:
        self._job, self._plan, self._effort, self._progress = job, plan, effort, progress
        self._folder = job.folder

    def run(self) -> None:
        units = len(self._plan.units)
        if self._job.dedup:
            self._do(
                "reading for duplicates",
                self._job,
                "hashes",
                units,
                lambda unit: duplicates.hashes_path(self._folder, unit),
            )
            self._wait_for("hashes", units, lambda unit: duplicates.hashes_path(self._folder, unit))
            ranges = duplicates.num_ranges(self._folder, units)
            merge = duplicates.MergeJob(self._folder, units, ranges)
            self._do(
                "merging",
                merge,
                "merge",
                ranges,
                lambda number: duplicates.range_path(self._folder, number),
            )
            self._wait_for(
                "merged hashes", ranges, lambda number: duplicates.range_path(self._folder, number)
            )
        self._do("tokenizing", self._job, "shards", units, self._entry)
        left = units - sum(self._entry(unit).exists() for unit in range(units))
        if left:
            raise Unfinished(
                f"task {self._effort.task} of {self._effort.tasks} is done; {units - left:,} of"
                f" {units:,} units are finished, and the task that ends last completes the corpus"
            )

    def _entry(self, unit: int) -> Path:
        return entry_path(self._folder, unit)

    def _do(
        self, what: str, job: Job, step: str, count: int, result: Callable[[int], Path]
    ) -> None:
        own = range(self._effort.task, count, self._effort.tasks)
        todo = [number for number in own if not result(number).exists()]
        text = (
            sum(self._plan.text_bytes[number] for number in todo) if isinstance(job, UnitJob) else 0
        )
        self._progress.begin(what, text)
        run(job, step, todo, self._effort.workers, self._progress.advance)

    def _wait_for(self, what: str, count: int, result: Callable[[int], Path]) -> None:
        """For what other tasks do."""
        ends = time.monotonic() + self._effort.wait
        said = False
        while missing := sum(not result(number).exists() for number in range(count)):
            if time.monotonic() >= ends:
                raise TryAgain(
                    f"{missing:,} of {count:,} {what} are still to come from other tasks after"
                    f" --wait {self._effort.wait:g} seconds; what is done is kept: run this task"
                    " again when the others have got there"
                )
            if not said:
                self._progress.say(f"waiting for {missing:,} {what} of other tasks")
                said = True
            time.sleep(_POLL_SECONDS)

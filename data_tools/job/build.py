"""The whole preparation: from inputs to the folder of a corpus.

The work is cut into units (`work_plan`). Any number of processes, on any number of machines that
see the output folder, do them in any order. Everything is written to OUTPUT.partial, where finished
units are kept. When the last unit is done, the folder is renamed to OUTPUT.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic

from data_tools.documents.base import Document, DocumentType
from data_tools.filters.dedup import MergeJob, hashes_path, num_ranges, range_path
from data_tools.job import pool
from data_tools.job.finish import finish
from data_tools.job.options import CorpusOptions, DecontaminationOptions, ExecutionOptions
from data_tools.job.output import OutputFolder
from data_tools.job.progress import Progress
from data_tools.job.unit_result import result_path
from data_tools.job.work_plan import WorkPlan, digest_of, make_plan
from data_tools.job.worker import UnitWorker, open_contamination
from data_tools.readers.report import Report
from data_tools.readers.sources import find_sources
from llada.data.manifest import Manifest
from llada.errors import RunError, TryAgain, UserError
from llada.files import checksum
from llada.outputs import refuse_inside
from llada.tokenizer import Tokenizer
from llada.types import JsonObject

_POLL_SECONDS = 1.0
_FINISH_ATTEMPTS = 100
_FINISH_RETRY_SECONDS = 0.1


class Unfinished(Exception):
    """This task has done its share of the work, but other tasks have not."""


def prepare_corpus(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    document_type: DocumentType[Document],
    options: CorpusOptions | None = None,
    execution: ExecutionOptions | None = None,
) -> Manifest:
    """Tokenize documents into the folder of a corpus: shards of both splits, tokenizer, manifest.

    The same inputs, tokenizer and options give the same bytes, however the work is executed.
    Interrupted work is continued, and a corpus that exists already is returned.

    Args:
        inputs: files, folders, patterns and `hf:` datasets; see `find_sources`.
        tokenizer_path: Hugging Face folder, tokenizer.json or SentencePiece model.
        output: folder to make.
        document_type: how inputs are read and documents are encoded.
        options: how the corpus is written.
        execution: who does the work; None to do all of it in this process.

    Raises:
        UserError: something is wrong with inputs, tokenizer, options or output.
        RunError: the output cannot be written, or a worker was killed. Finished units are kept.
        TryAgain: other tasks have to do their share before this one can continue.
        Unfinished: this task has done its share, but other tasks have not.
    """
    options = options or CorpusOptions()
    execution = execution or ExecutionOptions()
    folder = OutputFolder(output, options.force, shared=execution.tasks > 1)
    for input_folder in filter(os.path.isdir, inputs):
        # Otherwise the next preparation would read what this one wrote.
        refuse_inside(output, Path(input_folder), "--output")
    tokenizer = _load_tokenizer(tokenizer_path, options, document_type.chat_template)

    report = Report()
    sources = find_sources(inputs, document_type.read_options, report)
    settings = _settings(document_type, options, tokenizer)
    digest = digest_of(settings, sources)

    existing = _existing_corpus(folder, digest, settings, execution)
    if existing is not None:
        return existing

    # Interrupted work continues with its plan.
    plan = folder.find_unfinished(digest, settings)
    if plan is None:
        plan = make_plan(settings, sources, document_type.read_options, options.unit_bytes, report)
    backend, reason = document_type.choose_backend(tokenizer, plan.sources, execution.backend)
    worker = UnitWorker(folder.partial, document_type, tokenizer, backend, options)
    try:
        return _do_units(folder, plan, worker, execution, reason)
    except (RunError, UserError, Unfinished):
        # Another process that finished the corpus may have removed folders that this one needed.
        finished = _finished_meanwhile(folder, digest)
        if finished is not None:
            return finished
        raise


def _settings(
    document_type: DocumentType[Document], options: CorpusOptions, tokenizer: Tokenizer
) -> JsonObject:
    """Return all settings that, together with the sources, decide every byte of the corpus.

    A preparation recognizes its finished and unfinished work by their digest.
    """
    settings: JsonObject = {
        **options.manifest_options(),
        **document_type.manifest_options(),
        "kind": document_type.name,
        "tokenizer": tokenizer.fingerprint,
    }
    if options.decontamination is not None:
        settings["evaluation"] = _evaluation_checksums(options.decontamination)
    return settings


def _existing_corpus(
    folder: OutputFolder, digest: str, settings: JsonObject, execution: ExecutionOptions
) -> Manifest | None:
    """Return the corpus if it exists already; rename it if only that remains."""
    finished = folder.find_finished(digest, settings)
    if finished is not None:
        Progress(execution.stream).log(
            f"{folder.output} exists already, made of the same inputs with the same settings"
        )
        return finished
    if folder.is_written(digest):
        return folder.publish()
    return None


def _do_units(
    folder: OutputFolder,
    plan: WorkPlan,
    worker: UnitWorker[Document],
    execution: ExecutionOptions,
    backend_reason: str,
) -> Manifest:
    """Do this task's units, and finish the corpus if no unit of another task is left."""
    try:
        with folder.working(plan, worker.tokenizer), Progress(execution.stream) as progress:
            _announce(plan, worker, backend_reason, progress)
            _Passes(worker, plan, execution, progress).run()
            return finish(folder, plan, worker)
    except KeyboardInterrupt:
        Progress(execution.stream).log(f"interrupted{folder.describe_kept(plan)}")
        raise


def _announce(
    plan: WorkPlan, worker: UnitWorker[Document], backend_reason: str, progress: Progress
) -> None:
    """Log the number of units, the encoder and why it is no faster one, and evaluation texts."""
    line = f"{len(plan.units):,} units; {worker.backend}"
    if backend_reason:
        line += f" ({backend_reason})"
    progress.log(line)
    contamination = open_contamination(worker.options.decontamination)
    if contamination is not None:
        progress.log(contamination.summary())


def _load_tokenizer(
    path: str | Path, options: CorpusOptions, chat_template: str | None
) -> Tokenizer:
    """Load a tokenizer, and give it the special tokens and the chat template of the corpus."""
    tokenizer = Tokenizer.load(path, require_mask=not options.add_special_tokens)
    if options.add_special_tokens:
        tokenizer = tokenizer.with_special_tokens()
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _evaluation_checksums(options: DecontaminationOptions) -> list[str]:
    """Return a checksum of every evaluation file, so that the digest changes with their content."""
    return [checksum(Path(file))["xxh3"] for file in options.files if Path(file).is_file()]


def _finished_meanwhile(folder: OutputFolder, digest: str) -> Manifest | None:
    """Return the corpus if another process finished it; rename it if only that remains."""
    for _ in range(_FINISH_ATTEMPTS):
        # In this order: a rename between the two must not hide the corpus from both.
        is_written = folder.is_written(digest)
        finished = folder.finished_by_another(digest)
        if finished is not None:
            return finished
        if not is_written:
            return None
        with suppress(OSError, RunError):
            return folder.publish()
        time.sleep(_FINISH_RETRY_SECONDS)
    return None


class _Passes(Generic[Document]):
    """The passes over the units of this task that are not done yet.

    With `dedup` there are three: hash the documents of every unit, merge the hashes to find
    repeated documents, encode. Each pass needs the results of all tasks from the pass before.

    Args:
        worker: worker that does a unit.
        plan: plan of the preparation.
        execution: options that say which units are this task's.
        progress: shows what is done.
    """

    def __init__(
        self,
        worker: UnitWorker[Document],
        plan: WorkPlan,
        execution: ExecutionOptions,
        progress: Progress,
    ) -> None:
        self._worker = worker
        self._folder = worker.folder
        self._plan = plan
        self._execution = execution
        self._progress = progress

    def run(self) -> None:
        """Run all passes.

        Raises:
            TryAgain: other tasks took longer than `wait` for a pass.
            Unfinished: all of this task's units are done, but not all of the other tasks'.
        """
        num_units = len(self._plan.units)
        if self._worker.options.dedup:
            self._find_duplicates()

        own_units = self._unfinished(num_units, self._result_path)
        self._begin_pass("tokenizing", own_units)
        self._do(self._worker.encode_unit, own_units)

        num_finished = sum(self._result_path(unit).exists() for unit in range(num_units))
        if num_finished < num_units:
            raise Unfinished(
                f"task {self._execution.task} of {self._execution.tasks} is done;"
                f" {num_finished:,} of {num_units:,} units are finished, and the task that ends"
                " last completes the corpus"
            )

    def _find_duplicates(self) -> None:
        num_units = len(self._plan.units)
        own_units = self._unfinished(num_units, self._hashes_path)
        self._begin_pass("reading for duplicates", own_units)
        self._do(self._worker.hash_unit, own_units)
        self._wait_for("hashes", num_units, self._hashes_path)

        # The merge is divided by ranges of the hash, not by units. The number of ranges depends on
        # the number of documents, which is known only now.
        merge = MergeJob(self._folder, num_units, num_ranges(self._folder, num_units))
        own_ranges = self._unfinished(merge.ranges, self._range_path)
        self._progress.begin_pass("merging", 0)
        self._do(merge.merge_range, own_ranges)
        self._wait_for("merged hashes", merge.ranges, self._range_path)

    def _hashes_path(self, unit: int) -> Path:
        return hashes_path(self._folder, unit)

    def _range_path(self, number: int) -> Path:
        return range_path(self._folder, number)

    def _result_path(self, unit: int) -> Path:
        return result_path(self._folder, unit)

    def _unfinished(self, count: int, path_of: Callable[[int], Path]) -> list[int]:
        """Return the numbers below `count` that are this task's and whose file is missing.

        The numbers of task 1 of 3 are 1, 4, 7, ...
        """
        own = range(self._execution.task, count, self._execution.tasks)
        return [number for number in own if not path_of(number).exists()]

    def _begin_pass(self, name: str, units: list[int]) -> None:
        text_bytes = sum(self._plan.text_bytes[unit] for unit in units)
        self._progress.begin_pass(name, text_bytes)

    def _do(self, work: pool.Work, numbers: list[int]) -> None:
        pool.run(work, numbers, self._execution.workers, self._progress.advance)

    def _wait_for(self, results: str, count: int, path_of: Callable[[int], Path]) -> None:
        """Wait until other tasks have written the files of all numbers below `count`.

        Args:
            results: what the files contain, for messages.
            count: number of files.
            path_of: returns the path of the file with a number.

        Raises:
            TryAgain: files are still missing after `wait` seconds.
        """
        deadline = time.monotonic() + self._execution.wait
        announced = False
        while True:
            num_missing = sum(not path_of(number).exists() for number in range(count))
            if not num_missing:
                return
            if time.monotonic() >= deadline:
                raise TryAgain(
                    f"{num_missing:,} of {count:,} {results} from other tasks are still missing"
                    f" after --wait {self._execution.wait:g} seconds; what is done is kept: run"
                    " this task again when the others have finished"
                )
            if not announced:
                self._progress.log(f"waiting for {num_missing:,} {results} of other tasks")
                announced = True
            time.sleep(_POLL_SECONDS)

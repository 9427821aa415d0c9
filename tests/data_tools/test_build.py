"""One corpus in many ways: workers, tasks, kills, a full disk; always the same bytes, or one clear
line and nothing lost.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.filters import dedup
from data_tools.job import build, finish, pool
from data_tools.job.build import Unfinished
from data_tools.job.options import ExecutionOptions
from data_tools.job.worker import UnitWorker
from data_tools.tools.verify import verify_prepared_corpus
from llada.data.manifest import Manifest
from llada.errors import RunError, TryAgain, UserError
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests import processes
from tests.preparation import prepare

UNIT = 9000
"""Bytes of text in a unit here: about fifteen units."""


def texts(n: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    words = [
        "masked",
        "diffusion",
        "größer",
        "🙂",
        "the",
        "<|mdm_mask|>",
        "\n",
        "0x1F",
        "model",
        "a" * 50,
    ]
    return [
        f"{i} " + " ".join(generator.choices(words, k=generator.randrange(60))) for i in range(n)
    ]


def write_lines(path: Path, documents: list[str]) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


DOCUMENTS = {
    f"{name}.jsonl": texts(count, seed)
    for seed, (name, count) in enumerate({"a": 250, "b": 1, "c": 40, "d.0": 120}.items())
}
DOCUMENTS["c.jsonl"][7:9] = [DOCUMENTS["a.jsonl"][3]] * 2  # copies, over two files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs (lines, packed lines, many small files) and a tokenizer."""
    root = tmp_path_factory.mktemp("build")
    (root / "in").mkdir()
    for name, documents in DOCUMENTS.items():
        write_lines(root / "in" / name, documents)
    write_lines(root / "in" / "e.jsonl.gz", texts(60, 9))
    for number, text in enumerate(texts(40, 10)):
        (root / "in" / f"f{number:02d}.txt").write_text(text)
    train_byte_level_bpe(iter(DOCUMENTS["a.jsonl"]), 320).save(root / "tokenizer")
    return root


def everything() -> list[str]:
    lines = [text for name in sorted(DOCUMENTS) for text in DOCUMENTS[name]]
    return [*lines, *texts(60, 9), *texts(40, 10)]


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def make(root: Path, output: Path, **options) -> Manifest:
    settings = {
        "inputs": [root / "in"],
        "tokenizer_path": root / "tokenizer",
        "unit_bytes": UNIT,
        "validation_fraction": 0.1,
        "shard_tokens": 2000,
    }
    return prepare(output=output, **(settings | options))


@pytest.fixture(scope="module", params=[False, True], ids=["all", "dedup"])
def whole(request: pytest.FixtureRequest, root: Path) -> tuple[bool, dict[str, str]]:
    folder = root / f"whole-{request.param}"
    make(root, folder, dedup=request.param)
    assert verify_prepared_corpus(folder) == []
    return request.param, sums(folder)


# -- the same bytes --------------------------------------------------------------------------------


def test_every_document_is_there_once_and_megatron_reads_it(
    root: Path, whole: tuple[bool, dict[str, str]]
):
    deduplicated, _ = whole
    folder = root / f"whole-{deduplicated}"
    manifest = Manifest.load(folder)
    encoder = Tokenizer.load(root / "tokenizer")
    expected = everything()
    if deduplicated:
        expected = list(dict.fromkeys(expected))
        assert (
            manifest.skipped["documents that repeat an earlier one"]
            == len(everything()) - len(expected)
            > 1
        )
    for split in ("train", "validation"):
        own = [
            text for text in expected if (hash_of(text) < 0.1 * 2**64) == (split == "validation")
        ]
        read = [ids for entry in manifest.of(split) for ids in documents(folder / entry.name)]
        assert read == [[*encoder.encode(text).tolist(), encoder.eos_id] for text in own]
        assert manifest.totals(split)[2] == sum(len(text.encode()) for text in own)
    assert len(manifest.of("train")) > 10
    # of all units together
    assert all(entry.tokens >= 2000 for entry in manifest.of("validation")[:-1])
    assert sum(source["documents"] for source in manifest.sources) == len(everything())


def hash_of(text: str) -> int:
    import xxhash

    return xxhash.xxh3_64(text.encode()).intdigest()


def documents(path: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import (
        IndexedDataset,
    )  # not at the top: workers import this module

    dataset = IndexedDataset(str(path))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_two_workers(root: Path, whole: tuple[bool, dict[str, str]], tmp_path: Path):
    make(root, tmp_path / "corpus", dedup=whole[0], execution=ExecutionOptions(workers=2))
    assert sums(tmp_path / "corpus") == whole[1]


def test_five_tasks_in_any_order(root: Path, whole: tuple[bool, dict[str, str]], tmp_path: Path):
    """Each is run until it has nothing left to do, as an array is that is submitted again."""
    waiting = [3, 0, 4, 2, 1]
    random.Random(0).shuffle(waiting)
    rounds = 0
    while waiting:
        task = waiting.pop(0)
        rounds += 1
        try:
            make(
                root,
                tmp_path / "corpus",
                dedup=whole[0],
                execution=ExecutionOptions(task=task, tasks=5, wait=0),
            )
        except TryAgain as error:
            assert whole[0] and "from other tasks are still missing" in str(error)
            waiting.append(task)
        except Unfinished as error:
            assert f"task {task} of 5 is done" in str(error)
    assert rounds == (5 if not whole[0] else rounds)
    assert sums(tmp_path / "corpus") == whole[1]
    # once more: nothing to do
    assert make(
        root, tmp_path / "corpus", dedup=whole[0], execution=ExecutionOptions(task=2, tasks=5)
    ).plan
    assert sums(tmp_path / "corpus") == whole[1]


COMMAND = """
import sys
from data_tools.job.options import ExecutionOptions
from tests.preparation import prepare
if __name__ == "__main__":
    root, output, dedup, workers = sys.argv[1:]
    prepare([root + "/in"], root + "/tokenizer", output, unit_bytes={unit},
            validation_fraction=0.1, shard_tokens=2000, dedup=dedup == "True",
            execution=ExecutionOptions(workers=int(workers)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("deduplicated", [False, True], ids=["all", "dedup"])
def test_ten_kills_at_random_moments(deduplicated: bool, root: Path, tmp_path: Path):
    """Killed by -9, with one or two workers; started again until it is through."""
    unit = 1000
    make(root, tmp_path / "whole", unit_bytes=unit, dedup=deduplicated)
    script = tmp_path / "prepare.py"
    script.write_text(COMMAND.format(unit=unit))
    target = tmp_path / "corpus"
    generator = random.Random(5)
    steps = len(Manifest.load(tmp_path / "whole").of("train")) * (1 + deduplicated)
    for number, moment in enumerate(sorted(generator.sample(range(steps - 20), 10))):
        process = start(script, root, target, deduplicated, 1 + number % 2)
        while done(target) < moment:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.wait()
        assert not target.exists()
    process = start(script, root, target, deduplicated, 2)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert sums(target) == sums(tmp_path / "whole")
    assert not target.with_name("corpus.partial").exists()


def start(
    script: Path, root: Path, target: Path, deduplicated: bool, workers: int
) -> processes.Process:
    words = (str(script), str(root), str(target), str(deduplicated), str(workers))
    environment = {**os.environ, "PYTHONPATH": str(processes.ROOT)}
    return processes.start(*words, cwd=root, env=environment, stdout=processes.DEVNULL)


def done(target: Path) -> int:
    """Units (or hashes of units) that are finished."""
    partial = target.with_name("corpus.partial")
    return sum(
        1
        for folder in ("units", "hashes", "duplicates")
        for _ in (partial / folder).glob("[0-9]*.[jn]*")
    )


def test_units_done_by_two_at_once_are_the_same(
    root: Path, whole: tuple[bool, dict[str, str]], tmp_path: Path
):
    """The same command twice at the same time, as after a mistaken second submission."""
    script = tmp_path / "prepare.py"
    script.write_text(COMMAND.format(unit=UNIT))
    both = [start(script, root, tmp_path / "corpus", whole[0], 1) for _ in range(2)]
    ends = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert sums(tmp_path / "corpus") == whole[1]


def test_a_corpus_that_is_renamed_while_it_is_looked_for_is_seen():
    class Folder:
        """Another process renames the folder right after the first look at it."""

        renamed = False

        def is_written(self, digest: str) -> bool:
            was_here = not self.renamed
            self.renamed = True
            return was_here

        def finished_by_another(self, digest: str) -> str | None:
            was_renamed = self.renamed
            self.renamed = True
            return "the corpus" if was_renamed else None

    assert build._finished_meanwhile(Folder(), "digest") == "the corpus"


# -- interruptions ---------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch, fails_at: int, error: BaseException) -> list[int]:
    """Return a list that fills with the units that are encoded; the `fails_at`-th of them fails."""
    units: list[int] = []
    encode_unit = UnitWorker.encode_unit

    def guarded(self: UnitWorker, unit: int, advance: pool.Advance) -> None:
        units.append(unit)
        if len(units) == fails_at:
            raise error
        encode_unit(self, unit, advance)

    monkeypatch.setattr(UnitWorker, "encode_unit", guarded)
    return units


def test_what_is_finished_is_not_done_again(
    root: Path, whole: tuple[bool, dict[str, str]], tmp_path: Path, monkeypatch
):
    units = counting(monkeypatch, 6, KeyboardInterrupt())
    shown = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        make(
            root,
            tmp_path / "corpus",
            dedup=whole[0],
            execution=ExecutionOptions(stream=shown),
        )
    assert re.fullmatch(
        r"interrupted; 5 of \d+ units are finished and kept in '.*corpus.partial': run the same"
        r" command to continue",
        shown.getvalue().splitlines()[-1],
    )
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(UserError, match=r"no manifest.json"):
        Manifest.load(tmp_path / "corpus.partial")
    make(root, tmp_path / "corpus", dedup=whole[0])
    assert units == [0, 1, 2, 3, 4, 5, *range(5, max(units) + 1)]
    assert sums(tmp_path / "corpus") == whole[1]


def test_hashes_are_kept_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[int] = []
    hash_unit = UnitWorker.hash_unit

    def guarded(self: UnitWorker, unit: int, advance: pool.Advance) -> None:
        hashed.append(unit)
        if len(hashed) == 4:
            raise KeyboardInterrupt
        hash_unit(self, unit, advance)

    monkeypatch.setattr(UnitWorker, "hash_unit", guarded)
    with pytest.raises(KeyboardInterrupt):
        make(root, tmp_path / "corpus", dedup=True)
    make(root, tmp_path / "corpus", dedup=True)
    assert hashed == [0, 1, 2, 3, *range(3, max(hashed) + 1)]


def test_an_unfinished_preparation_of_something_else_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counting(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make(root, tmp_path / "corpus")
    with pytest.raises(
        UserError,
        match=(
            r"unfinished preparation with other settings \(shard_tokens 2000, now 3000\); --force"
            r" discards it"
        ),
    ):
        make(root, tmp_path / "corpus", shard_tokens=3000)
    with pytest.raises(UserError, match=r"unfinished preparation of other inputs"):
        prepare(
            [root / "in" / "a.jsonl"],
            root / "tokenizer",
            tmp_path / "corpus",
            unit_bytes=UNIT,
            validation_fraction=0.1,
            shard_tokens=2000,
        )
    other = tmp_path / "other"
    train_byte_level_bpe(iter(["other text"] * 9), 300).save(other)
    with pytest.raises(UserError, match=r"with other settings \(tokenizer '"):
        make(root, tmp_path / "corpus", tokenizer_path=other)
    assert (
        make(root, tmp_path / "corpus", shard_tokens=3000, force=True).options["shard_tokens"]
        == 3000
    )
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes").touch()
    with pytest.raises(
        UserError, match=r"mine.partial' exists and is not an unfinished preparation"
    ):
        make(root, tmp_path / "mine")
    (tmp_path / "mine.partial" / "plan.json").write_text('{"sources": []}')
    with pytest.raises(
        UserError,
        match=r"mine.partial/plan.json: damaged, .*; remove '.*mine.partial' to start over",
    ):
        make(root, tmp_path / "mine")


def test_inputs_that_change_meanwhile(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    write_lines(path, DOCUMENTS["a.jsonl"])
    counting(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare([path], root / "tokenizer", tmp_path / "corpus", unit_bytes=UNIT)
    plan = build.make_plan

    def changed(*arguments):
        made = plan(*arguments)
        write_lines(path, DOCUMENTS["a.jsonl"][1:])
        return made

    with pytest.raises(UserError, match="of other inputs, or of inputs that have changed since"):
        os.utime(path, (1, 1))
        prepare([path], root / "tokenizer", tmp_path / "corpus", unit_bytes=UNIT)
    monkeypatch.setattr(build, "make_plan", changed)
    with pytest.raises(
        UserError, match=r"a.jsonl has changed since the preparation began; start over with --force"
    ):
        prepare([path], root / "tokenizer", tmp_path / "corpus", unit_bytes=UNIT, force=True)


@pytest.fixture()
def small_disk(tmp_path: Path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(
    workers: int, root: Path, whole: tuple[bool, dict[str, str]], small_disk: Path
):
    execution = ExecutionOptions(workers=workers)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    with pytest.raises(
        RunError,
        match=(
            r"No space left on device\); \d+ of \d+ units are finished and kept .*: run the"
            r" same command to continue"
        ),
    ) as caught:
        make(root, small_disk / "corpus", dedup=whole[0], execution=execution)
    assert "\n" not in str(caught.value)
    ballast.unlink()
    make(root, small_disk / "corpus", dedup=whole[0], execution=execution)
    assert sums(small_disk / "corpus") == whole[1]


def test_a_worker_that_is_killed(root: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"a worker ended with exit code -9; .*fewer --workers"):
        pool.run(_killed_at_unit_2, range(5), 2, lambda *_: None)


def _killed_at_unit_2(unit: int, advance: pool.Advance) -> None:
    if unit == 2:
        os.kill(os.getpid(), signal.SIGKILL)


class _Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def work(self, unit: int, advance: pool.Advance) -> None:
        advance(1, 2, 3)
        raise self.error


@pytest.mark.parametrize(
    "error", [UserError("a"), RunError("b"), OSError(28, "No space"), ValueError("d")]
)
def test_what_a_worker_raises_is_raised(error: Exception):
    seen: list[tuple[int, ...]] = []
    with pytest.raises(
        RuntimeError if isinstance(error, ValueError) else type(error), match=str(error.args[0])
    ):
        pool.run(_Failing(error).work, range(2), 2, lambda *numbers: seen.append(numbers))
    assert (1, 2, 3) in seen


# -- duplicates ------------------------------------------------------------------------------------


def test_duplicates_are_merged_a_range_at_a_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(root, tmp_path / "whole", dedup=True)
    monkeypatch.setattr(dedup, "ROWS_AT_ONCE", 50)
    seen: list[int] = []
    merge_range = dedup.MergeJob.merge_range

    def recorded(self: dedup.MergeJob, number: int, advance: pool.Advance) -> None:
        seen.append(number)
        merge_range(self, number, advance)

    monkeypatch.setattr(dedup.MergeJob, "merge_range", recorded)
    make(root, tmp_path / "corpus", dedup=True)
    assert seen == list(range(len(everything()) // 50 + 1))
    assert sums(tmp_path / "corpus") == sums(tmp_path / "whole")


def test_the_first_copy_stays(root: Path, tmp_path: Path):
    generator = np.random.default_rng(3)
    drawn = [f"text {k}" for k in generator.integers(0, 150, 600)]
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", drawn[200 * number : 200 * (number + 1)])
    inputs = [tmp_path / f"{number}.jsonl" for number in (2, 0, 1)]
    manifest = prepare(
        inputs,
        root / "tokenizer",
        tmp_path / "corpus",
        unit_bytes=700,
        validation_fraction=0.0,
        dedup=True,
    )
    order = drawn[400:] + drawn[:400]
    encoder = Tokenizer.load(root / "tokenizer")
    read = [ids for entry in manifest.shards for ids in documents(tmp_path / "corpus" / entry.name)]
    assert read == [
        [*encoder.encode(text).tolist(), encoder.eos_id] for text in dict.fromkeys(order)
    ]
    assert manifest.skipped == {"documents that repeat an earlier one": 600 - len(set(drawn))}


# -- what users get wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers: 0 is less than 1"),
        ({"tasks": 0}, "--tasks: 0 is less than 1"),
        (
            {"task": 5, "tasks": 5},
            r"--task: 5 is not one of 0..4, the numbers of the tasks \(--tasks 5\)",
        ),
        ({"task": -1}, "--task: -1 is not one of 0..0"),
        ({"workers": 10**6}, "--workers: 1000000 exceeds the maximum of 4,096"),
        ({"tasks": 10**12}, "--tasks: 1000000000000 exceeds the maximum of 1,000,000"),
        ({"wait": float("nan")}, "--wait: nan is not a number of seconds"),
    ],
)
def test_execution_options_that_are_refused(options: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        ExecutionOptions(**options)


def test_another_task_finished_the_corpus(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between the last unit of this task and its own attempt to finish."""
    make(root, tmp_path / "whole")
    merge_shards = finish._merge_validation_shards

    def late(folder: Path, *rest):
        monkeypatch.setattr(finish, "_merge_validation_shards", merge_shards)
        make(root, tmp_path / "corpus", execution=ExecutionOptions(task=0, tasks=2))
        assert not folder.exists()
        return merge_shards(folder, *rest)

    with pytest.raises(Unfinished):
        make(root, tmp_path / "corpus", execution=ExecutionOptions(task=1, tasks=2))
    monkeypatch.setattr(finish, "_merge_validation_shards", late)
    make(root, tmp_path / "corpus", execution=ExecutionOptions(task=0, tasks=2))
    assert sums(tmp_path / "corpus") == sums(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "whole"]


# -- two commands, one output ----------------------------------------------------------------------


def instead_of(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, first: Callable[[], object]
) -> None:
    """The next call of a function runs `first` before it does its work."""
    function = getattr(module, name)

    def late(*arguments):
        monkeypatch.setattr(module, name, function)
        first()
        return function(*arguments)

    monkeypatch.setattr(module, name, late)


def test_another_command_finishes_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After this one looked whether the output is free."""
    instead_of(
        monkeypatch, build, "make_plan", lambda: make(root, tmp_path / "corpus", shard_tokens=3000)
    )
    with pytest.raises(
        UserError,
        match="corpus' was made by another command while this one ran, and stays as it is",
    ):
        make(root, tmp_path / "corpus")
    assert Manifest.load(tmp_path / "corpus").options["shard_tokens"] == 3000
    assert os.listdir(tmp_path) == ["corpus"]


def test_another_command_begins_first(
    root: Path, whole: tuple[bool, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its settings are others: this one neither works in its folder nor, with --force, removes it
    while it is in use.
    """
    refusals: list[str] = []

    def refused(force: bool, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            make(root, tmp_path / "corpus", shard_tokens=3000, force=force)
        refusals.append(str(caught.value))

    def while_it_works() -> None:
        refused(
            False, r"unfinished preparation with other settings \(.*shard_tokens 2000, now 3000"
        )
        refused(True, "other processes may be using it")

    instead_of(monkeypatch, finish, "_merge_validation_shards", while_it_works)
    make(root, tmp_path / "corpus", dedup=whole[0])
    assert len(refusals) == 2
    assert sums(tmp_path / "corpus") == whole[1]

    (tmp_path / "late").mkdir()
    counting(monkeypatch, 2, KeyboardInterrupt())

    def begun() -> None:
        with pytest.raises(KeyboardInterrupt):
            make(root, tmp_path / "late" / "corpus")

    instead_of(monkeypatch, build, "make_plan", begun)
    with pytest.raises(
        UserError,
        match=(
            r"another command is preparing it with other settings \(shard_tokens 2000, now 3000\)"
        ),
    ):
        make(root, tmp_path / "late" / "corpus", shard_tokens=3000)
    assert os.listdir(tmp_path / "late") == ["corpus.partial"]


def test_an_output_that_appears_at_the_end(
    root: Path, whole: tuple[bool, dict[str, str]], tmp_path: Path, monkeypatch
):
    output = tmp_path / "corpus"

    def taken() -> None:
        output.mkdir()
        (output / "notes").touch()

    instead_of(monkeypatch, finish, "_merge_validation_shards", taken)
    with pytest.raises(
        UserError,
        match=(
            r"was made by another command .* this corpus is complete in '.*corpus.partial': move"
            r" either of them"
        ),
    ):
        make(root, output, dedup=whole[0])
    assert os.listdir(output) == ["notes"]
    output.rename(tmp_path / "notes")
    make(root, output, dedup=whole[0])
    assert sums(output) == whole[1]
    assert sorted(os.listdir(tmp_path)) == ["corpus", "notes"]

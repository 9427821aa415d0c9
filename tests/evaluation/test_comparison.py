"""`llada compare`: paired differences against the formula, and refusals in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llada.cli import app
from llada.errors import UserError
from llada.evaluation import comparison, comparison_report, validation_files
from llada.evaluation.estimates import CorpusLosses, t_quantile
from llada.evaluation.validation_files import Measure, Measured
from tests.workplace import Workplace

MEASURE = Measure("text", "tokenizer", "windows", 64, False, 256, 4, "items")
ITEMS = 40


def measured(gain: float, name: str = "wiki", weight: float = 1.0, **changes: object) -> Measured:
    """A model's losses on made-up windows; `gain` nats per token better than the base, a little
    more or less on each.
    """
    rng = np.random.default_rng(len(name))
    length = rng.integers(30, 64, ITEMS)
    base, own = rng.normal(4, 1, (ITEMS, 4)), rng.normal(gain, 0.1 * abs(gain), (ITEMS, 1))
    sample = CorpusLosses(
        length[:, None] * (base - own), length, np.arange(ITEMS), np.arange(ITEMS)
    )
    return Measured(
        name, weight, 0.25, replace(MEASURE, **{"text": name, **changes}), np.arange(ITEMS), sample
    )


def run(folder: Path, name: str, *corpora: Measured, steps: tuple[int, ...] = (10,)) -> str:
    path = folder / name
    path.mkdir()
    for step in steps:
        validation_files.write(path, step, corpora)
    return str(path)


def differences(
    *paths: str, step: str | None = None, corpus: str | None = None
) -> list[comparison.Difference]:
    return comparison.compare(comparison.open_runs(paths, step, corpus))


def test_the_error_is_that_of_paired_items(tmp_path: Path) -> None:
    a, b = measured(0), measured(0.05)
    [difference] = differences(run(tmp_path, "a", a), run(tmp_path, "b", b))
    loss, length = (b.sample.loss - a.sample.loss).sum(axis=1), 4 * a.sample.length
    mean = loss.sum() / length.sum()
    without = (loss.sum() - loss) / (length.sum() - length)
    error = math.sqrt((ITEMS - 1) / ITEMS * ((without - mean) ** 2).sum())
    assert difference.corpora["wiki"].mean == pytest.approx(mean) and difference.corpora[
        "wiki"
    ].se == pytest.approx(error)
    assert error < 0.1 * a.sample.estimate().se, "what both share is in neither"
    assert difference.mean is None and difference.bits_per_byte.mean == pytest.approx(
        mean * 0.25 / math.log(2)
    )


def test_the_result_as_text_and_as_json(tmp_path: Path) -> None:
    paths = [
        run(tmp_path, "a", measured(0)),
        run(tmp_path, "b", measured(0.05)),
        run(tmp_path, "c", measured(0)),
    ]
    a, b, c = paths
    length = measured(0).sample.length
    effective_items = length.sum() ** 2 / (length**2).sum()
    half = t_quantile(0.95, effective_items - 1) * differences(a, b)[0].corpora["wiki"].se
    mean = -differences(a, b)[0].corpora["wiki"].mean
    done = CliRunner().invoke(app, ["compare", *paths])
    lines = done.output.splitlines()
    assert (
        lines[0]
        == "wiki: 40 windows, each text read at 4 values of t; the same text and noise in all runs"
    )
    assert lines[-2:] == [
        f"{b} is better than {a} by {mean:.4f} ± {half:.4f} nats per token (95 %)",
        f"{c} equals {a}",
    ]
    assert (
        CliRunner()
        .invoke(app, ["compare", b, a])
        .output.splitlines()[-1]
        .startswith(f"{b} is better than {a} by {mean:.4f} ±")
    )
    answer = json.loads(CliRunner().invoke(app, ["compare", a, b, "--json"]).output)
    [difference] = answer["differences"]
    assert (difference["run"], difference["less"]) == (b, a)
    assert difference["corpora"]["wiki"]["mean"] == pytest.approx(-mean)
    assert difference["corpora"]["wiki"]["ci95"] == pytest.approx([-mean - half, -mean + half])


def test_errors_of_few_items_are_called_rough(tmp_path: Path) -> None:
    a = measured(0)
    length = np.where(np.arange(ITEMS) == 3, 100_000, 10)
    long = [
        replace(a, sample=replace(a.sample, loss=a.sample.loss * gain, length=length))
        for gain in (1.0, 0.9)
    ]
    paths = run(tmp_path, "a", long[0]), run(tmp_path, "b", long[1])
    text = comparison_report.as_text(comparison.open_runs(paths, None, None), differences(*paths))
    assert (
        "wiki: the errors are rough, so few windows (they weigh like 1.0 of equal length) say"
        " little of other text" in text
    )


def test_a_difference_within_its_error_is_called_so(tmp_path: Path) -> None:
    a, b = measured(0), measured(0)
    other = replace(
        b.sample, loss=b.sample.loss + np.random.default_rng(0).normal(0, 1, b.sample.loss.shape)
    )
    paths = run(tmp_path, "a", a), run(tmp_path, "b", replace(b, sample=other))
    assert "cannot be told apart" in comparison_report.as_text(
        comparison.open_runs(paths, None, None), differences(*paths)
    )
    diverged = (
        paths[0],
        run(tmp_path, "c", replace(b, sample=replace(b.sample, loss=b.sample.loss * math.nan))),
    )
    assert "a loss is not finite" in comparison_report.as_text(
        comparison.open_runs(diverged, None, None), differences(*diverged)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequence_length": 128, "items": "x"}, r"data.sequence_length \(64 and 128\)$"),
        (
            {"windows": 512, "draws_per_item": 8, "items": "x"},
            r"validation.windows \(256 and 512\), draws per item \(4 and 8\)$",
        ),
        (
            {"document_mask": True, "unit": "documents", "items": "x"},
            r"windows and documents\), data.document_mask \(False and True\)$",
        ),
        ({"tokenizer": "x", "text": "x", "items": "x"}, r"tokenizer$"),
        ({"text": "x", "items": "x"}, r"held-out text$"),
        ({"items": "x"}, r"items, lengths or t$"),
    ],
)
def test_runs_that_were_validated_differently_are_refused(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    paths = run(tmp_path, "a", measured(0)), run(tmp_path, "b", measured(0, **changes))
    with pytest.raises(
        UserError,
        match=r"/a and .*/b cannot be compared on 'wiki': they were validated with different .*"
        + words,
    ):
        differences(*paths)


def test_corpora_are_matched_by_their_text_and_means_need_equal_weights(tmp_path: Path) -> None:
    wiki, code = measured(0, weight=3.0), measured(0, "code")
    a = run(tmp_path, "a", wiki, code)
    renamed = replace(measured(0.05, weight=6.0), name="other")
    b = run(tmp_path, "b", replace(measured(0.1, "code"), weight=2.0), renamed)
    [difference] = differences(a, b)
    assert list(difference.corpora) == ["wiki", "code"]
    assert difference.mean.mean == pytest.approx(
        0.75 * difference.corpora["wiki"].mean + 0.25 * difference.corpora["code"].mean
    )
    c = run(tmp_path, "c", measured(0.05), measured(0.1, "code"))
    [unequal] = differences(a, c)
    assert (
        unequal.mean is None
        and unequal.bits_per_byte is None
        and unequal.corpora == difference.corpora
    )
    assert "no mean over the corpora" in comparison_report.as_text(
        comparison.open_runs([a, c], None, None), [unequal]
    )
    d = run(tmp_path, "d", measured(0.05))
    with pytest.raises(
        UserError,
        match=(
            r"validated on different corpora \(wiki, code; wiki\); --corpus compares one that both"
            r" have"
        ),
    ):
        differences(a, d)
    assert differences(a, d, corpus="wiki")[0].corpora == {"wiki": difference.corpora["wiki"]}
    with pytest.raises(
        UserError,
        match=(
            r"--corpus: .*/a was not validated on 'wiky', only on wiki, code \(did you mean"
            r" 'wiki'\?\)"
        ),
    ):
        differences(a, d, corpus="wiky")
    with pytest.raises(
        UserError, match=r"--corpus: .*/d was not validated on 'code' of .*/a, only on wiki$"
    ):
        differences(a, d, corpus="code")


def test_steps(tmp_path: Path) -> None:
    a, b = (
        run(tmp_path, "a", measured(0), steps=(10, 20, 30)),
        run(tmp_path, "b", measured(0), steps=(10, 20, 25)),
    )
    c = run(tmp_path, "c", measured(0), steps=(7,))

    def chosen(*paths: str, step: str | None) -> list[int]:
        return [opened.step for opened in comparison.open_runs(paths, step, None)]

    assert (
        chosen(a, b, step=None) == [20, 20]
        and chosen(a, b, step="last") == [30, 25]
        and chosen(a, b, step="10") == [10, 10]
    )
    with pytest.raises(
        UserError, match=r"--step: .*/b has no validation after step 30; it has: 10, 20, 25"
    ):
        chosen(a, b, step="30")
    with pytest.raises(
        UserError,
        match=(
            r"no step after which all runs were validated \(their last: .*/a 30, .*/c 7\); --step"
            r" last"
        ),
    ):
        chosen(a, c, step=None)
    for step in ("newest", "²", "9" * 5000):
        message = f"--step: '{step}' is neither a number of steps nor 'last'"
        with pytest.raises(UserError, match=message):
            chosen(a, b, step=step)
    with pytest.raises(UserError, match="RUN: 1 given; name two runs or more"):
        chosen(a, step=None)
    with pytest.raises(UserError, match=r"RUN: no folder '.*/x{300}'$"):
        differences(a, str(tmp_path / ("x" * 300)))
    with pytest.raises(UserError, match=r"RUN: no folder '.*/aa' \(did you mean 'a'\?\)"):
        chosen(a, f"{a}a", step=None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"RUN: '.*/file' is a file; name the folder of the run"):
        chosen(a, str(tmp_path / "file"), step=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"RUN: '.*/empty' has no validation/step_\*.npz"):
        chosen(a, str(tmp_path / "empty"), step=None)


def test_files_of_later_steps_are_set_aside(tmp_path: Path) -> None:
    path = Path(run(tmp_path, "a", measured(0), steps=(0, 10, 20, 30)))
    validation_files.supersede(path, 10, attempt=2)
    assert validation_files.steps(path) == [0, 10]
    assert sorted(file.name for file in (path / "validation.attempt-2").iterdir()) == [
        "step_00000020.npz",
        "step_00000030.npz",
    ]
    validation_files.supersede(path, 0, attempt=3)
    assert validation_files.steps(path) == []


def test_runs_write_what_is_compared(workplace: Workplace) -> None:
    whole = str(workplace.folder / "whole")
    assert validation_files.steps(Path(whole)) == [4, 8, 12]
    opened = [
        comparison.ValidatedRun(whole, step, validation_files.read(Path(whole), step))
        for step in (4, 12)
    ]
    [difference] = comparison.compare(opened)
    lines = {line["step"]: line for line in workplace.lines("whole") if "nelbo_per_token" in line}
    assert difference.corpora["corpus"].mean == pytest.approx(
        lines[12]["nelbo_per_token"] - lines[4]["nelbo_per_token"]
    )
    assert difference.corpora["corpus"].mean < 0

"""What befalls a run's folder, and the corpus it reads: other runs, losses, full disks. Runs are in
this process.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llada.checkpoint.saving import find_system_error
from llada.config import build_config
from llada.errors import RunError, TryAgain, UserError
from llada.files import read_files
from llada.training import lock
from llada.training.loop import train
from llada.training.run_folder import RunFolder, name_write_errors, refuse_foreign_folder
from llada.training.signals import StopRequest
from llada.training.starting.resume import preview_resume
from tests.data_tools.corpora import inspection
from tests.training.locks import forge_lock
from tests.workplace import CONFIG, Workplace


class Disturbance(StopRequest):
    """Never asks the run to stop, but does something when it is looked at: while a run waits for
    its folder, and after every step.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work: Callable[[], object] | None = work

    def __bool__(self) -> bool:
        work, self._work = self._work, None
        if work is not None:
            work()
        return super().__bool__()


def run(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stop: StopRequest | None = None,
    **sections: Any,
) -> int:
    """Train the config of `whole` in a folder of its own; the exit code."""
    monkeypatch.chdir(workplace.folder)
    config = build_config({**CONFIG, "run": {"dir": name, "threads": 2}, **sections})
    return train(config, StopRequest() if stop is None else stop)


def copied(workplace: Workplace, name: str) -> Path:
    """A copy of the finished run `whole`."""
    shutil.copytree(workplace.folder / "whole", workplace.folder / name)
    return workplace.folder / name


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow past so many bytes: what a full disk is to its writer, with
    another number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- other runs ------------------------------------------------------------------------------------


def test_who_waited_for_the_folder_goes_on_from_what_was_written_meanwhile(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run started twice: the first ends while the second waits for its lock."""
    path = workplace.folder / "twice"
    path.mkdir()
    forge_lock(path)

    def first_ends() -> None:
        shutil.copytree(workplace.folder / "whole", path, dirs_exist_ok=True)
        (path / lock.NAME).unlink()

    assert run(workplace, monkeypatch, "twice", Disturbance(first_ends)) == 0
    assert "nothing to do: twice is at step 12, train.steps is 12" in capsys.readouterr().out
    assert workplace.lines("twice") == workplace.lines("whole")
    assert not list(path.glob("metrics.attempt-*"))


def test_a_refused_run_leaves_no_folder_and_no_lock(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((workplace.folder / "whole").iterdir())
    for name, change in (
        ("new/deep", {"run": {"dir": "new/deep", "threads": 2, "init_from": "nowhere"}}),
        ("whole", {"seed": 6}),
    ):
        with pytest.raises(UserError):
            run(workplace, monkeypatch, name, **change)
    assert not (workplace.folder / "new").exists()
    assert sorted((workplace.folder / "whole").iterdir()) == before


@pytest.mark.parametrize(("ranks", "refused"), [(2, False), (1, True)])
def test_threads_that_nobody_set_count_on_the_same_layout_alone(
    ranks: int,
    refused: bool,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copied(workplace, f"threads_{ranks}") / "checkpoints" / "step_00000012" / "state.json"
    state = json.loads(path.read_text())
    assert state["ranks"] == 1
    state["config"]["run"]["threads"] = 0
    path.write_text(
        json.dumps(
            {**state, "ranks": ranks, "versions": {**state["versions"], "run.threads": "97"}}
        )
    )
    changes = {"run": {"dir": f"threads_{ranks}"}, "checkpoint": {"every": 4, "verify": False}}
    if refused:
        with pytest.raises(UserError, match=r"run.threads: 97 -> \d+ has changed since"):
            run(workplace, monkeypatch, "", **changes)
    else:
        assert run(workplace, monkeypatch, "", **changes) == 0
        assert f"resumed from threads_{ranks}/checkpoints/step_00000012" in capsys.readouterr().out


def test_a_checkpoint_with_a_setting_that_is_no_longer_allowed_is_named(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(workplace, "older") / "checkpoints" / "step_00000012" / "state.json"
    state = json.loads(path.read_text())
    state["config"]["train"]["spike_window"] = 5
    path.write_text(json.dumps(state))
    message = (
        r"^resume from older/checkpoints/step_00000012: this version of llada does not allow a"
        r" setting .*train.spike_window: 5 .*init_from"
    )
    with pytest.raises(UserError, match=message):
        run(workplace, monkeypatch, "older", checkpoint={"every": 4, "verify": False})


def test_fewer_steps_than_done(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copied(workplace, "shorter") / "config.yaml").read_text()
    assert run(workplace, monkeypatch, "shorter", train={"steps": 2}) == 0
    assert (
        "nothing to do: shorter is at step 12, train.steps is 2; raise it to continue"
        in capsys.readouterr().out
    )
    assert (workplace.folder / "shorter" / "config.yaml").read_text() == before


# -- losses ----------------------------------------------------------------------------------------


def drop_markers(path: Path) -> None:
    for marker in path.glob("checkpoints/*/COMMITTED"):
        marker.unlink()


def drop_markers_and_events(path: Path) -> None:
    drop_markers(path)
    (path / "events.jsonl").unlink()


def drop_checkpoints_and_events(path: Path) -> None:
    shutil.rmtree(path / "checkpoints")
    (path / "events.jsonl").unlink()


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (
            lambda path: shutil.rmtree(path / "checkpoints"),
            "the checkpoint after step 12 was written",
        ),
        (drop_markers, "the checkpoint after step 12 was written"),
        (drop_markers_and_events, "lost/checkpoints/step_00000012 lost its COMMITTED file"),
        (drop_checkpoints_and_events, "metrics.jsonl has steps, events.jsonl is gone"),
    ],
)
def test_a_run_that_lost_its_checkpoints_does_not_start_over(
    lose: Callable[[Path], None],
    message: str,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = copied(workplace, "lost")
    try:
        lose(path)
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(
            UserError,
            match=(
                f"run.dir: 'lost' has lost its checkpoints: {message}, and lost/checkpoints has"
                " no complete one"
            ),
        ):
            run(workplace, monkeypatch, "lost")
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    finally:
        shutil.rmtree(path)


def test_a_corpus_deleted_meanwhile_is_named_and_the_checkpoints_have_its_tokenizer(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training shards are open by then; the validation's is not."""
    corpus = workplace.folder / "passing"
    shutil.copytree(workplace.folder / "corpus", corpus)
    with pytest.raises(
        UserError,
        match=r"^passing/validation-00000.(bin|idx): missing from the corpus passing; put it back",
    ) as caught:
        run(
            workplace,
            monkeypatch,
            "orphan",
            Disturbance(lambda: shutil.rmtree(corpus)),
            data={"sequence_length": 64, "document_mask": True, "mixture": [{"path": "passing"}]},
            train={"steps": 2},
            checkpoint={"every": 1, "asynchronous": False},
        )
    assert "\n" not in str(caught.value)
    kept = read_files(workplace.folder / "orphan" / "checkpoints" / "step_00000001" / "tokenizer")
    assert kept == read_files(workplace.folder / "corpus" / "tokenizer")


def test_a_run_folder_deleted_meanwhile_stays_so(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = workplace.folder / "deleted"
    with pytest.raises(
        RunError,
        match=r"^run.dir: 'deleted' is gone: .*, or its file system is no longer mounted$",
    ):
        run(
            workplace,
            monkeypatch,
            "deleted",
            Disturbance(lambda: shutil.rmtree(path)),
            checkpoint={"every": 99},
        )
    assert not path.exists()
    with pytest.raises(
        RunError,
        match=(
            r"^checkpoint after step 1: deleted/checkpoints cannot be written on rank 0 \(deleted"
            r" is gone: it"
        ),
    ):
        run(
            workplace,
            monkeypatch,
            "deleted",
            Disturbance(lambda: shutil.rmtree(path)),
            checkpoint={"every": 1},
            logging={"every": 99},
            train={"steps": 99},
        )
    assert not path.exists()


# -- replaced tokenizers ---------------------------------------------------------------------------


def test_a_corpus_with_another_tokenizer_is_refused_before_it_is_read(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A valid tokenizer of the same size, whose ids mean something else."""
    from data_tools.tools.export import export
    from data_tools.tools.merge import merge
    from data_tools.tools.split import split
    from data_tools.tools.verify import verify_prepared_corpus
    from llada.data.pretrain import PretrainData
    from llada.training.preview import describe_step

    corpus = workplace.folder / "exchanged"
    shutil.copytree(workplace.folder / "corpus", corpus)
    definition = corpus / "tokenizer" / "tokenizer.json"
    text = definition.read_text()
    definition.write_text(text.replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}'))
    assert definition.read_text() != text
    monkeypatch.chdir(workplace.folder)
    sections = {
        "run": {"dir": "refused"},
        "data": {"sequence_length": 64, "mixture": [{"path": "other"}, {"path": "exchanged"}]},
    }
    config = build_config({**CONFIG, **sections})
    message = (
        "exchanged/tokenizer: not the tokenizer of this corpus, its fingerprint differs from the"
        " manifest's"
    )
    in_a_run: list[Callable[[], object]] = [
        lambda: train(config, StopRequest()),
        lambda: describe_step(config, 1, 1),
        lambda: preview_resume(config, PretrainData(config), Path("refused/checkpoints"), False),
    ]
    tools: list[Callable[[], object]] = [
        lambda: inspection("exchanged"),
        lambda: merge(["other", "exchanged"], "merged"),
        lambda: split("exchanged", 2, "parts"),
        lambda: export("exchanged", "texts.jsonl"),
    ]
    for prefix, works in (("data.mixture.1.path: ", in_a_run), ("", tools)):
        for work in works:
            with pytest.raises(UserError, match=f"^{prefix}{message}"):
                work()
    assert [line for line in verify_prepared_corpus("exchanged") if line.startswith(message)]
    assert not any(
        (workplace.folder / name).exists() for name in ("refused", "merged", "parts", "texts.jsonl")
    )


def test_a_checkpoint_with_another_tokenizer_is_refused(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llada.hf.exporting import ExportOptions, to_hf
    from llada.sampling.loading import load

    definition = (
        copied(workplace, "relabelled")
        / "checkpoints"
        / "step_00000012"
        / "tokenizer"
        / "tokenizer.json"
    )
    definition.write_text(
        definition.read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
    )
    monkeypatch.chdir(workplace.folder)
    message = (
        r".*relabelled/checkpoints/step_00000012/tokenizer is not the tokenizer that the model was"
        r" trained with"
    )
    with pytest.raises(UserError, match=f"^checkpoint: {message}"):
        to_hf("relabelled", tmp_path / "export", ExportOptions(checksums=False))
    with pytest.raises(UserError, match=f"^checkpoint: {message}"):
        load("relabelled")
    with pytest.raises(UserError, match=f"^run.init_from: {message}"):
        run(
            workplace,
            monkeypatch,
            "",
            run={"dir": "refused", "init_from": "relabelled"},
            checkpoint={"every": 4, "verify": False},
        )
    assert not (tmp_path / "export").exists() and not (workplace.folder / "refused").exists()


# -- folders that cannot be written ----------------------------------------------------------------


def test_a_folder_that_may_not_be_written() -> None:
    with pytest.raises(
        UserError,
        match=(
            r"^run.dir: '/sys/kernel' cannot be written \((Permission denied|Read-only file"
            r" system)\); choose"
        ),
    ):
        RunFolder(Path("/sys/kernel"), lambda: False)


def test_a_disk_that_is_full_at_the_start_leaves_no_lock(tmp_path: Path) -> None:
    with (
        largest_file(0),
        pytest.raises(
            RunError, match=r"run' cannot be written \(File too large; [\d.]+ \w+ are left\)$"
        ),
    ):
        RunFolder(tmp_path / "new" / "run", lambda: False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_after_the_lock_is_named_and_leaves_no_lock(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the lock, and none for config.yaml."""
    message = r"^run.dir: 'brim' cannot be written \(File too large; [\d.]+ \w+ are left\)$"
    with largest_file(1 << 9), pytest.raises(RunError, match=message):
        run(workplace, monkeypatch, "brim")
    assert not (workplace.folder / "brim" / lock.NAME).exists()


def test_the_systems_reason_is_heard_behind_the_writers(tmp_path: Path) -> None:
    """torch's writer of tensors says "[enforce fail at inline_container.cc:672]" whatever the
    system said.
    """
    with largest_file(1 << 16):
        with pytest.raises(RuntimeError, match="inline_container") as caught:
            torch.save(torch.zeros(1 << 16), tmp_path / "weights")
        cause = find_system_error(caught.value, tmp_path)
    assert cause is not None and cause.strerror == "File too large"
    assert find_system_error(RuntimeError("of another kind"), tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    ("name", "what"),
    [("manifest.json", "a prepared"), ("config.json", "a Hugging Face"), ("COMMITTED", "a checkp")],
)
def test_folders_of_other_kinds(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        UserError,
        match=(
            f"^run.dir: '{tmp_path}' is {what}.* \\(it contains {name}\\); choose another folder$"
        ),
    ):
        refuse_foreign_folder(tmp_path)


def test_a_run_inside_a_corpus(workplace: Workplace) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"^run.dir: '.*/corpus/runs/a' lies in .*/corpus, a prepared corpus, which is only"
            r" read; choose a"
        ),
    ):
        refuse_foreign_folder(workplace.folder / "corpus" / "runs" / "a")


def test_a_reader_of_the_console_that_is_gone_is_not_the_folders_fault(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), name_write_errors(tmp_path):
        raise BrokenPipeError


def test_asked_to_stop_while_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty lock, which a crash leaves: it names nobody, and the wait for it says so and ends at
    once when asked to.
    """
    (tmp_path / lock.NAME).touch()
    looks = iter([False, True])
    waiting = f"waiting for {tmp_path}/lock, held by a process that it does not name; "
    with pytest.raises(TryAgain, match=f"^stopped while {waiting}run the same command again$"):
        RunFolder(tmp_path, lambda: next(looks))
    assert (
        capsys.readouterr().err
        == f"{waiting}it is treated as stale after 60 s without a heartbeat\n"
    )
    assert (tmp_path / lock.NAME).exists()

"""What torchrun prints of an end that is no failure, by torch's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llada.torchrun import explain_exit


def test_torchrun_names_our_message_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    explain_exit("without torchrun there is nobody to tell")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    explain_exit("not finished: stopped")
    stopped = ProcessFailure(
        local_rank=0, pid=1, exitcode=75, error_file=str(tmp_path / "error.json")
    )
    ended = ProcessFailure(local_rank=1, pid=2, exitcode=-15, error_file=str(tmp_path / "none"))
    report = str(ChildFailedError("llada", {0: stopped, 1: ended})).splitlines()
    assert report[-2].strip() == "traceback : not finished: stopped" and set(report[-1]) == {"="}

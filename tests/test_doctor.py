"""`llada doctor`: findings, what they mean for the exit code, and machines that lack something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llada import __version__, doctor
from llada.cli import app


def test_a_machine_that_trains_is_ready(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path)
    parsed = json.loads(report.to_json())
    topics = [finding["topic"] for finding in parsed["findings"]]
    assert parsed["ready"] and report.code == 0 and str(report).endswith("ready to train")
    assert {
        "packages",
        "attention kernels",
        "tokenizer encoders",
        "network",
        f"disk of {tmp_path}",
        "limits",
    } <= set(topics)
    assert list(tmp_path.iterdir()) == []  # what tried the disk is gone
    assert all(finding["remedy"] for finding in parsed["findings"] if finding["level"] != "ok")


def test_what_blocks_training_comes_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "_OPTIONAL", {"nor-this": "do that"})
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib99")
    monkeypatch.setattr(doctor, "_try_disk", _full)
    report = doctor.examine(tmp_path)
    blocking = {
        finding.text: finding.remedy for finding in report.findings if finding.level == "problem"
    }
    assert report.code == 1 and "training is blocked" in str(report)
    assert blocking["no-such-package: not installed"] == "pip install no-such-package"
    assert blocking["NCCL_SOCKET_IFNAME=ib99"].startswith("set it to one of")
    assert "cannot be used: No space left on device" in blocking
    assert ("nor-this: not installed", "note", "do that") in [
        (f.text, f.level, f.remedy) for f in report.findings
    ]


def _full(folder: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_broken_package_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[doctor.Finding]:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_gpus", broken)
    report = doctor.examine(tmp_path)
    assert (
        report.code == 1
        and "libcudart.so.13" in str(report)
        and "write, fsync, rename and lock work" in str(report)
    )


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"llada {__version__}\n")

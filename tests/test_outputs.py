"""Outputs appear complete or not at all, and never replace what another command made."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llada import outputs
from llada.errors import UserError
from llada.outputs import new_file, new_folder
from tests.stand_ins import like


def no_links(*_: object) -> None:
    """`os.link` of a file system without hard links."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_of_another_command_is_kept(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not links:
        monkeypatch.setattr(outputs, "os", like(os, link=no_links))
    output = tmp_path / "new" / "out"
    with new_file(output, force=False) as file:
        file.write(b"first")
    with (
        pytest.raises(UserError, match="second' was made by another command while this one ran"),
        new_file(tmp_path / "second", False) as file,
    ):
        file.write(b"mine")
        (tmp_path / "second").write_text("theirs")
    assert output.read_bytes() == b"first"
    assert (tmp_path / "second").read_text() == "theirs"
    with new_file(tmp_path / "second", True) as file:
        file.write(b"mine")
    assert (tmp_path / "second").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out", "second"]


def test_a_folder_of_another_command_is_kept(tmp_path: Path):
    output = tmp_path / "new" / "out"
    with (
        pytest.raises(UserError, match="out' was made by another command while this one ran"),
        new_folder(output, False, "a thing", ("a",)),
    ):
        output.mkdir()
        (output / "a").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out", "a"]


def test_a_failure_leaves_no_parent_folder(tmp_path: Path):
    for make in (
        lambda path: new_file(path, False),
        lambda path: new_folder(path, False, "a thing", ("a",)),
    ):
        with pytest.raises(ValueError), make(tmp_path / "a" / "b" / "c"):
            raise ValueError
        (tmp_path / "file").touch()
        with (
            pytest.raises(UserError, match=r"c' cannot be created \(Not a directory\)"),
            make(tmp_path / "file" / "b" / "c"),
        ):
            pass
    assert os.listdir(tmp_path) == ["file"]

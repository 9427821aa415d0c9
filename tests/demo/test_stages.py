"""What the demo reads, and what it may remove."""

from __future__ import annotations

from pathlib import Path

import pytest

from llada.demo.stages import library_sources, run_demo
from llada.errors import UserError
from llada.training.signals import StopRequest

ROOT = Path(__file__).parents[2]
CONFIGS = str(ROOT / "configs/demo/pretrain.yaml"), str(ROOT / "configs/demo/sft.yaml")


def test_a_file_with_a_second_name_is_read_once(tmp_path: Path) -> None:
    """Debian's Python has a link beside one of its modules: the same input twice would
    be refused.
    """
    for name in ("json", "site-packages", "__pycache__", ".hidden"):
        (tmp_path / name).mkdir()
    for name in ("ast.py", "README.txt", "_data.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "_data_link.py").symlink_to("_data.py")
    assert [path.name for path in library_sources(tmp_path)] == ["_data.py", "ast.py", "json"]


def test_a_folder_that_is_more_than_a_demo_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(
        UserError, match=r"--fresh: '.*' contains 'thesis.tex', which no demo makes"
    ):
        run_demo(StopRequest(), None, CONFIGS, str(tmp_path), smoke=True, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "thesis.tex"]


def test_a_folder_inside_its_own_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--dir: '.*/runs/demo' lies inside .*, which is only read"
    ):
        run_demo(
            StopRequest(),
            [str(tmp_path)],
            CONFIGS,
            str(tmp_path / "runs" / "demo"),
            smoke=True,
            fresh=False,
        )
    assert not list(tmp_path.iterdir())

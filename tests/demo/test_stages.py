"""What the demo reads."""

from __future__ import annotations

from pathlib import Path

from llada.demo.stages import library_sources


def test_a_file_with_a_second_name_is_read_once(tmp_path: Path) -> None:
    """Debian's Python has a link beside one of its modules: the same input twice would be refused."""
    for name in ("json", "site-packages", "__pycache__", ".hidden"):
        (tmp_path / name).mkdir()
    for name in ("ast.py", "README.txt", "_data.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "_data_link.py").symlink_to("_data.py")
    assert [path.name for path in library_sources(tmp_path)] == ["_data.py", "ast.py", "json"]

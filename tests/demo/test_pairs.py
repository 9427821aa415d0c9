"""Questions and answers from docstrings."""

from __future__ import annotations

import json
from pathlib import Path

from llada.demo.pairs import docstring_pairs, write_pairs

SOURCE = '''
def area(r, h=2):
    """Return the area of
    a circle. A second sentence.

    A second paragraph.
    """

class Wide:
    """Holds wide things."""

    async def open(self):
        """Open it; wait for the door."""

    def short(self):
        """No."""

    def long(self):
        """%s"""

def silent():
    pass

def foreign():
    """Größe der Tür, gemessen."""
''' % ("x" * 91)


def test_first_sentences_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "twin.py").write_text(SOURCE)
    wanted = {
        "What does shapes.area(r, h) do?": "Return the area of a circle.",
        "What is the class shapes.Wide?": "Holds wide things.",
        "What does shapes.open(self) do?": "Open it; wait for the door.",
    }
    assert dict(docstring_pairs(tmp_path / "shapes.py")) == wanted
    target = tmp_path / "pairs.jsonl"
    assert (
        write_pairs(
            [tmp_path / "shapes.py", tmp_path / "broken.py", tmp_path / "shapes.py"], target
        )
        == 3
    )
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert {row["prompt"]: row["response"] for row in rows} == wanted

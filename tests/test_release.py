"""One version: of the package, the citation and the changelog."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import llada

ROOT = Path(__file__).resolve().parents[1]


def released() -> list[str]:
    """The versions that the changelog has sections of, newest first."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^## \[(.+?)\](.*)$", changelog)
    assert headings and all(
        name == "Unreleased" or re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for name, date in headings
    )
    return [name for name, _ in headings if name != "Unreleased"]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", llada.__version__)
    assert citation["version"] == llada.__version__
    assert released()[:1] in ([], [llada.__version__])
    assert {"cff-version", "message", "title", "authors", "license", "type"} <= {
        *citation
    } and citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The llada developers"}]

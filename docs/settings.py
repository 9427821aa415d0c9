"""The tables of settings in the docs, made from the docstrings and defaults of the code.

`make docs` writes them; tests/config/test_config.py checks that they are up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launch.profile import ClusterProfile
from llada.config import RunConfig

PAGES: dict[str, type[BaseModel]] = {"configuration.md": RunConfig, "slurm.md": ClusterProfile}
"""Page -> what its table lists."""
_TABLE = re.compile(r"\| Setting \| Default \| Meaning \|\n(\|.*\n)+")


def settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting with its dotted name; `N` stands for the index of a list's item."""
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        sections = list(_sections_in(field.annotation))
        if not sections:
            yield key, field
            continue
        index = ".N" if get_origin(field.annotation) is list else ""
        seen = set()
        for subsection in sections:
            # The variants of a section share some settings, their name for one.
            for name_below, field_below in settings(subsection, f"{key}{index}."):
                if name_below not in seen:
                    yield name_below, field_below
                seen.add(name_below)


def _sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the sections that an annotation names: `Section`, `list[Section]`, `A | B`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def settings_table(section: type[BaseModel]) -> str:
    """Return the Markdown table of a section's settings."""
    rows = ["| Setting | Default | Meaning |", "|---|---|---|"]
    for key, field in settings(section):
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
            default = f"`{yaml.safe_dump(value).splitlines()[0]}`"
        meaning = " ".join((field.description or "").split()).replace("|", "/")
        rows.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def with_table(page: str, section: type[BaseModel]) -> str:
    """Return the text of a page with its table replaced by the current one."""
    text, count = _TABLE.subn(lambda _: settings_table(section), page)
    if count != 1:
        raise ValueError(f"the page has {count} tables of settings, expected one")
    return text


def main() -> int:
    """Write the tables."""
    docs = Path(__file__).parent
    for name, section in PAGES.items():
        path = docs / name
        path.write_text(with_table(path.read_text(encoding="utf-8"), section), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

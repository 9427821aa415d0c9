"""What reading reports: what was left out, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llada.errors import UserError
from llada.types import JsonObject

_MAX_LISTED = 10_000
"""Most entries that a report lists; further ones are only counted."""


@dataclass
class Report:
    """What was left out.

    Attributes:
        skipped: number of files, folders, lines and documents left out, by reason.
        listed: {path, line, reason, message} of the first 10,000 files, lines and documents left
            out. `line` is the number of a line, element or row.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    listed: list[JsonObject] = field(default_factory=list)

    def leave_out(self, path: str, line: int | None, reason: str, message: str) -> None:
        """Count and list one file, line or document.

        Args:
            path: file or dataset that contains it.
            line: its number in the file, from 1; None for a whole file, or if it is unknown.
            reason: plural under which it is counted, such as "lines not JSON".
            message: what is wrong with it.
        """
        self.skipped[reason] += 1
        if len(self.listed) < _MAX_LISTED:
            self.listed.append({"path": path, "line": line, "reason": reason, "message": message})


def no_document(where: str, skipped: Counter[str]) -> UserError:
    """Return the error for an input without documents."""
    return UserError(f"--input: no document in {where}{reasons_of(skipped)}")


def reasons_of(skipped: Counter[str]) -> str:
    """Format the counts of what was left out, in parentheses; "" if nothing was."""
    if not skipped:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f" (left out: {reasons})"

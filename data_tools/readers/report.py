"""What reading reports: the sources that were read, and what was left out of them and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llada.errors import UserError

_MAX_LISTED = 10_000
"""Entries that a report lists; what is left out beyond them is only counted."""


@dataclass
class Report:
    """What was read and what was left out.

    Attributes:
        sources: {path, bytes, documents} of every source that yielded a document; bytes are those
            on disk.
        skipped: number of files, folders, lines and documents left out, by reason.
        listed: {path, line, reason, message} of the lines and documents left out, the first
            10,000. For an array, `line` is the number of the element.
    """

    sources: list[dict[str, object]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, object]] = field(default_factory=list)

    def leave_out(self, path: str, line: int | None, reason: str, message: str) -> None:
        """Count and list one line or document.

        Args:
            path: file or dataset that holds it.
            line: its number in the file, from 1; None: a whole file, or not known.
            reason: what it is counted under, a plural: "lines not JSON".
            message: what is wrong with this one.
        """
        self.skipped[reason] += 1
        if len(self.listed) < _MAX_LISTED:
            self.listed.append({"path": path, "line": line, "reason": reason, "message": message})


def no_document(where: str, skipped: Counter[str]) -> UserError:
    """Return the error for an input that holds no document."""
    return UserError(f"--input: no document in {where}{reasons_of(skipped)}")


def reasons_of(skipped: Counter[str]) -> str:
    """Format the counts of what was left out, in brackets; an empty string if nothing was."""
    if not skipped:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f" (left out: {reasons})"

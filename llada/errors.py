"""The ways in which a command ends early, and the one-line messages that go with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user error. The command line prints it as one line and exits with 2.

    The message names the setting (or file), its value, what is allowed and, if there is one, the
    nearest right name.
    """


class RunError(Exception):
    """A failure that is not a user error (a lost file, a loss that is not finite).

    The command line prints it as one line and exits with 1.
    """


class StepError(RunError):
    """A step whose numbers stop the run. The same step gives the same numbers again.

    Args:
        message: the line for the user.
        step: number of the step, from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class TryAgain(Exception):
    """Neither finished nor failed: what is done is kept, and the same command continues.

    The command line prints it as one line and exits with 75.
    """


def one_line(error: object) -> str:
    """Return the text of another library's error without its line breaks and indentation."""
    return " ".join(str(error).split())


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `allowed`, or "" if none is close."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    if not near:
        return ""
    return f" (did you mean '{near[0]}'?)"

"""The ways in which a command ends early, and the one-line messages that go with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's. The command line prints it as one line and exits with 2.

    The text names the setting (or file), its value, what is allowed and, where one exists, the
    nearest right name.
    """


class RunError(Exception):
    """A failure that is not the user's mistake (a lost file, a non-finite loss). One line,
    exit 1.
    """


class StepError(RunError):
    """A step whose numbers stop the run. The same step gives the same numbers again."""


class TryAgain(Exception):
    """Not finished and not a failure: what is done is kept, and the same command goes on. One line,
    exit 75.
    """


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `allowed`, or an empty string when none is
    near.
    """
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""

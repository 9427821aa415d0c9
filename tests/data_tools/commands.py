"""Run `llada data ...` in this process, and expect refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from data_tools.cli import app
from llada.errors import UserError


def llada_data(*words: object) -> Result:
    """Run a command with these words on its command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


def shown(*words: object) -> str:
    """What a command that succeeds prints."""
    result = llada_data(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refusal(*words: object) -> str:
    """The one line with which a command refuses."""
    result = llada_data(*words)
    assert isinstance(result.exception, UserError), result.output + repr(result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def expect_refusal(call: Callable[[], object], *parts: str) -> None:
    """Expect a UserError of one line with all these parts."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message

"""The command line, run in this process as a user runs it."""

from typing import Any

from typer.testing import CliRunner

from mxd_lens.cli import app


def run(*arguments: object, code: int = 0) -> Any:
    """Runs `mxd-lens` and checks its exit code; `output` holds what it printed, errors included."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result

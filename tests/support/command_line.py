"""The command line, run in this process as a user runs it."""

from typing import Any

from typer.testing import CliRunner

from mxd_lens.cli import app


def run(*arguments: object, code: int | None = 0) -> Any:
    """Runs `mxd-lens` and checks its exit code, unless `code` is None.

    `output` of what is returned holds all that was printed, errors included.
    """
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert code is None or result.exit_code == code, result.output
    return result

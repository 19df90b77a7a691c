"""The application that the commands register with, and what it does with their errors."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mxd_lens import __version__
from mxd_lens.artifacts.files import write_text
from mxd_lens.cli.options import STDOUT, message_of

TRACEBACK = "MXD_LENS_TRACEBACK"
"""The environment variable that shows tracebacks."""

app = typer.Typer(
    help="Train, load, attach, interpret and evaluate Mixtures of Decoders and transcoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # its tables cut long names of options
)


class GroupedHelp(TyperCommand):
    """A command whose --help lists options under the names of their groups, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mxd_lens {__version__}")
        raise typer.Exit


@app.callback()
def version(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train, load, attach, interpret and evaluate Mixtures of Decoders and transcoders."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a command, whose errors are shown in one line."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        try:
            function(**arguments)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt as e:
            typer.echo(str(e) or "Interrupted.", err=True)
            raise typer.Exit(130) from e
        except Exception as e:
            if os.environ.get(TRACEBACK):
                raise
            typer.echo(f"Error: {message(e)}", err=True)
            raise typer.Exit(1) from e

    return app.command(cls=GroupedHelp)(run)


def show(result: Any, file: Path | None, *lines: str) -> None:
    """Prints a command's result, and writes it as JSON where that was asked for.

    Args:
        result: a report, or several by name.
        file: the JSON file. None: none is written. `STDOUT`: the JSON is printed, and nothing else.
        lines: what to print after the result.
    """
    if file is not None:
        written = json.dumps(as_json(result), indent=1)
        if file == STDOUT:
            typer.echo(written)
            return
        write_text(file, written + "\n")
    for report in result.values() if isinstance(result, Mapping) else [result]:
        typer.echo(str(report))
    for line in lines:
        typer.echo(line)


def as_json(result: Any) -> Any:
    """A result as JSON holds it: by its own `to_dict`, by its fields, or as the rows of its table."""
    if hasattr(result, "to_dict"):
        return result.to_dict()
    if isinstance(result, Mapping):
        return {name: as_json(value) for name, value in result.items()}
    if isinstance(result, list | tuple):
        return [as_json(value) for value in result]
    if hasattr(result, "to_pandas"):
        return [dict(zip(result.columns, map(as_json, row), strict=True)) for row in result.rows]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {f.name: as_json(getattr(result, f.name)) for f in dataclasses.fields(result)}
    if isinstance(result, float) and not math.isfinite(result):
        return None  # JSON has no such number
    return result if isinstance(result, str | int | float | bool | None) else str(result)


def message(error: Exception) -> str:
    """What a person is told about an error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"the memory is full. Use a smaller layer, batch or context. ({error})"
    expected = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError, IndexError)
    if isinstance(error, expected) or type(error) is LookupError:
        return message_of(error)
    return (
        f"{type(error).__name__}: {error}. This is a fault in mxd_lens: please report it, with what "
        f"{TRACEBACK}=1 prints."
    )


def main() -> None:
    """Runs the command line."""
    app()

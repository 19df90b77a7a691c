"""Results that are a table: readable in a terminal and in a notebook, and a data frame on request."""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas

Cell = str | int | float
"""Text, a count or an id, or a measured number."""


WIDTH = 160
"""Of a table that is printed into a file, a pipe or a notebook, at most."""


class Printable:
    """What prints as a table, by `print` as by `rich.print`. Subclasses give `__rich__`."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        # Text alone, no colours and no HTML. Only a terminal, or who says so, has a width to keep to.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
        console = Console(force_terminal=False, force_jupyter=False, width=width)
        with console.capture() as written:
            console.print(self)
        return written.get().rstrip("\n")

    def _repr_html_(self) -> str:
        return self.__rich__()._repr_mimebundle_(["text/html"], [])["text/html"]


class Tabular(Printable):
    """A result that prints as a table.

    Subclasses give `title`, `columns` and `rows`; text in a cell is shown as it is, never as markup.
    """

    @property
    def title(self) -> str:
        """What the table is about."""
        raise NotImplementedError

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""
        raise NotImplementedError

    @property
    def rows(self) -> Iterable[Sequence[Cell]]:
        """The cells, a row at a time."""
        raise NotImplementedError

    def __repr__(self) -> str:
        # A result holds thousands of numbers: in a console one line says which it is.
        return f"<{type(self).__name__}: {printable(self.title)}>"

    def to_pandas(self) -> "pandas.DataFrame":
        """The table as a data frame, its numbers unrounded."""
        import pandas

        return pandas.DataFrame([list(row) for row in self.rows], columns=list(self.columns))

    def __rich__(self) -> Table:
        rows = list(self.rows)
        table = Table(title=Text(self.title))
        for i, column in enumerate(self.columns):
            is_text = all(isinstance(row[i], str) for row in rows)
            # Folded where there is no room: a number that is cut off reads as another.
            table.add_column(Text(column), justify="left" if is_text else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(shown(cell)) for cell in row))
        return table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in self.rows)
        return (
            f"<table><caption>{escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def shown(cell: Cell) -> str:
    """A cell as it is printed: numbers to three digits, control characters as escapes."""
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3g}"
    return printable(str(cell))


def printable(text: str) -> str:
    """Text on one line: what does not print as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def percent(share: float) -> str:
    """A share as it is printed."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _html_cell(cell: Cell) -> str:
    align = "left; white-space: pre-wrap" if isinstance(cell, str) else "right"
    return f'<td style="text-align: {align}">{escape(shown(cell))}</td>'

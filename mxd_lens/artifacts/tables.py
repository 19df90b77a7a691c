"""Results as tables: in a terminal, in a pipe, in a notebook, on a page, and as data frames.

Everything that is shown passes through `text_of`, the one place that turns data into text. What it returns
is plain: it is never read as rich markup or HTML, and no control character in it reaches a terminal.
"""

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    import pandas

Cell = str | int | float | None
"""Text, a count or an id, a measured number, or nothing."""

ABSENT = "–"
"""How a number that is not known is shown."""

UNBOUNDED = 100_000
"""The width of a pipe or a file: one line per row, whatever its length."""

GAP = 2
"""Spaces between two columns."""

LONGEST_WORD = 40
"""Columns that a word may ask for; one that is longer still is folded."""

JOINERS = {"\u200c", "\u200d"}
"""Characters that do not print but shape the letters and emoji around them."""

NUMBER = re.compile(rf"[+-]?\d[\d,.]*(e[+-]?\d+)?( ?%| M)?|nan|{ABSENT}|")


def printable(text: str) -> str:
    """Text on one line, with control, direction and surrogate characters as escapes."""
    return "".join(
        c if c.isprintable() or c in JOINERS else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def number(value: float) -> str:
    """A number to three digits; a dash if it is not finite."""
    if not math.isfinite(value):
        return ABSENT
    if isinstance(value, int) or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def decimals(value: object, places: int = 3) -> str:
    """A number with so many decimal places; anything else as `text_of` shows it."""
    return (
        f"{value:.{places}f}" if isinstance(value, int | float) and math.isfinite(value) else text_of(value)
    )


def percent(share: float) -> str:
    """A share in percent; a dash if it is not known."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else ABSENT


def text_of(cell: object) -> str:
    """What is shown of a cell, a title or a heading: plain text on one line."""
    if cell is None:
        return ABSENT
    return number(cell) if isinstance(cell, float) else printable(str(cell))


@dataclass(frozen=True)
class Table:
    """A title, named columns and rows of cells.

    A column in which no row has a value is not shown. Where a table is too wide for the terminal even with
    its texts wrapped, each row is shown as lines of "column  value": no number and no word is broken.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""

    @property
    def shown(self) -> tuple[list[str], list[list[str]]]:
        """The headings and the cells of the columns that have values, as text."""
        kept = [
            i
            for i in range(len(self.columns))
            if not self.rows or any(text_of(row[i]) not in ("", ABSENT) for row in self.rows)
        ]
        return (
            [text_of(self.columns[i]) for i in kept],
            [[text_of(row[i]) for i in kept] for row in self.rows],
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """The table as a data frame, its numbers unrounded."""
        import pandas

        return pandas.DataFrame([list(row) for row in self.rows], columns=list(self.columns))

    def html(self) -> Markup:
        """The table as an HTML element; every text in it is escaped."""
        head, body = self.shown
        numeric = _numeric(head, body)

        def cells(tag: str, row: Sequence[str]) -> Markup:
            right = Markup(' class="number" style="text-align: right"')
            left = Markup(' style="text-align: left; white-space: pre-wrap"')
            made = zip(row, numeric, strict=True)
            return Markup("").join(
                Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), right if is_number else left, text)
                for text, is_number in made
            )

        caption = Markup("<caption>{}</caption>").format(text_of(self.title)) if self.title else ""
        rows = Markup("").join(Markup("<tr>{}</tr>").format(cells("td", row)) for row in body)
        return Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
            caption, cells("th", head), rows
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        head, body = self.shown
        if self.title:
            yield Text(text_of(self.title), style="bold")
        numeric = _numeric(head, body)
        columns = [[name, *(row[i] for row in body)] for i, name in enumerate(head)]
        natural = [max(map(cell_len, column)) for column in columns]
        # A heading wraps between its words; a number never does.
        least = [
            max(
                _longest_word(column[0]),
                *(cell_len(text) if is_number else _longest_word(text) for text in column[1:]),
                1,
            )
            for column, is_number in zip(columns, numeric, strict=True)
        ]
        widths = _fit(natural, least, options.max_width - GAP * (len(head) - 1))
        if widths is None:
            yield _stacked(head, body, options.max_width)
            return
        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        # Rows of several lines each are told apart by an empty line.
        table.show_lines = any(
            cell_len(text) > width for row in body for text, width in zip(row, widths, strict=True)
        )
        for name, is_number, width in zip(head, numeric, widths, strict=True):
            table.add_column(
                Text(name), justify="right" if is_number else "left", width=width, overflow="fold"
            )
        for row in body:
            table.add_row(*map(Text, row))
        yield table


class Tabular:
    """A result that shows itself as tables.

    Subclasses give `title`, `columns` and `rows` for one table, or `tables` for several.
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

    @property
    def tables(self) -> list[Table]:
        """What is shown, a table for each question."""
        return [Table(self.columns, list(self.rows), self.title)]

    def __repr__(self) -> str:
        # A result holds thousands of numbers: in a console one line says which it is.
        return f"<{type(self).__name__}: {text_of(self.tables[0].title)}>"

    def to_pandas(self) -> "pandas.DataFrame":
        """The first table as a data frame, its numbers unrounded."""
        return self.tables[0].to_pandas()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for i, table in enumerate(self.tables):
            if i:
                yield Text("")
            yield table

    def __str__(self) -> str:
        """Plain text: wrapped to the width of a terminal (or to COLUMNS), one line per row in a pipe."""
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else UNBOUNDED
        console = Console(force_terminal=False, force_jupyter=False, width=width, no_color=True)
        with console.capture() as written:
            console.print(Group(self))
        return "\n".join(line.rstrip() for line in written.get().rstrip("\n").split("\n"))

    def _repr_html_(self) -> str:
        return str(Markup("\n").join(table.html() for table in self.tables))


def _numeric(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers and nothing else."""
    return [bool(body) and all(NUMBER.fullmatch(row[i]) for row in body) for i in range(len(head))]


def _longest_word(text: str) -> int:
    return min(max(map(cell_len, text.split()), default=0), LONGEST_WORD)


def _fit(natural: Sequence[int], least: Sequence[int], width: int) -> list[int] | None:
    """Widths of columns in so much room: the widest give way first, none below its least. None: no room."""
    if sum(least) > width:
        return None
    widths = [min(n, max(width, 1)) for n in natural]
    while sum(widths) > width:
        shrinkable = [i for i, (w, at_least) in enumerate(zip(widths, least, strict=True)) if w > at_least]
        widest = max(shrinkable, key=lambda i: widths[i])
        widths[widest] -= 1
    return widths


def _stacked(head: Sequence[str], body: Sequence[Sequence[str]], width: int) -> RenderableType:
    """Every row as lines of "column  value"."""
    names = max(map(cell_len, head))
    values = max(width - names - GAP, 1)
    lines = RichTable.grid(padding=(0, GAP, 0, 0))
    lines.add_column(width=min(names, width))
    lines.add_column(width=values, overflow="fold")
    for i, row in enumerate(body):
        if i:
            lines.add_row("", "")
        for name, text in zip(head, row, strict=True):
            lines.add_row(Text(name), Text(text))
    return lines

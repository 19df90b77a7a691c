"""One self-contained HTML page of what `benchmarks.train_step --json` wrote.

    python -m benchmarks.growth_page FILE.json [FILE.json ...] --output PAGE.html

Each file becomes a table; one that holds a sweep also becomes a figure of time and memory against N and K.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path

import plotly.graph_objects as go
import torch
from markupsafe import Markup
from plotly.subplots import make_subplots

from benchmarks.contestants import Size
from benchmarks.train_step import Report, Result, rows, size_title
from mxd_lens.artifacts.page import BLUE, GREEN, GREY, ORANGE, RED, Section, style, write_page

COLOURS = {
    "reference MxD": RED,
    "MxD": BLUE,
    "transcoder": GREEN,
    "eai-sparsify transcoder": ORANGE,
    "sae-lens TopK SAE": "#9b6cc4",
    "floor": GREY,
}
GRADIENTS = "gradients of the MxD's weights"
CSS = """
th[colspan] { padding-top: 1.2rem; } th + th { text-align: right; } td { white-space: nowrap; }
"""
LEAD = (
    "Forward and backward pass (fwd + bwd): the median of the rounds, with quartiles; the contestants take "
    "turns in one process. Peak: what one such pass adds to weights and batch, in a process of its own; it "
    "holds the weights' gradients. ref: the reference MxD. Transcoders and SAE have as many parameters as "
    "the MxD."
)
GROWING = {"n_experts": "experts N", "k": "active experts K"}


def conditions(report: Report) -> str:
    found = report.machine
    return (
        f"{found['device']}, {found['threads']} threads, {found['dtype']}, torch {found['torch']}, "
        f"Python {found['python']}; {report.rounds} rounds"
    )


def growing(report: Report, field: str) -> list[Result]:
    """The results of the sizes that differ in this field alone; none where there is one such size."""

    def rest(result: Result) -> Size:
        return replace(result.size, **{field: 0})

    sizes = {result.size: rest(result) for result in report.results}
    common, count = Counter(sizes.values()).most_common(1)[0]
    chosen = [result for result in report.results if rest(result) == common] if count > 1 else []
    return sorted(chosen, key=lambda result: getattr(result.size, field))


def write_growth_page(path: str | Path, reports: Sequence[Report]) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        reports: what was measured, one section each.
    """
    sections = []
    for report in reports:
        figure = growth_figure(report)
        heading = "Growth with N and K" if figure else "Side by side"
        table = Markup(f'<div class="wide">{number_table(report)}</div>')
        sections.append(Section(heading, conditions(report), (figure, table) if figure else (table,)))
    return write_page(path, "One training step: time and memory", LEAD, sections, css=CSS)


def growth_figure(report: Report) -> go.Figure | None:
    """Time and peak memory, a column for each of N and K that was swept. None without a sweep."""
    sweeps = {field: results for field in GROWING if (results := growing(report, field))}
    if not sweeps:
        return None
    titles = [_sweep_title(field, results[0].size) for field, results in sweeps.items()]
    figure = make_subplots(
        rows=2, cols=len(sweeps), subplot_titles=titles, vertical_spacing=0.12, shared_yaxes=True
    )
    named: set[str] = set()
    for column, (field, results) in enumerate(sweeps.items(), 1):
        for name, points in _lines(results, report.machine["dtype"], field).items():
            for row, (x, y, above, below) in points.items():
                figure.add_scatter(
                    x=x,
                    y=y,
                    error_y={"type": "data", "array": above, "arrayminus": below, "thickness": 1},
                    name=name,
                    legendgroup=name,
                    showlegend=name not in named,
                    mode="lines" if name == GRADIENTS else "lines+markers",
                    line={
                        "color": COLOURS.get(name, GREY),
                        "dash": {"floor": "dash", GRADIENTS: "dot"}.get(name, "solid"),
                    },
                    row=row,
                    col=column,
                )
                named.add(name)
        values = [getattr(result.size, field) for result in results]
        ticks = _apart(values)
        figure.update_xaxes(
            type="log", tickvals=ticks, ticktext=[f"{value:,}" for value in ticks], col=column
        )
        figure.update_xaxes(title_text=GROWING[field], row=2, col=column)
    style(figure, 760)
    everything = [r for results in sweeps.values() for r in results]
    seconds = [r.forward_backward.median for r in everything]
    megabytes = [r.peak_bytes / 1e6 for r in everything if r.peak_bytes]
    for row, title, measured in (
        (1, "forward + backward, s", seconds),
        (2, "peak above weights and batch, MB", megabytes),
    ):
        marks = _one_two_five(measured)
        figure.update_yaxes(type="log", tickvals=marks, ticktext=[f"{mark:,g}" for mark in marks], row=row)
        figure.update_yaxes(title_text=title, row=row, col=1)
    return figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.07, "x": 0},
        margin={"t": 90},
    )


Points = tuple[list[int], list[float], list[float] | None, list[float] | None]


def _lines(results: list[Result], dtype: str | int, field: str) -> dict[str, dict[int, Points]]:
    """By contestant and row of the figure: x, y and what the error bars reach above and below."""
    lines: dict[str, dict[int, Points]] = {}
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        x = [getattr(result.size, field) for result in own]
        times = [result.forward_backward for result in own]
        lines[name] = {
            1: (
                x,
                [time.median for time in times],
                [time.upper_quartile - time.median for time in times],
                [time.median - time.lower_quartile for time in times],
            )
        }
        measured = [result for result in own if result.peak_bytes is not None]
        if measured:
            x = [getattr(result.size, field) for result in measured]
            lines[name][2] = (x, [(r.peak_bytes or 0) / 1e6 for r in measured], None, None)
            if name == "MxD":
                itemsize = getattr(torch, str(dtype)).itemsize
                gradients = [result.parameters * itemsize / 1e6 for result in measured]
                lines[GRADIENTS] = {2: (x, gradients, None, None)}
    return lines


def _sweep_title(field: str, size: Size) -> str:
    other = f"K {size.k}" if field == "n_experts" else f"N {size.n_experts:,}"
    return f"d {size.d}, H {size.d_hidden:,}, {other}, batch {size.batch:,}"


def _apart(values: list[int]) -> list[int]:
    """Those values far enough from the one before for their labels not to meet on a log axis."""
    kept: list[int] = []
    for value in sorted(set(values)):
        if not kept or value >= 1.5 * kept[-1]:
            kept.append(value)
    return kept


def _one_two_five(values: list[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten around the values."""
    if not values:
        return []
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]


def number_table(report: Report) -> str:
    """The rows of every size under its title."""
    lines = []
    for size, results in groupby(report.results, key=lambda result: result.size):
        table = rows(list(results))
        lines.append(f'<tr><th colspan="{len(table[0])}">{escape(size_title(size))}</th></tr>')
        if len(lines) == 1:
            lines.append("<tr>" + "".join(f"<th>{escape(column)}</th>" for column in table[0]) + "</tr>")
        for row in table:
            name, *numbers = row.values()
            cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
            lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE.html")
    options = parser.parse_args()
    write_growth_page(options.output, [Report.load(file) for file in options.files])


if __name__ == "__main__":
    main()

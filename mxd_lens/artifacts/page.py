"""What every page here shares: one self-contained HTML file, readable on white and on black."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from html import escape
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from typing import Any

import plotly.graph_objects as go

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6573; --line: #d8dde5; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa5b5; --line: #363e4b; --page: #14181f; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: var(--soft); margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.soft { color: var(--soft); }
.continuation { border-left: 3px solid var(--line); padding: .1rem 1rem; margin: .8rem 0;
                white-space: pre-wrap; overflow-wrap: anywhere; }
.continuation b { display: block; font-size: .85rem; color: var(--soft); }
.wide { overflow-x: auto; }
"""

# Grey reads on white and on near-black alike: the figures need no second version for the dark page.
GREY, BLUE, ORANGE, GREEN, RED = "#808896", "#3b82c4", "#e08a2e", "#3a9d6a", "#c8553d"

COLOURS = (BLUE, GREEN, ORANGE, RED, "#8d6cab", "#4aa8a8", "#b08d3c")
"""Of the lines and points of a figure that compares architectures, in this order."""

CONFIG = {"displaylogo": False, "responsive": True}


def write_page(
    path: str | Path, title: str, lead: str, parts: Iterable[str | go.Figure], more_style: str = ""
) -> Path:
    """Writes a page that needs no network.

    Args:
        path: the HTML file.
        title: its heading.
        lead: the line under it.
        parts: figures and HTML, from top to bottom.
        more_style: CSS of this page alone.
    """
    body, has_plotly = [], False
    for part in parts:
        if isinstance(part, go.Figure):
            plot = part.to_html(full_html=False, include_plotlyjs=not has_plotly, config=CONFIG)
            has_plotly = True
            body.append(f'<div class="wide">{plot}</div>')
        else:
            body.append(part)
    newline = "\n"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}{more_style}</style></head><body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{newline.join(body)}
</body></html>
"""
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def write_png(path: str | Path, figure: go.Figure, width: int = 1100) -> Path:
    """Writes a figure that has a height as a picture, on white.

    Raises:
        ImportError: kaleido is not installed.
    """
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
    figure.write_image(path, width=width, height=figure.layout.height, scale=2)
    return Path(path)


def facts_table(facts: Mapping[str, Any]) -> str:
    """A table of names and what they are, escaped."""
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def style(figure: go.Figure, height: int) -> go.Figure:
    """The look that figures share."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 50, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13},
        showlegend=False,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY},
    )
    figure.update_xaxes(gridcolor="rgba(128,136,150,0.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,136,150,0.2)", zeroline=False)
    return figure


@cache
def field_docs(cls: Any) -> dict[str, str]:
    """The docstring under every field of a dataclass."""
    found = re.findall(
        r'^    (\w+): [^\n]*\n    """(.*?)"""', dedent(getsource(cls)), flags=re.MULTILINE | re.DOTALL
    )
    docs = {name: " ".join(text.split()) for name, text in found}
    return {f.name: docs[f.name] for f in fields(cls)}

"""The shell of every page: one self-contained HTML file, readable on white and on black.

A page runs the scripts written here and no other: its content security policy names their hashes, and asks
nothing of any network. Whatever comes from data passes through `text_of` and is escaped by jinja2.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from html import escape
from importlib.resources import files
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from typing import Any

import plotly.graph_objects as go
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mxd_lens.artifacts.files import atomic_file, write_text
from mxd_lens.artifacts.tables import Table, Tabular, number, percent, printable, text_of

# Okabe and Ito's colours, which readers with any colour vision tell apart on white and on near-black alike.
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
ORANGE, RED, PINK, YELLOW = "#e69f00", "#d55e00", "#cc79a7", "#b3a100"
GREY = "#808896"
"""Of the unmodified model, of zero ablation, and of text and axes on figures."""
ACCENT = "#7a5fa0"
"""Of a figure that compares no architectures."""
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW)

ARCHITECTURE_COLOURS = {
    "mxd": BLUE,
    "skip_mxd": SKY,
    "topk_transcoder": ORANGE,
    "topk_skip_transcoder": RED,
    "jumprelu_transcoder": ORANGE,
    "jumprelu_skip_transcoder": RED,
    "topk_sae": PINK,
    "affine_mxd": GREEN,
    "affine_skip_mxd": GREEN,
    "molt": YELLOW,
}
"""One colour per architecture, in every figure."""


def colours_of(architectures: Mapping[str, str]) -> dict[str, str]:
    """The colour of each layer: its architecture's, or one that is still free.

    Args:
        architectures: the layers' architectures, by the layers' names.
    """
    found: dict[str, str] = {}
    for name, architecture in architectures.items():
        own = ARCHITECTURE_COLOURS.get(architecture)
        if own is None or own in found.values():
            taken = {ARCHITECTURE_COLOURS.get(a) for a in architectures.values()} | set(found.values())
            own = next((c for c in COLOURS if c not in taken), GREY)
        found[name] = own
    return found


# Pages


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, its claim in one sentence, and what shows it."""

    heading: str
    claim: str = ""
    bodies: tuple[Any, ...] = ()
    """Figures, tables, results that show themselves as tables, and HTML."""


@dataclass(frozen=True)
class Texts:
    """Texts side by side, each under a heading; line ends stay."""

    texts: Mapping[str, str]


def write_page(path: str | Path, title: str, lead: str, sections: Iterable[Section], css: str = "") -> Path:
    """Write a page that needs no network.

    Args:
        path: the HTML file.
        title: its heading.
        lead: the sentence under it.
        sections: what follows, from top to bottom.
        css: style of this page alone.
    """
    figures: list[Any] = []

    def shown(body: Any) -> dict[str, Any]:
        if isinstance(body, go.Figure):
            figures.append(json.loads(plain_text(body).to_json()))
            return {"figure": len(figures) - 1, "height": body.layout.height or 360}
        if isinstance(body, Texts):
            return {"texts": body.texts}
        if isinstance(body, Table):
            return {"html": body.html()}
        if isinstance(body, Tabular):
            return {"html": Markup("\n").join(table.html() for table in body.tables)}
        if isinstance(body, Markup):
            return {"html": body}
        raise TypeError(f"A page shows figures, tables and texts, not a {type(body).__name__}.")

    parts = [
        {"heading": s.heading, "claim": s.claim, "bodies": [shown(body) for body in s.bodies]}
        for s in sections
    ]
    scripts = {"plotly": None, "script": ("mxd_lens.artifacts", "page.js")} if figures else {}
    page = render(
        "mxd_lens.artifacts",
        "report.html",
        scripts,
        title=title,
        lead=lead,
        parts=parts,
        figures=as_json(figures),
        has_figures=bool(figures),
        css=style_sheet() + css,
    )
    return write_html(path, page)


def write_html(path: str | Path, page: str) -> Path:
    """Write a page; half of a surrogate pair, which no encoding has, is written as an escape."""
    return write_text(path, page, errors="backslashreplace")


def write_png(path: str | Path, figure: go.Figure, width: int = 1100) -> Path:
    """Write a figure that has a height as a picture, on white.

    Raises:
        ImportError: kaleido is not installed.
    """
    figure = plain_text(figure).update_layout(paper_bgcolor="white", plot_bgcolor="white")
    with atomic_file(path) as partial_file:
        figure.write_image(partial_file, width=width, height=figure.layout.height, scale=2)
    return Path(path)


def picture(path: str | Path) -> Markup:
    """A PNG file as a part of a page."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="" style="width: 100%">').format(data)


def facts(named: Mapping[str, Any]) -> Table:
    """Names and values as a table."""
    return Table(["name", "value"], [[name.replace("_", " "), fact(value)] for name, value in named.items()])


def fact(value: Any) -> str:
    """A setting as a page shows it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{str(name).replace('_', ' ')} {fact(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Templates


@cache
def environment(package: str) -> Environment:
    """The templates of a package, and the shell here."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("mxd_lens.artifacts")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every text that a template shows, whatever it comes from.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    found.filters |= {"number": number, "percent": percent, "lines": lines}
    return found


def render(package: str, template: str, scripts: Mapping[str, Any], **context: Any) -> str:
    """A page that may run the scripts given and no other.

    Args:
        package: whose template.
        template: its name.
        scripts: by the names that the template knows them by, a package and a file; None: plotly.js.
        context: what the template shows.
    """
    made = {name: script(*(where or ())) for name, where in scripts.items()}
    hashes = " ".join(digest for _, digest in made.values()) or "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    codes = {name: code for name, (code, _) in made.items()}
    css = Markup(context.pop("css"))
    return environment(package).get_template(template).render(**context, **codes, css=css, policy=policy)


@cache
def script(package: str = "", name: str = "") -> tuple[Markup, str]:
    """A script's text, plotly's without a name, and its hash in a content security policy."""
    code = asset(package, name) if name else get_plotlyjs()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return Markup(code), f"'sha256-{digest}'"


@cache
def asset(package: str, name: str) -> str:
    """A style sheet or script beside the templates of a package."""
    return (files(package) / "templates" / name).read_text(encoding="utf-8")


def style_sheet() -> str:
    """What all pages look like."""
    return asset("mxd_lens.artifacts", "page.css")


def as_json(value: Any) -> Markup:
    """JSON that may stand in a script element."""
    return htmlsafe_json_dumps(
        value, partial(json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    )


def lines(text: str) -> Markup:
    """Text with its line ends, for an element that keeps them."""
    return Markup("\n").join(printable(line) for line in text.split("\n"))


# Figures


def style(figure: go.Figure, height: int) -> go.Figure:
    """Give a figure the look that all share."""
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


def with_legend(figure: go.Figure) -> go.Figure:
    """Put a legend under the panels, below their axes' titles."""
    height = figure.layout.height or 400
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "yanchor": "top", "y": -85 / height, "x": 0},
        margin_b=130,
    )
    return figure


SHOWN_TEXTS = {"name", "text", "x", "y", "customdata", "ticktext", "title", "label", "labels"}
"""Where a figure shows texts of data. plotly reads markup in them, links among it."""


def plain_text(figure: go.Figure) -> go.Figure:
    """A copy of a figure in which texts are texts: what plotly would read as markup is escaped.

    Hover templates are written here and may break lines; they show names and texts of data by reference,
    as in %{fullData.name}.
    """

    def safe(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: v if k == "hovertemplate" else safe(v, k) for k, v in value.items()}
        if hasattr(value, "tolist"):  # numpy's
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [safe(v, key) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None  # JSON has no other word for it
        if isinstance(value, str) and key in SHOWN_TEXTS:
            return escape(printable(value), quote=False)
        return value

    content = figure.to_plotly_json()
    return go.Figure({"data": safe(content["data"]), "layout": safe(content["layout"])})


@cache
def field_docs(cls: Any) -> dict[str, str]:
    """The docstring under every field of a dataclass."""
    found = re.findall(
        r'^    (\w+): [^\n]*\n    """(.*?)"""', dedent(getsource(cls)), flags=re.MULTILINE | re.DOTALL
    )
    docs = {name: " ".join(text.split()) for name, text in found}
    return {f.name: docs[f.name] for f in fields(cls) if f.name in docs}


__all__ = [
    "ACCENT",
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "ORANGE",
    "RED",
    "Section",
    "Texts",
    "colours_of",
    "facts",
    "field_docs",
    "picture",
    "plain_text",
    "render",
    "style",
    "text_of",
    "with_legend",
    "write_html",
    "write_page",
    "write_png",
]

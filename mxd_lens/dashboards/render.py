"""A dashboard as a folder of HTML: an index of experts, and a page about each.

    index.html               search, sorting, and a plot of all experts of the layer
    experts/expert-17.html   one expert
    data/                    the numbers themselves, for `DashboardData.load`

Every file is complete in itself: it opens from disk, asks no network, and a content security policy lets
it run the scripts written here and no other. Whatever comes from a corpus, a model or a file name is
escaped by the templates, and what does not print is shown as an escape.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.architectures.saved import few
from mxd_lens.artifacts.files import atomic_folder, full_path, locked
from mxd_lens.artifacts.page import (
    BLUE,
    GREY,
    as_json,
    asset,
    facts,
    field_docs,
    render,
    style,
    style_sheet,
    write_html,
)
from mxd_lens.artifacts.tables import number, printable
from mxd_lens.dashboards.collect.collection import COLLECTING, Experts, gather
from mxd_lens.dashboards.collect.data import (
    Band,
    CollectionConfig,
    DashboardData,
    Excerpt,
    ExpertData,
    TokenEffect,
    is_saved,
)
from mxd_lens.models import model_first
from mxd_lens.pretrained.registry import find_release

TITLES = {
    "density": "density",
    "n_firings": "firings",
    "mean": "mean coefficient",
    "maximum": "largest coefficient",
    "load_share": "load share",
    "share_of_output": "share of output",
    "loss_effect": "loss effect",
    "coherence": "coherence",
    "consistency": "consistency",
    "contribution_rms": "contribution rms",
    "mean_gate_share": "along mean gate",
    "stable_rank": "stable rank",
}
"""What quantities are called on the pages, by their field of `ExpertData` or their name in the overview."""

PERCENTAGES = {"density", "load_share", "share_of_output", "mean_gate_share"}

COLUMNS = ("density", "mean", "share_of_output", "loss_effect", "coherence", "consistency")
"""Of the index's table, beside the id."""

DEFAULT_SORT = "-density"
"""Of the index: the largest first."""

DEEP = {"loss_effect", "stable_rank"}
"""Quantities that are measured for some experts only, where a dashboard is of all that fire."""

CONSISTENT = 0.1
"""Below this an expert writes in no common direction, and the tokens that its mean promotes say little."""

N_PROMPT = 16
"""Tokens of the prompt in the code on a page, at most."""

LABELS = "labels.json"
UNSHOWN = ("identity", "labels", "deep")
"""Settings that the index does not list."""

RARE_COLUMNS = {"mean", "share_of_output", "consistency"}
"""Those that a narrow screen leaves out."""

SEARCHED = 400
"""Characters of an excerpt, on either side of its peak, that the index's search knows."""

GENERATOR = "mxd_lens dashboard"
PACKAGE = "mxd_lens.dashboards"
INDEX, EXPERTS, DATA = "index.html", "experts", "data"


@model_first
def build_dashboard(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: Experts = None,
    output: str | Path = "dashboard",
    text_name: str = "",
    layer: str | Sequence[str] | None = None,
    cfg: CollectionConfig | None = None,
    progress: bool = True,
    deep: Iterable[int] | None = None,
    labels: Mapping[int, str] | None = None,
) -> Path:
    """Collect what can be known about some experts on a text, and write pages about them.

        build_dashboard(model, mxd, tokens, experts=range(200), output="dashboard")
        build_dashboard(model, mxd, tokens, experts="live", deep=[17])

    A call that was interrupted or killed resumes if called again. The data stay in the folder: the same call
    again only writes the pages anew, and one with more `deep` experts measures only these.

    Args:
        model: any hooked model.
        sae: the layer; it must not be attached.
        tokens: ids, one sequence per row, with BOS where the training had it.
        experts: which have a page. "live": all that fire on the text, with fewer excerpts of each. None: 100
            of these, drawn at random.
        output: the folder to write. New, empty, or an earlier dashboard of the same call.
        text_name: what the text is called, for the reader.
        layer: where the layer was loaded from, for the code on the pages: a folder, or a pair (release,
            sae_id). None: known for the layers of a release that is bundled, or registered as a folder.
        cfg: how much is collected.
        progress: whether to show progress bars.
        deep: see `collect_dashboard`.
        labels: descriptions of experts by id, shown wherever they are named. None: those of a labels.json
            in the layer's folder.

    Returns:
        The index's path: open it in a browser.

    Raises:
        FileExistsError: the folder holds something else than a dashboard.
        LockedError: another process is writing this dashboard.
        IndexError, ValueError: as `collect_dashboard`.
    """
    output = full_path(output)
    check_replaceable(output)
    found = (find_release(sae) if layer is None else layer) or ""
    if labels is None:
        labels = read_labels(Path(found) / LABELS) if isinstance(found, str) and found else {}
    with locked(output.with_name(f".{output.name}.lock"), "dashboard"):
        data, _ = gather(model, sae, tokens, experts, output / DATA, cfg, text_name, found, progress, deep)
        if labels:
            data.settings["labels"] = {str(n): text for n, text in labels.items()}
        return write_dashboard(output, data, progress)


def read_labels(path: Path) -> dict[int, str]:
    """The descriptions in a labels.json: {"17": "..."}, or {"17": {"label": "...", ...}}; none without one.

    Raises:
        ValueError: the file is something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("labels", content)
        labels = {int(n): v["label"] if isinstance(v, dict) else v for n, v in content.items() if v}
        return {n: text for n, text in labels.items() if isinstance(text, str)}
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f'{path} is not a file of labels: {{"17": "a description"}} is expected.') from e


def write_dashboard(folder: str | Path, data: DashboardData, progress: bool = True) -> Path:
    """Write an index and a page for each expert; the folder's parts are described at the module's top.

    The folder appears, or replaces an earlier dashboard, in one step: two dashboards are never mixed, and one
    whose writing is interrupted leaves the earlier one as it was.

    Args:
        folder: where. New, empty, or an earlier dashboard.
        data: what `collect_dashboard` returned.
        progress: whether to show a progress bar.

    Returns:
        The index's path.

    Raises:
        FileExistsError: the folder holds something else.
        WriteError: it could not be written; an earlier dashboard is unchanged.
    """
    folder = full_path(folder)
    check_replaceable(folder)
    order = Order(data)
    with atomic_folder(folder) as partial:

        def write(path: Path, page: str) -> None:
            (partial / path).write_bytes(page.encode("utf-8", "backslashreplace"))

        (partial / EXPERTS).mkdir()
        write(Path(INDEX), index_html(data))
        for e in tqdm(data.experts, desc="Writing pages", disable=not progress):
            write(EXPERTS / Path(file_name(e.expert)), expert_html(data, e, order))
        data.save(partial / DATA)
    return folder / INDEX


def check_replaceable(folder: Path) -> None:
    """Raises FileExistsError where a folder holds anything but a dashboard, complete or begun."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a dashboard is a folder: choose another name.")
    index, data = folder / INDEX, folder / DATA
    others = sorted(path.name for path in folder.iterdir() if path.name not in (INDEX, EXPERTS, DATA))
    if index.exists() and GENERATOR not in index.read_text(encoding="utf-8", errors="replace")[:2000]:
        others.append(INDEX)
    if data.exists() and not (is_saved(data) or (data / COLLECTING).is_dir()):
        others += [DATA] * any(data.iterdir())
    if others:
        raise FileExistsError(
            f"{folder} holds {few(others, at_most=3)}, and a dashboard takes the whole place of what was "
            "there: choose a new folder, or empty this one."
        )


class Order:
    """What comes before and after each expert, by every column of the index and in both directions."""

    def __init__(self, data: DashboardData) -> None:
        self.ids = {e.expert for e in data.experts}
        self.beside: dict[int, dict[str, list[int | None]]] = {e.expert: {} for e in data.experts}
        for column in ("expert", *COLUMNS):
            for sign in ("-", ""):
                order = [None, *(e.expert for e in in_order(data.experts, sign + column)), None]
                for before, expert, after in zip(order, order[1:], order[2:], strict=False):
                    if expert is not None:
                        self.beside[expert][sign + column] = [before, after]


def in_order(experts: Iterable[ExpertData], sort: str) -> list[ExpertData]:
    """Experts as the index sorts them: by a column, from the largest where it is -column; unknown last."""
    column, sign = sort.removeprefix("-"), -1 if sort.startswith("-") else 1

    def key(e: ExpertData) -> tuple[bool, float]:
        value = getattr(e, column)
        return not math.isfinite(value), sign * value if math.isfinite(value) else 0

    return sorted(experts, key=key)


def file_name(expert: int) -> str:
    return f"expert-{expert}.html"


@dataclass(frozen=True)
class ExpertPage:
    """The page about one expert, complete in itself; in a notebook it shows itself."""

    html: str
    """The page."""
    height: int = 720
    """In a notebook, in pixels."""

    def save(self, path: str | Path) -> Path:
        """Writes the page as a file."""
        write_html(path, self.html)
        return Path(path)

    def _repr_html_(self) -> str:
        # A frame of its own: neither the notebook's style reaches in, nor the page's out.
        return (
            f'<iframe sandbox="allow-scripts" allow="clipboard-write" srcdoc="{escape(self.html)}" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


def expert_page(data: DashboardData, expert: int, height: int = 720) -> ExpertPage:
    """The page about one expert by itself, for a notebook; without the links to others.

        expert_page(data, 17)

    Args:
        data: what `collect_dashboard` returned, or `DashboardData.load` of a dashboard's folder data/.
        expert: its id.
        height: in a notebook, in pixels.

    Raises:
        LookupError: the data are not of this expert.
    """
    ids = [e.expert for e in data.experts]
    if expert not in ids:
        raise LookupError(
            f"there is nothing about expert {expert} in this data, of {len(ids):,} experts: collect it with "
            f"experts=[{expert}]."
        )
    return ExpertPage(expert_html(data, data.experts[ids.index(expert)], None), height)


# The page of an expert


def expert_html(data: DashboardData, e: ExpertData, order: Order | None) -> str:
    """The page of an expert; with an order, with links to the index and to others."""
    docs = field_docs(ExpertData)
    excerpts = [excerpt for band in e.bands for excerpt in band.excerpts]
    lists = [[rounded(part) for part in (x.values, x.norms, x.loss_effects)] for x in excerpts]
    scales = [max((abs(v or 0) for x in lists for v in x[quantity]), default=0) or 1 for quantity in range(3)]
    snippet, snippet_note = usage(data.settings, e)
    index = iter(range(len(excerpts)))
    beside = {} if order is None else order.beside[e.expert]
    labels = data.settings.get("labels", {})
    is_deep = e.expert in data.settings.get("deep", [e.expert])
    return page(
        "expert.html",
        scripts={"script": "expert.js"},
        e=e,
        name=labels.get(str(e.expert), ""),
        names=labels,
        in_folder=order is not None,
        beside=beside.get(DEFAULT_SORT, [None, None]),
        with_page=() if order is None else order.ids,
        title=title(data),
        lead=lead(data),
        facts=[
            {"label": TITLES[name], "shown": quantity(name, getattr(e, name)), "meaning": docs[name]}
            for name in TITLES
            if hasattr(e, name) and (is_deep or name not in DEEP)
        ],
        histogram=histogram(e),
        spectrum=spectrum(e),
        has_effects=any(v is not None for x in lists for v in x[2]),
        effects=effects(e) if e.consistency >= CONSISTENT else [],
        neighbours=[
            {"heading": "Fires together with", "meaning": docs["coactive"], "rows": e.coactive},
            {"heading": "Writes like", "meaning": docs["similar"], "rows": e.similar},
        ],
        bands=[shown_band(band, index, scales[0]) for band in e.bands],
        snippet=snippet,
        snippet_note=snippet_note,
        data=as_json({"excerpts": lists, "scales": scales, "beside": beside}),
    )


def histogram(e: ExpertData) -> dict[str, Any] | None:
    """The bars of an expert's coefficients, in the units of the picture; None if it never fired."""
    if not any(e.counts):
        return None
    most = max(e.counts)
    width = 420 / len(e.counts)
    bars = []
    for i, count in enumerate(e.counts):
        height = 100 * count / most
        bounds = f"{number(e.edges[i])} to {number(e.edges[i + 1])}"
        bars.append(
            {
                "x": f"{i * width:.2f}",
                "width": f"{width - 0.5:.2f}",
                "y": f"{100 - height:.2f}",
                "height": f"{height:.2f}",
                "title": f"{bounds}: {count:,} {'firing' if count == 1 else 'firings'}",
            }
        )
    return {"bars": bars, "low": number(e.edges[0]), "high": number(e.edges[-1]), "most": f"{most:,}"}


def spectrum(e: ExpertData) -> dict[str, Any] | None:
    """The line of an expert's singular values, in the units of the picture; None for fewer than two."""
    values = e.singular_values
    if len(values) < 2 or not values[0] > 0:
        return None
    places = sorted({round(i * (len(values) - 1) / 200) for i in range(201)})
    points = " ".join(
        f"{420 * p / (len(values) - 1):.1f},{100 - 98 * values[p] / values[0]:.1f}" for p in places
    )
    return {
        "points": points,
        "count": len(values),
        "largest": number(values[0]),
        "smallest": number(values[-1]),
    }


def effects(e: ExpertData) -> list[dict[str, Any]]:
    """The tables of promoted and suppressed tokens."""
    docs = field_docs(ExpertData)
    largest = max((abs(effect.logit) for effect in (*e.promoted, *e.suppressed)), default=0) or 1

    def row(effect: TokenEffect) -> dict[str, Any]:
        return {
            "token": visible(effect.token),
            "effect": f"{effect.logit:+.3g}",
            "spread": number(effect.spread),
            "width": round(100 * abs(effect.logit) / largest),
        }

    return [
        {"heading": heading, "meaning": docs[name], "rows": list(map(row, getattr(e, name))), "bar": bar}
        for heading, name, bar in (("Promotes", "promoted", ""), ("Suppresses", "suppressed", " down"))
    ]


def shown_band(band: Band, index: Iterator[int], scale: float) -> dict[str, Any]:
    """A band's heading and texts."""
    bounds = f"coefficients {number(band.low)} to {number(band.high)}" if band.low == band.low else ""
    return {
        "name": "Top" if band.name == "top" else f"{band.name} of its firings",
        "range": bounds,
        "excerpts": [
            {
                "index": next(index),
                "peak": number(x.values[x.peak]),
                "where": f"sequence {x.sequence}, from position {x.start}",
                "pieces": pieces(x, scale),
            }
            for x in band.excerpts
        ],
    }


def pieces(excerpt: Excerpt, scale: float) -> list[dict[str, Any]]:
    """An excerpt's text, token by token; tokens that make up one character together are one piece."""
    found: list[dict[str, Any]] = []
    for i, text in enumerate(excerpt.tokens):
        if text == "" and found:
            found[-1]["tokens"].append(i)
        else:
            found.append({"text": visible(text) or "\u2026", "tokens": [i]})
    for piece in found:
        tokens = piece.pop("tokens")
        level = max(excerpt.values[i] for i in tokens) / scale
        piece |= {"n": len(tokens), "top": excerpt.peak in tokens, "level": f"{level:.3f}" if level else ""}
    return found


def usage(settings: Mapping[str, Any], e: ExpertData) -> tuple[str, str]:
    """Code that loads the layer and steers the expert, and what is to be said about it."""
    known = {name: made.layer.__name__ for name, made in ARCHITECTURES.items()}
    cls = known.get(settings.get("architecture", ""))
    where, note = settings.get("layer"), ""
    if not where:
        where, note = "the layer's folder", "Put in where the layer is: this collection does not know it."
    places = [where] if isinstance(where, str) else list(where)
    if cls:
        imports, method = f"from mxd_lens import {cls}, load_model, steer", f"{cls}.from_pretrained"
    else:
        imports = "from sae_lens import SAE\n\nfrom mxd_lens import load_model, steer"
        method = "SAE.load_from_disk" if len(places) == 1 else "SAE.from_pretrained"
    model_name = settings.get("model_name") or "the model it was trained on"
    # Twice as strong as it ever was: an expert's effect shows there, and the text still holds together.
    strength = float(f"{2 * e.maximum:.2g}") if e.maximum > 0 else 10.0
    code = f"""{imports}

model = load_model({ascii_literal(model_name)})
layer = {method}({", ".join(map(ascii_literal, places))})
prompt = {ascii_literal(own_prompt(e))}
for strength in (0.0, {strength}):  # unsteered, then steered
    with steer(model, layer, {{{e.expert}: strength}}):
        print(model.generate(prompt, max_new_tokens=20, do_sample=False))"""
    return code, note


def own_prompt(e: ExpertData) -> str:
    """The text up to the expert's strongest firing, as far as it is shown."""
    for band in e.bands:
        for excerpt in band.excerpts:
            tokens = excerpt.tokens[: excerpt.peak + 1][-N_PROMPT:]
            # A special token at the start would be doubled.
            text = "".join(t for t in tokens if not (t.startswith("<") and t.endswith(">"))).strip()
            if text:
                return text
    return "Let's talk about"


def ascii_literal(text: Any) -> str:
    """A text as Python writes it, in double quotes where that is easy, and nothing but ASCII."""
    text = str(text)
    return (
        f'"{text}"' if text.isascii() and text.isprintable() and not set(text) & {'"', "\\"} else ascii(text)
    )


# The index


def index_html(data: DashboardData) -> str:
    """The page of all experts."""
    docs = field_docs(ExpertData)
    experts = in_order(data.experts, DEFAULT_SORT)
    labels = data.settings.get("labels", {})
    overview = {name: rounded(values) for name, values in data.overview.items()}
    values = {name: [known(getattr(e, name)) for e in experts] for name in ("expert", *COLUMNS)}
    columns = [{"name": "expert", "label": "expert", "meaning": "Its id.", "rare": False}] + [
        {"name": name, "label": TITLES[name], "meaning": docs[name], "rare": name in RARE_COLUMNS}
        for name in COLUMNS
    ]
    return page(
        "index.html",
        scripts={"script": "index.js", "overview_script": "overview.js", "plotly": None},
        title=title(data),
        lead=lead(data),
        columns=columns,
        rows=[index_row(e, labels.get(str(e.expert), "")) for e in experts],
        has_labels=bool(labels),
        overview=overview,
        axes=default_axes(overview),
        settings=facts(
            {k: v for k, v in data.settings.items() if k not in ("identity", "labels", "deep")}
        ).html(),
        data=as_json(
            {
                "ids": values["expert"],
                "values": values,
                "texts": [searched(e, labels.get(str(e.expert), "")) for e in experts],
                "overview": overview,
                "names": {
                    name: {"label": label(name), "log": spans_decades(numbers)}
                    for name, numbers in overview.items()
                },
                "figure": overview_figure().to_plotly_json(),
            }
        ),
    )


def index_row(e: ExpertData, label: str) -> dict[str, Any]:
    """An expert's row in the index."""
    before = peak = after = ""
    if e.bands and e.bands[0].excerpts:
        before, peak, after = around_peak(e.bands[0].excerpts[0], 16, 80)
    return {
        "expert": e.expert,
        "label": label,
        "href": f"{EXPERTS}/{file_name(e.expert)}",
        "cells": [
            {"shown": quantity(name, getattr(e, name)), "rare": name in RARE_COLUMNS} for name in COLUMNS
        ],
        "promotes": [visible(x.token[:40]) for x in e.promoted[:5]] if e.consistency >= CONSISTENT else [],
        "before": visible(before),
        "peak": visible(peak),
        "after": visible(after),
    }


def searched(e: ExpertData, label: str) -> str:
    """What the index's search finds an expert by: its label, the tokens it promotes, its top excerpts."""
    top = e.bands[0].excerpts if e.bands else []
    texts = ["".join(around_peak(excerpt, SEARCHED, SEARCHED)) for excerpt in top]
    return "\n".join([label, *(effect.token for effect in e.promoted), *texts]).lower()


def around_peak(excerpt: Excerpt, n_before: int, n_after: int) -> tuple[str, str, str]:
    """An excerpt's text before, at and after its peak, cut to so many characters."""
    tokens, peak = excerpt.tokens, excerpt.peak
    while peak and tokens[peak] == "":  # a character's text stands at the first of its tokens
        peak -= 1
    before, after = "".join(tokens[:peak]), "".join(tokens[peak + 1 :])
    return before[-n_before:], tokens[peak][:n_after], after[:n_after]


def default_axes(overview: Mapping[str, Any]) -> dict[str, str]:
    """What is drawn at first: how often experts fire, and how much they write; or what there is."""
    names = list(overview)
    x = "density" if "density" in names else names[0]
    return {"x": x, "y": next((n for n in ("contribution_rms", "mean") if n in names), names[-1])}


def spans_decades(values: Sequence[float | None]) -> bool:
    """Whether numbers are for a logarithmic axis: none below 0, and over a factor of more than 100."""
    known = [v for v in values if v]
    return bool(known) and min(known) > 0 and max(known) > 100 * min(known)


def overview_figure() -> go.Figure:
    """The figure that the index's script fills: experts without and with a page."""
    figure = go.Figure()
    for colour, size, opacity in ((GREY, 3, 0.5), (BLUE, 6, 0.9)):
        figure.add_scatter(
            mode="markers",
            marker={"color": colour, "size": size, "opacity": opacity},
            hovertemplate="%{customdata}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
        )
    return style(figure, 320).update_layout(template="none", margin_t=15, hovermode="closest")


# What both pages need


def title(data: DashboardData) -> str:
    s = data.settings
    return printable(f"{s.get('architecture', 'layer')} at {s.get('hook_name_out') or s.get('hook_name')}")


def lead(data: DashboardData) -> str:
    s = data.settings
    parts = [
        f"{s.get('model_name') or 'an unnamed model'}, {s.get('hook_name')} \u2192 {s.get('hook_name_out')}",
        f"{s.get('d_sae', 0):,} experts" + (f", {s['k']} active on a token" if s.get("k") else ""),
        f"{s.get('n_tokens', 0):,} tokens" + (f" of {s['text_name']}" if s.get("text_name") else ""),
    ]
    return printable("; ".join(parts) + ".")


def label(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def quantity(name: str, value: float) -> str:
    """A quantity as the pages show it."""
    if name in PERCENTAGES and math.isfinite(value):
        percent = 100 * value
        return f"{percent:.3g} %" if percent == 0 or abs(percent) >= 0.001 else f"{percent:.1e} %"
    return f"{value:+.3g}" if name == "loss_effect" and math.isfinite(value) else number(value)


def visible(text: str) -> str:
    """A token's text with what cannot be seen made visible: line ends as an arrow, the rest as escapes.

    Among the escapes are the characters that turn the direction of all text after them, which could make
    a page say something else than it does.
    """
    return "".join({"\n": "\u21b5", "\t": "\u21e5"}.get(c) or printable(c) for c in text)


def known(value: float) -> float | None:
    """A number for JSON, which has none that is not finite."""
    return value if math.isfinite(value) else None


def rounded(values: Iterable[float]) -> list[float | None]:
    """Numbers to four digits, as short as JSON can have them."""
    return [short(v) if math.isfinite(v) else None for v in values]


def short(value: float) -> float:
    four = float(f"{value:.4g}")
    return int(four) if four.is_integer() else four


def page(template: str, scripts: Mapping[str, str | None], **context: Any) -> str:
    """A page of the dashboard; scripts are files beside the templates, or None for plotly.js."""
    return render(
        PACKAGE,
        template,
        {name: file and (PACKAGE, file) for name, file in scripts.items()},
        css=style_sheet() + asset(PACKAGE, "dashboard.css"),
        label=label,
        file_name=file_name,
        generator=GENERATOR,
        **context,
    )

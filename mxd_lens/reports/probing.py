"""The page about a probing run: the best experts of every class, and what more of them together do."""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import mean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import COLOURS, GREY, style, write_page, write_png
from mxd_lens.evals.probing.probing import (
    ALL,
    ALWAYS,
    CONSTANT,
    N_KEPT,
    SparseProbing,
    TaskFacts,
    of_k,
    spread,
)

COLUMNS = 2
"""Tasks beside each other."""
DENSE_DASH = "dot"


def write_probing_page(path: str | Path, result: SparseProbing) -> Path:
    """Writes the page; the PNG of its second figure is `write_probing_png`'s."""
    settings = result.settings
    parts: list[str | go.Figure] = []
    for task in result.tasks:
        parts += [f"<h2>The best experts of each class: {escape(task)}</h2>", experts_figure(result, task)]
    parts += [
        "<h2>Several experts together</h2>",
        together_figure(result),
        f'<h2>Every mean</h2><div class="wide">{result._repr_html_()}</div>',
        f'<h2>The texts</h2><div class="wide"><table>{text_rows(result.tasks.items())}</table></div>',
    ]
    layers = ", ".join(f"{name} ({layer['d_sae']:,} experts)" for name, layer in settings["layers"].items())
    return write_page(
        path,
        f"Sparse probing of {settings['model_name']}",
        f"One expert's mean coefficient over a text as the probe of its class: {layers}. For each class the "
        f"{settings['n_candidates']} experts whose mean differs most on the training split are tried; the "
        f"{N_KEPT} best there are shown, with their F1 on the test split, over {len(settings['seeds'])} "
        f"splits. Up to {settings['context_size']} tokens of a text are read.",
        parts,
    )


def write_probing_png(path: str | Path, result: SparseProbing) -> Path:
    """Writes the figure of k against F1 as a picture.

    Raises:
        ImportError: kaleido is not installed.
    """
    return write_png(path, together_figure(result))


def colours(result: SparseProbing) -> dict[str, str]:
    """A layer's colour; grey for dense activations."""
    layers = dict(zip(result.settings["layers"], COLOURS * len(result.settings["layers"]), strict=False))
    dense = [name for name in result.features if name not in layers and is_probed(result, name)]
    return layers | dict.fromkeys(dense, GREY)


def is_probed(result: SparseProbing, features: str) -> bool:
    """Whether it is a layer or dense activations, and no constant answer."""
    return any(probe.experts for probe in result.probes if probe.features == features)


def experts_figure(result: SparseProbing, task: str) -> go.Figure:
    """The test F1 of the best single experts: a box a class and layer, a point an expert and split."""
    figure = go.Figure()
    for features, colour in colours(result).items():
        points = [(probe, expert) for probe in result.select(task, features) for expert in probe.experts]
        figure.add_box(
            x=[probe.label for probe, _ in points],
            y=[expert.f1 for _, expert in points],
            text=[f"expert {expert.expert}, split {probe.seed}" for probe, expert in points],
            hovertemplate=f"{escape(features)}, %{{text}}<br>F1 %{{y:.3f}}<extra></extra>",
            name=features,
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            marker={"color": colour, "size": 3, "opacity": 0.6},
            line_width=1.2,
            fillcolor="rgba(0,0,0,0)",
        )
    for label in result.tasks[task].balance:
        level = [probe.scores[CONSTANT].f1 for probe in result.select(task, ALWAYS, label)]
        figure.add_scatter(
            x=[label],
            y=[mean(level)],
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 60, "color": GREY},
            name=ALWAYS,
            hovertemplate=f"{ALWAYS}: F1 %{{y:.3f}}<extra></extra>",
            showlegend=label == next(iter(result.tasks[task].balance)),
        )
    style(figure, 430)
    figure.update_layout(boxmode="group", showlegend=True, legend={"orientation": "h", "y": -0.15})
    return figure.update_yaxes(range=[0, 1.02], title_text="F1 on the test split")


def together_figure(result: SparseProbing) -> go.Figure:
    """F1 against the number of experts in a probe, a panel a task; the level of all coordinates beside it."""
    ks, tasks = result.settings["ks"], list(result.tasks)
    rows = -(-len(tasks) // COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=COLUMNS,
        subplot_titles=[escape(task) for task in tasks],
        vertical_spacing=0.22 / rows,
        horizontal_spacing=0.08,
    )
    for i, task in enumerate(tasks):
        for features, colour in colours(result).items():
            dense = features not in result.settings["layers"]
            kinds = [*(of_k(k) for k in ks), *([ALL] if dense else [])]
            values = {kind: [s.f1 for s in result.by_seed(task, features, kind)] for kind in kinds}
            values = {kind: f1 for kind, f1 in values.items() if f1}
            figure.add_scatter(
                x=list(values),
                y=[mean(f1) for f1 in values.values()],
                error_y={"array": [spread(f1) for f1 in values.values()], "width": 2, "thickness": 1},
                mode="lines+markers",
                line={"color": colour, "width": 1.5, "dash": DENSE_DASH if dense else "solid"},
                marker_symbol="x" if dense and "out" in features else "circle",
                name=features,
                legendgroup=features,
                showlegend=i == 0,
                hovertemplate=f"{escape(features)}, %{{x}}: F1 %{{y:.3f}}<extra></extra>",
                row=i // COLUMNS + 1,
                col=i % COLUMNS + 1,
            )
    style(figure, 90 + 300 * rows)
    figure.update_yaxes(title_text="F1", col=1)
    return figure.update_layout(
        showlegend=True,
        margin_t=100,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1 + 40 / figure.layout.height, "x": 0},
    )


def text_rows(tasks: Iterable[tuple[str, TaskFacts]]) -> str:
    """A table row a task: where its texts are from, how many, of which class."""
    names = ("Task", "From", "Texts of each class", "Tokens", "Cut", "Left out")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    body = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{escape(facts.provider)}</td>"
        f"<td>{escape(listed(facts.balance))}</td>"
        f'<td class="number">{facts.n_tokens:,}</td><td class="number">{facts.n_cut:,}</td>'
        f"<td>{escape(listed(facts.removed))}</td></tr>"
        for name, facts in tasks
    )
    return f"{head}\n{body}"


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n) or "none"

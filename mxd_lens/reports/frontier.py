"""The page about a frontier: errors and cross-entropies against K, a line for each architecture."""

from collections.abc import Callable, Collection
from pathlib import Path
from statistics import mean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import GREY, Section, colours_of, facts, style, write_page, write_png
from mxd_lens.artifacts.tables import Cell, Table
from mxd_lens.evals.faithfulness import FaithfulnessReport
from mxd_lens.evals.frontier import Frontier

Quantity = Callable[[FaithfulnessReport], float]

DASHES: dict[str, tuple[str, Quantity, Quantity]] = {
    "layer": ("solid", lambda r: r.normalized_mse, lambda r: r.ce_loss_replaced - r.ce_loss),
    "experts mean-ablated": (
        "dash",
        lambda r: r.normalized_mse_mean_gate,
        lambda r: r.ce_loss_mean_gate - r.ce_loss,
    ),
    "experts resampled": (
        "dot",
        lambda r: r.normalized_mse_shuffled_gate,
        lambda r: r.ce_loss_shuffled_gate - r.ce_loss,
    ),
}

QUANTITIES: dict[str, Callable[[list[FaithfulnessReport]], str]] = {
    "Normalised MSE": lambda reports: f"{mean(r.normalized_mse for r in reports):.3f}",
    "Feature share": lambda reports: f"{mean(r.feature_share for r in reports):.2f}",
    "Cross-entropy added, nats": lambda reports: (
        f"{mean(r.ce_loss_replaced - r.ce_loss for r in reports):.4f}"
    ),
    "Experts that never fired": lambda reports: f"{mean(r.silent_fraction for r in reports):.0%}",
}
"""A table of the page each; means over seeds."""


def write_frontier_page(path: str | Path, frontier: Frontier) -> Path:
    """Write the page; `write_frontier_png` writes a figure as a picture."""
    settings = frontier.settings
    sections = []
    for text in frontier.texts:
        n_tokens = max(p.reports[text].n_tokens for p in frontier.points if text in p.reports)
        claim = (
            "Lower is better. Solid: the layer; dashed: with its experts mean-ablated; dotted: with the "
            "experts of another token. Where solid and dashed lie close, the experts do little."
        )
        tables = [table(frontier, text, name) for name in QUANTITIES]
        sections.append(
            Section(f"{text}, {n_tokens:,} tokens", claim, (frontier_figure(frontier, text), *tables))
        )
    if frontier.failures:
        sections.append(Section("Runs that failed", "", (facts(frontier.failures),)))
    sections.append(Section("The sweep", "", (facts(settings),)))
    return write_page(
        path,
        f"The sparsity-accuracy frontier of {settings['model_name']}",
        "Each architecture in place of an MLP, at the parameters of a transcoder with "
        f"{settings['transcoder_width']:,} features, after {settings['training_tokens']:,} tokens of "
        f"{settings['text']}.",
        sections,
    )


def write_frontier_png(
    path: str | Path, frontier: Frontier, text: str, layers: Collection[int] | None = None
) -> Path:
    """Write `frontier_figure` as a picture.

    Raises:
        ImportError: kaleido is not installed.
        ValueError: nothing was measured.
    """
    return write_png(path, frontier_figure(frontier, text, layers), width=900)


def frontier_figure(frontier: Frontier, text: str, layers: Collection[int] | None = None) -> go.Figure:
    """Normalised MSE and added cross-entropy against K; a row for each block.

    Args:
        frontier: what was measured.
        text: the held-out text.
        layers: which blocks; None for all that were measured on it.

    Raises:
        ValueError: nothing was measured.
    """
    measured = [p for p in frontier.points if text in p.reports and (layers is None or p.layer in layers)]
    if not measured:
        raise ValueError(f"Nothing was measured on {text!r} at these layers; texts: {frontier.texts}.")
    layers = sorted({point.layer for point in measured})
    ks = sorted({point.k for point in measured})
    titles = [
        title
        for layer in layers
        for title in (f"Layer {layer}: normalised MSE", f"Layer {layer}: cross-entropy added, nats")
    ]
    figure = make_subplots(
        rows=len(layers),
        cols=2,
        subplot_titles=titles,
        vertical_spacing=0.36 / (len(layers) + 1),
        horizontal_spacing=0.09,
    )
    labels = frontier.settings["labels"]
    colours = colours_of({architecture: architecture for architecture in labels})
    named: set[str] = set()
    for row, layer in enumerate(layers, start=1):
        for architecture, label in labels.items():
            for kind, (dash, *quantities) in DASHES.items():
                for column, quantity in enumerate(quantities, start=1):
                    trace = line(frontier, text, layer, architecture, quantity)
                    if not trace.x:
                        continue
                    is_layer = dash == "solid"
                    trace.update(
                        line={
                            "color": colours[architecture],
                            "dash": dash,
                            "width": 2.5 if is_layer else 1.2,
                        },
                        opacity=1 if is_layer else 0.6,
                        mode="lines+markers" if is_layer else "lines",
                        name=label,
                        legendgroup=architecture,
                        showlegend=architecture not in named,
                        hovertemplate=f"%{{fullData.name}}, {kind}<br>K %{{x}}: %{{y:.4f}}<extra></extra>",
                    )
                    named.add(architecture)
                    figure.add_trace(trace, row=row, col=column)
        zero = mean(
            point.reports[text].ce_loss_zero_ablated - point.reports[text].ce_loss
            for point in measured
            if point.layer == layer
        )
        for column, level in ((1, 1.0), (2, zero)):
            level_line = go.Scatter(
                x=[ks[0], ks[-1]],
                y=[level, level],
                mode="lines",
                line={"color": GREY, "dash": "longdashdot", "width": 1.2},
                name="zero ablated",
                legendgroup="zero ablated",
                showlegend=(row, column) == (1, 1),
                hovertemplate="zero ablated: %{y:.4f}<extra></extra>",
            )
            figure.add_trace(level_line, row=row, col=column)
    style(figure, 90 + 330 * len(layers))
    figure.update_xaxes(type="log", tickvals=ks, ticktext=[str(k) for k in ks], title_text="K")
    figure.update_yaxes(
        type="log", tickvals=[0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 2, 5, 10, 20], col=1
    )
    figure.update_yaxes(rangemode="tozero", col=2)  # near 0 it may be below: not a logarithm
    figure.update_layout(
        showlegend=True,
        margin_t=110,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1 + 45 / figure.layout.height, "x": 0},
    )
    return figure


def line(frontier: Frontier, text: str, layer: int, architecture: str, quantity: Quantity) -> go.Scatter:
    """The mean over seeds at each K, with the range of the seeds as error bars."""
    found = {
        k: [quantity(report) for report in frontier.select(text, layer, architecture, k)]
        for k in sorted({point.k for point in frontier.points})
    }
    found = {k: values for k, values in found.items() if values}
    up = [max(values) - mean(values) for values in found.values()]
    down = [mean(values) - min(values) for values in found.values()]
    spread = {"type": "data", "array": up, "arrayminus": down} if any(up) else None
    return go.Scatter(x=list(found), y=[mean(values) for values in found.values()], error_y=spread)


def table(frontier: Frontier, text: str, name: str) -> Table:
    """One quantity of every architecture, a row for each block and K."""
    labels = frontier.settings["labels"]
    rows: list[list[Cell]] = []
    for layer, k in sorted({(point.layer, point.k) for point in frontier.points}):
        reports = (frontier.select(text, layer, architecture, k) for architecture in labels)
        rows.append([layer, k, *(QUANTITIES[name](found) if found else None for found in reports)])
    return Table(["layer", "K", *labels.values()], rows, name)

"""The page about a frontier: errors and cross-entropies against K, an architecture a line."""

from collections.abc import Callable, Collection
from html import escape
from pathlib import Path
from statistics import mean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import COLOURS, GREY, facts_table, style, write_page, write_png
from mxd_lens.evals.faithfulness import FaithfulnessReport
from mxd_lens.evals.frontier import Frontier

Quantity = Callable[[FaithfulnessReport], float]

DASHES: dict[str, tuple[str, Quantity, Quantity]] = {
    "the layer": (
        "solid",
        lambda r: r.normalized_mse,
        lambda r: r.ce_loss_replaced - r.ce_loss,
    ),
    "mean gate": (
        "dash",
        lambda r: r.normalized_mse_mean_gate,
        lambda r: r.ce_loss_mean_gate - r.ce_loss,
    ),
    "shuffled gate": (
        "dot",
        lambda r: r.normalized_mse_shuffled_gate,
        lambda r: r.ce_loss_shuffled_gate - r.ce_loss,
    ),
}


def write_frontier_page(path: str | Path, frontier: Frontier) -> Path:
    """Writes the page; the PNG of every figure is `write_frontier_png`'s."""
    settings = frontier.settings
    parts: list[str | go.Figure] = []
    for text in frontier.texts:
        n_tokens = [p.reports[text].n_tokens for p in frontier.points if text in p.reports]
        parts += [
            f"<h2>Held-out text: {escape(text)}, {max(n_tokens):,} tokens</h2>",
            frontier_figure(frontier, text),
            f'<div class="wide"><table>{rows_of(frontier, text)}</table></div>',
        ]
    if frontier.failures:
        parts.append(f"<h2>What failed</h2>{facts_table(frontier.failures)}")
    parts.append(f"<h2>The sweep</h2>{facts_table(settings)}")
    return write_page(
        path,
        f"The sparsity-accuracy frontier of {settings['model_name']}",
        "Each architecture in the place of an MLP, at the parameters of a transcoder with "
        f"{settings['transcoder_width']:,} features, after {settings['training_tokens']:,} tokens of "
        f"{settings['text']}. Solid: the layer; dashed: with its experts' part exchanged for its mean; "
        "dotted: for another token's. Lower is better; a small gap between solid and dashed says that "
        "the experts do little.",
        parts,
    )


def write_frontier_png(
    path: str | Path, frontier: Frontier, text: str, layers: Collection[int] | None = None
) -> Path:
    """Writes `frontier_figure` as a picture.

    Raises:
        ImportError: kaleido is not installed.
        ValueError: nothing was measured.
    """
    return write_png(path, frontier_figure(frontier, text, layers), width=900)


def frontier_figure(frontier: Frontier, text: str, layers: Collection[int] | None = None) -> go.Figure:
    """Normalised MSE and cross-entropy increase against K; a row a layer, a line an architecture.

    Args:
        frontier: what was measured.
        text: the held-out text.
        layers: which; None for all that were measured on it.

    Raises:
        ValueError: nothing was measured.
    """
    measured = [
        point
        for point in frontier.points
        if text in point.reports and (layers is None or point.layer in layers)
    ]
    if not measured:
        raise ValueError(f"Nothing was measured on {text!r} at these layers; texts: {frontier.texts}.")
    layers = sorted({point.layer for point in measured})
    ks = sorted({point.k for point in measured})
    titles = [
        title
        for layer in layers
        for title in (f"Layer {layer}: normalised MSE", f"Layer {layer}: cross-entropy increase, nats")
    ]
    figure = make_subplots(
        rows=len(layers),
        cols=2,
        subplot_titles=titles,
        vertical_spacing=0.36 / (len(layers) + 1),
        horizontal_spacing=0.09,
    )
    named: set[str] = set()
    for row, layer in enumerate(layers, start=1):
        for colour, (architecture, label) in zip(
            (*COLOURS, GREY), frontier.settings["labels"].items(), strict=False
        ):
            for kind, (dash, *quantities) in DASHES.items():
                for column, quantity in enumerate(quantities, start=1):
                    trace = line(frontier, text, layer, architecture, quantity)
                    if not trace.x:
                        continue
                    trace.update(
                        line={"color": colour, "dash": dash, "width": 2.5 if dash == "solid" else 1.2},
                        opacity=1 if dash == "solid" else 0.6,
                        mode="lines+markers" if dash == "solid" else "lines",
                        name=label,
                        legendgroup=architecture,
                        showlegend=architecture not in named,
                        hovertemplate=f"{label}, {kind}<br>K %{{x}}: %{{y:.4f}}<extra></extra>",
                    )
                    named.add(architecture)
                    figure.add_trace(trace, row=row, col=column)
        zero = [
            point.reports[text].ce_loss_zero_ablated - point.reports[text].ce_loss
            for point in measured
            if point.layer == layer
        ]
        for column, level in ((1, 1.0), (2, mean(zero))):
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
    xs, ys, up, down = [], [], [], []
    for k in sorted({point.k for point in frontier.points}):
        values = [quantity(report) for report in frontier.select(text, layer, architecture, k)]
        if values:
            xs.append(k)
            ys.append(mean(values))
            up.append(max(values) - mean(values))
            down.append(mean(values) - min(values))
    spread = {"type": "data", "array": up, "arrayminus": down} if any(up) else None
    return go.Scatter(x=xs, y=ys, error_y=spread)


def rows_of(frontier: Frontier, text: str) -> str:
    """A table row for each layer and K: normalised MSE and feature share of every architecture."""
    labels = frontier.settings["labels"]
    head = "".join(f"<th>{escape(label)}</th>" for label in labels.values())
    rows = [f"<tr><th>Layer</th><th>K</th>{head}</tr>"]
    for layer, k in sorted({(point.layer, point.k) for point in frontier.points}):
        cells = []
        for architecture in labels:
            reports = frontier.select(text, layer, architecture, k)
            cells.append(
                f"{mean(r.normalized_mse for r in reports):.3f} "
                f"<small>(share {mean(r.feature_share for r in reports):.2f}, "
                f"+{mean(r.ce_loss_replaced - r.ce_loss for r in reports):.4f} nats, "
                f"dead {mean(r.silent_fraction for r in reports):.0%})</small>"
                if reports
                else "&ndash;"
            )
        rows.append(f"<tr><td>{layer}</td><td>{k}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "\n".join(rows)

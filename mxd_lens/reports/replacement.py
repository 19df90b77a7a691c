"""The page about replaced models: cross-entropy and KL against the number of MLPs replaced."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import (
    GREY,
    Section,
    colours_of,
    facts,
    style,
    with_legend,
    write_page,
    write_png,
)
from mxd_lens.artifacts.tables import Cell, Table
from mxd_lens.evals.replacement import Order, ReplacementReport

QUANTITIES = {"cross-entropy added, nats": "ce_loss", "KL to the unmodified model, nats": "kl_divergence"}


def write_replacement_page(path: str | Path, reports: Mapping[str, ReplacementReport]) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        reports: of one model and one text, by a name for the set of layers.

    Raises:
        ValueError: there is no report.
    """
    first = _first(reports)
    rows: list[list[Cell]] = []
    for name, report in reports.items():
        point = report.all_replaced
        added = point.ce_loss - report.ce_loss
        rows.append([name, point.n_replaced, point.ce_loss, added, point.kl_divergence, point.top1_agreement])
    columns = ["layers", "blocks", "cross-entropy", "added", "KL", "same top token"]
    return write_page(
        path,
        f"{first.model_name} with its MLPs replaced",
        f"{len(first.blocks)} blocks have layers. Unmodified, the model has {first.ce_loss:.3f} nats per "
        f"token on {first.n_tokens:,} tokens in {first.n_sequences:,} sequences.",
        [
            Section(
                "Errors as blocks are replaced one by one",
                "Solid: by their layers; dotted: by each MLP's mean output. Lower is better.",
                (replacement_figure(reports),),
            ),
            Section("All blocks replaced", "", (Table(columns, rows),)),
            *(Section(name, "", tuple(report.tables)) for name, report in reports.items()),
            Section("Settings", "", (facts({"blocks": first.blocks, "model": first.model_name}),)),
        ],
    )


def write_replacement_png(path: str | Path, reports: Mapping[str, ReplacementReport]) -> Path:
    """Write `replacement_figure` as a picture."""
    return write_png(path, replacement_figure(reports), width=1000)


def replacement_figure(reports: Mapping[str, ReplacementReport]) -> go.Figure:
    """Added cross-entropy and KL against the number of blocks replaced."""
    first = _first(reports)
    orders: list[Order] = [order for order in get_args(Order) if first.curve(order, "layers")]
    titles = [f"{quantity}: {order} blocks first" for order in orders for quantity in QUANTITIES]
    figure = make_subplots(
        rows=len(orders), cols=2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.16
    )
    colours = colours_of({name: "+".join(report.architectures) for name, report in reports.items()})
    for row, order in enumerate(orders, start=1):
        for column, field in enumerate(QUANTITIES.values(), start=1):
            less = first.ce_loss if field == "ce_loss" else 0.0
            curves = [
                (name, name, report.curve(order, "layers"), colours[name], "solid")
                for name, report in reports.items()
            ]
            curves.append(("mean output", "mean output", first.curve(order, "mean"), GREY, "dot"))
            for name, group, points, colour, dash in curves:
                if not points:
                    continue
                figure.add_scatter(
                    x=[point.n_replaced for point in points],
                    y=[getattr(point, field) - less for point in points],
                    mode="lines+markers",
                    marker={"size": 4},
                    line={"color": colour, "dash": dash, "width": 2},
                    name=name,
                    legendgroup=group,
                    showlegend=(row, column) == (1, 1),
                    hovertemplate="%{fullData.name}, %{x} blocks: %{y:.4f}<extra></extra>",
                    row=row,
                    col=column,
                )
    style(figure, 120 + 320 * len(orders))
    figure.update_xaxes(title_text="blocks replaced")
    figure.update_yaxes(type="log")
    return with_legend(figure)


def _first(reports: Mapping[str, ReplacementReport]) -> ReplacementReport:
    if not reports:
        raise ValueError("There is no report to show.")
    return next(iter(reports.values()))

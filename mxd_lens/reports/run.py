"""The page about one trained layer: its training curve, its faithfulness, and continuations with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import ACCENT, GREY, Section, Texts, facts, field_docs, style, write_page
from mxd_lens.artifacts.tables import Cell, Table
from mxd_lens.evals.faithfulness import FaithfulnessReport
from mxd_lens.training.runner import HISTORY_FILENAME

History = Sequence[Mapping[str, float]]

ABLATIONS = {
    "layer": ("normalized_mse", "ce_loss_replaced"),
    "experts mean-ablated": ("normalized_mse_mean_gate", "ce_loss_mean_gate"),
    "experts resampled": ("normalized_mse_shuffled_gate", "ce_loss_shuffled_gate"),
    "MLP zero-ablated": ("", "ce_loss_zero_ablated"),
}
"""What is put in the MLP's place, by the report's fields of its error and of its cross-entropy."""


def write_run_page(
    path: str | Path,
    title: str,
    history: History,
    report: FaithfulnessReport,
    continuations: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        title: its heading.
        history: the training curve, as TranscoderTrainer.history; may be empty.
        report: what `evaluate` measured.
        continuations: texts by what made them, shown side by side.
        notes: further facts about the run, by name.
    """
    sections = [
        Section(
            "Faithfulness",
            f"The experts explain {report.feature_share:.0%} of the error that is left when they are "
            f"mean-ablated, and the layer adds {report.ce_loss_replaced - report.ce_loss:.3f} nats to the "
            "cross-entropy.",
            (report_figure(report),),
        )
    ]
    if history:
        claim = f"The normalised MSE in training ended at {history[-1]['normalized_mse']:.3f}."
        sections.append(Section("Training", claim, (training_figure(history),)))
    if continuations:
        claim = "The same prompt, continued by the unmodified model and with the layer in place of its MLP."
        sections.append(Section("Continuations", claim, (Texts(continuations),)))
    sections.append(Section("All numbers", "", (numbers(report),)))
    if report.largest_tokens:
        claim = "The tokens with the largest outputs of the MLP, which can decide the variance explained."
        sections.append(Section("Massive activations", claim, (largest_tokens(report),)))
    if notes:
        sections.append(Section("The run", "", (facts(notes),)))
    return write_page(
        path,
        title,
        f"{report.model_name}, {report.hook_name} \u2192 {report.hook_name_out}; {report.n_experts:,} "
        f"experts, {report.n_parameters:,} parameters; measured on {report.n_tokens:,} tokens.",
        sections,
    )


def training_figure(history: History) -> go.Figure:
    """Normalised MSE and dead experts against training tokens."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Normalised MSE", "Dead experts"))
    tokens = [entry["tokens"] for entry in history]
    for column, (name, colour) in enumerate((("normalized_mse", ACCENT), ("dead", GREY)), start=1):
        values = [entry[name] for entry in history]
        figure.add_scatter(x=tokens, y=values, mode="lines", line_color=colour, name=name, row=1, col=column)
        figure.update_xaxes(title_text="tokens", row=1, col=column)
        figure.update_yaxes(rangemode="tozero", row=1, col=column)
    # A single dead expert should not fill the panel.
    figure.update_yaxes(range=[0, max(20.0, *(1.05 * entry["dead"] for entry in history))], row=1, col=2)
    return style(figure, 330)


def report_figure(report: FaithfulnessReport) -> go.Figure:
    """Normalised MSE and added cross-entropy of the layer, beside its ablations."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("Normalised MSE", "Cross-entropy added, nats"),
        horizontal_spacing=0.12,
    )
    errors = [getattr(report, name) if name else 1.0 for name, _ in ABLATIONS.values()]
    losses = [getattr(report, name) - report.ce_loss for _, name in ABLATIONS.values()]
    for column, values in enumerate((errors, losses), start=1):
        figure.add_bar(
            y=list(ABLATIONS),
            x=values,
            orientation="h",
            marker={"color": [ACCENT, ACCENT, ACCENT, GREY], "opacity": [1, 0.6, 0.4, 1]},
            text=[f"{value:.3f}" for value in values],
            textposition="outside",
            cliponaxis=False,
            row=1,
            col=column,
        )
    figure.update_yaxes(autorange="reversed", showticklabels=False, col=2)
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=6, col=1)
    return style(figure, 260).update_layout(margin_l=170, margin_r=50)


def numbers(report: FaithfulnessReport) -> Table:
    """Every number of a report, with what it is."""
    rows: list[list[Cell]] = []
    for name, meaning in field_docs(FaithfulnessReport).items():
        value = getattr(report, name)
        if isinstance(value, int | float):
            rows.append([name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}", meaning])
    return Table(["name", "value", "meaning"], rows)


def largest_tokens(report: FaithfulnessReport) -> Table:
    """The tokens with the largest outputs."""
    rows: list[list[Any]] = [
        [repr(t["token"]), t["norm"], t["normalized_mse"], f"{t['share_of_squared_norm']:.1%}"]
        for t in report.largest_tokens
    ]
    return Table(["token", "norm of y", "normalised MSE", "share of the sum of ||y||²"], rows)


def read_history(folder: str | Path) -> list[dict[str, float]]:
    """The training curve in a layer's folder; empty where there is none."""
    file = Path(folder) / HISTORY_FILENAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

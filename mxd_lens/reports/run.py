"""One self-contained HTML page about a trained layer: its training curve and its faithfulness."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import BLUE, GREY, ORANGE, RED, facts_table, field_docs, style, write_page
from mxd_lens.evals.faithfulness import FaithfulnessReport
from mxd_lens.training.runner import HISTORY_FILENAME

HISTORY = Sequence[dict[str, float]]


def write_run_page(
    path: str | Path,
    title: str,
    history: HISTORY,
    report: FaithfulnessReport,
    continuations: dict[str, str] | None = None,
    notes: dict[str, str] | None = None,
) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        title: its heading.
        history: the training curve, as TranscoderTrainer.history.
        report: what `evaluate` measured.
        continuations: texts by what made them, shown side by side.
        notes: further facts about the run, by name.
    """
    figures = [training_figure(history), report_figure(report)] if history else [report_figure(report)]
    texts = "\n".join(
        f'<div class="continuation"><b>{escape(name)}</b>{escape(text)}</div>'
        for name, text in (continuations or {}).items()
    )
    return write_page(
        path,
        title,
        f"{report.model_name}, {report.hook_name} \u2192 {report.hook_name_out}; {report.n_experts:,} "
        f"experts, {report.n_parameters:,} parameters; judged on {report.n_tokens:,} held-out tokens.",
        [
            *figures,
            f"<h2>The model goes on</h2>{texts}" if texts else "",
            f'<h2>Every number</h2><div class="wide"><table>{report_rows(report)}</table></div>',
            f"<h2>The run</h2>{facts_table(notes)}" if notes else "",
        ],
    )


def training_figure(history: HISTORY) -> go.Figure:
    """Normalised MSE and dead experts against training tokens."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Training: normalised MSE", "Dead experts"))
    tokens = [entry["tokens"] for entry in history]
    for column, name, colour in ((1, "normalized_mse", BLUE), (2, "dead", ORANGE)):
        values = [entry[name] for entry in history]
        figure.add_scatter(x=tokens, y=values, mode="lines", line_color=colour, name=name, row=1, col=column)
        figure.update_xaxes(title_text="tokens", row=1, col=column)
        figure.update_yaxes(rangemode="tozero", row=1, col=column)
    # A single dead expert should not fill the panel.
    figure.update_yaxes(range=[0, max(20.0, *(1.05 * entry["dead"] for entry in history))], row=1, col=2)
    return style(figure, 330)


def report_figure(report: FaithfulnessReport) -> go.Figure:
    """Normalised MSE and cross-entropy of the layer, beside what they mean nothing without."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("Held-out normalised MSE", "Cross-entropy above the unmodified model (nats)"),
    )
    base = report.ce_loss
    for column, bars in (
        (
            1,
            {
                "the layer": (report.normalized_mse, BLUE),
                "mean gate": (report.normalized_mse_mean_gate, ORANGE),
                "shuffled gate": (report.normalized_mse_shuffled_gate, RED),
                "zero ablated": (1.0, GREY),
            },
        ),
        (
            2,
            {
                "the layer": (report.ce_loss_replaced - base, BLUE),
                "mean gate": (report.ce_loss_mean_gate - base, ORANGE),
                "shuffled gate": (report.ce_loss_shuffled_gate - base, RED),
                "zero ablated": (report.ce_loss_zero_ablated - base, GREY),
            },
        ),
    ):
        values, colours = zip(*bars.values(), strict=True)
        figure.add_bar(
            x=list(bars),
            y=values,
            marker_color=colours,
            text=[f"{value:.3f}" for value in values],
            textposition="outside",
            cliponaxis=False,
            row=1,
            col=column,
        )
    return style(figure, 360)


def report_rows(report: FaithfulnessReport) -> str:
    """A table row per number, with what it is."""
    rows = []
    for name, meaning in field_docs(FaithfulnessReport).items():
        value = getattr(report, name)
        if isinstance(value, (int, float)):
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            rows.append(
                f'<tr><td>{escape(name)}</td><td class="number">{shown}</td>'
                f'<td class="soft">{escape(meaning)}</td></tr>'
            )
    for token in report.largest_tokens:
        rows.append(
            f"<tr><td>large activation on {escape(repr(token['token']))}</td>"
            f'<td class="number">{token["norm"]:.0f}</td><td class="soft">||y||; normalised MSE '
            f"{token['normalized_mse']:.3f}; {token['share_of_squared_norm']:.1%} of the sum of "
            "||y||^2</td></tr>"
        )
    return "\n".join(rows)


def read_history(folder: str | Path) -> list[dict[str, float]]:
    """The training curve in a layer's folder; empty where there is none."""
    file = Path(folder) / HISTORY_FILENAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

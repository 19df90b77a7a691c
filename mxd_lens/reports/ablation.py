"""The page that says how much of a layer its experts explain, for one layer or several side by side."""

from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import (
    Section,
    colours_of,
    facts,
    style,
    with_legend,
    write_page,
    write_png,
)
from mxd_lens.artifacts.tables import Cell, Table, percent
from mxd_lens.evals.ablation import AblationReport
from mxd_lens.evals.token_dependence import BINS

Reports = Mapping[str, AblationReport]

NONE_AT = 0.5
"""Where 0 experts stand on a logarithmic axis."""

PANELS = ("Normalised MSE", "Cross-entropy added, nats")

KINDS = ("layer", "best constant", "mean-ablated", "resampled", "MLP zero-ablated")
"""What is in place of the MLP: the layer, the layer with its experts replaced, or zero."""


def write_ablation_page(path: str | Path, reports: Reports, notes: Mapping[str, str] | None = None) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        reports: the reports by the layers' names; one or several.
        notes: further facts, by name.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("There is no report to write a page of.")
    first = next(iter(reports.values()))
    sections = [
        *(Section(name, verdict(report)) for name, report in reports.items()),
        Section(
            "Without the experts",
            "The experts are worth what the layer gains on the best constant in their place.",
            (replacements_figure(reports), errors(reports), losses(reports)),
        ),
        Section(
            "With some of the experts",
            "Solid: only the experts that write most at each token (sufficiency); dashed: all but these "
            "(necessity). A solid line that falls early means that few experts suffice.",
            (ablation_figure(reports),),
        ),
        Section(
            "What decides which experts fire",
            "The share of the information in firing that the token, the token before it, both, or the "
            "position determines (0: chance, 1: all). An expert near 1 on the right is a token lookup.",
            (information_figure(reports), dependences(reports)),
        ),
        *(section for name, report in reports.items() for section in examples(name, report)),
    ]
    if any(report.stability for report in reports.values()):
        sections.append(
            Section(
                "Experts of another seed",
                "Experts of layers trained from several seeds, matched one to one; found again are those "
                "whose partner has a similarity of at least 0.7.",
                (stability(reports),),
            )
        )
    if notes:
        sections.append(Section("The run", "", (facts(notes),)))
    return write_page(
        path,
        f"What the experts explain: {', '.join(reports)}",
        f"{first.faithfulness.model_name}, {first.faithfulness.hook_name_out}; errors measured on "
        f"{first.faithfulness.n_tokens:,} tokens, firing on {first.information.n_tokens:,}.",
        sections,
    )


def write_ablation_pictures(path: str | Path, reports: Reports) -> list[Path]:
    """Write the page's three figures as pictures, `path` with -gates, -ablations and -tokens in its name.

    Raises:
        ImportError: kaleido is not installed.
    """
    path = Path(path)
    figures = {
        "gates": replacements_figure(reports),
        "ablations": ablation_figure(reports),
        "tokens": information_figure(reports),
    }
    return [write_png(path.with_name(f"{path.stem}-{name}.png"), fig) for name, fig in figures.items()]


def verdict(report: AblationReport) -> str:
    """What a report says, in three sentences."""
    r, token = report.faithfulness, report.information.of("token")
    half = report.half_explained_by
    strongest = "expert" if half == 1 else f"{half} experts"
    alone = (
        "Together they do no better than none."
        if half is None
        else f"The strongest {strongest} of each token, kept alone, explain at least half of what all "
        f"{r.l0:.3g} explain."
    )
    return (
        f"The experts explain {percent(report.explained_by_experts)} of the error that the best constant "
        f"in their place leaves ({report.normalized_mse_best_constant_gate:.3f}). {alone} The token "
        f"determines {percent(token.firing)} of which experts fire, and {percent(token.lookups)} of the "
        "experts are token lookups."
    )


def colours(reports: Reports) -> dict[str, str]:
    return colours_of({name: report.architecture for name, report in reports.items()})


def replacements(report: AblationReport) -> dict[str, tuple[float, float]]:
    """Normalised MSE and added cross-entropy with each thing in the MLP's place."""
    r = report.faithfulness
    found = (
        (r.normalized_mse, r.ce_loss_replaced),
        (report.normalized_mse_best_constant_gate, report.ce_loss_best_constant_gate),
        (r.normalized_mse_mean_gate, r.ce_loss_mean_gate),
        (r.normalized_mse_shuffled_gate, r.ce_loss_shuffled_gate),
        (1.0, r.ce_loss_zero_ablated),
    )
    return {kind: (error, loss - r.ce_loss) for kind, (error, loss) in zip(KINDS, found, strict=True)}


def replacements_figure(reports: Reports) -> go.Figure:
    """Normalised MSE and added cross-entropy of the layers, and with their experts replaced."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=PANELS, horizontal_spacing=0.09)
    for name, report in reports.items():
        for column, values in enumerate(zip(*replacements(report).values(), strict=True), start=1):
            figure.add_bar(
                x=list(KINDS),
                y=values,
                name=name,
                legendgroup=name,
                marker_color=colours(reports)[name],
                showlegend=column == 1,
                hovertemplate="%{fullData.name}, %{x}: %{y:.4f}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(tickangle=-20, tickfont_size=11)
    return with_legend(style(figure, 460)).update_layout(barmode="group")


def errors(reports: Reports) -> Table:
    """Normalised MSE, and the share that the experts explain."""
    rows: list[list[Cell]] = []
    for name, report in reports.items():
        _, *others = replacements(report).values()
        numbers = (report.faithfulness.normalized_mse, *(error for error, _ in others[:3]))
        rows.append([name, *(f"{error:.3f}" for error in numbers), percent(report.explained_by_experts)])
    columns = [
        "layer",
        "normalised MSE",
        "best constant",
        "mean-ablated",
        "resampled",
        "explained by experts",
    ]
    return Table(columns, rows, "Error with the experts replaced")


def losses(reports: Reports) -> Table:
    """Added cross-entropy, and the size of each layer."""
    rows: list[list[Cell]] = []
    for name, report in reports.items():
        r, found = report.faithfulness, replacements(report)
        added = [found[k][1] for k in ("layer", "best constant", "MLP zero-ablated")]
        k = None if report.k is None else str(report.k)
        size = f"{r.n_experts:,} experts, {r.n_parameters:,} parameters"
        rows.append([name, size, k, *(f"{loss:+.3f}" for loss in added)])
    columns = ["layer", "size", "K", "layer, nats", "best constant, nats", "MLP zero-ablated, nats"]
    return Table(columns, rows, "Cross-entropy added")


def ablation_figure(reports: Reports) -> go.Figure:
    """Errors and cross-entropies against how many experts are kept (solid) or removed (dashed)."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=PANELS, horizontal_spacing=0.09)
    ticks = sorted({a.n for report in reports.values() for a in report.ablations})
    for name, report in reports.items():
        base = report.faithfulness.ce_loss
        for kind, dash in (("kept", "solid"), ("removed", "dash")):
            curves = (
                [getattr(a, f"normalized_mse_{kind}") for a in report.ablations],
                [getattr(a, f"ce_loss_{kind}") - base for a in report.ablations],
            )
            for column, values in enumerate(curves, start=1):
                figure.add_scatter(
                    x=[a.n or NONE_AT for a in report.ablations],
                    y=values,
                    customdata=[a.n for a in report.ablations],
                    mode="lines+markers",
                    line={"color": colours(reports)[name], "dash": dash, "width": 2},
                    marker_size=6 if dash == "solid" else 4,
                    name=name,
                    legendgroup=name,
                    showlegend=(kind, column) == ("kept", 1),
                    hovertemplate=f"%{{fullData.name}}, %{{customdata}} {kind}: %{{y:.4f}}<extra></extra>",
                    row=1,
                    col=column,
                )
    style(figure, 460)
    figure.update_xaxes(
        type="log",
        tickvals=[n or NONE_AT for n in ticks],
        ticktext=[str(n) for n in ticks],
        title_text="experts kept (solid) or removed (dashed)",
    )
    figure.update_yaxes(rangemode="tozero", col=1)
    return with_legend(figure)


def information_figure(reports: Reports) -> go.Figure:
    """How far each variable determines the firing, and how far the token determines each expert."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("Share of firing determined by", "Share of experts, by how far the token decides"),
        horizontal_spacing=0.09,
    )
    for name, report in reports.items():
        colour, information = colours(reports)[name], report.information
        figure.add_bar(
            x=[d.variable for d in information.dependences],
            y=[d.firing for d in information.dependences],
            marker_color=colour,
            name=name,
            legendgroup=name,
            hovertemplate="%{fullData.name}, %{x}: %{y:.3f}<extra></extra>",
            row=1,
            col=1,
        )
        counts = information.of("token").histogram
        total = sum(counts) or 1
        figure.add_scatter(
            x=[(bin + 0.5) / BINS for bin in range(BINS)],
            y=[count / total for count in counts],
            mode="lines",
            line={"color": colour, "width": 2.2, "shape": "hvh"},
            name=name,
            legendgroup=name,
            showlegend=False,
            hovertemplate="%{fullData.name}, %{x:.2f}: %{y:.1%} of the experts<extra></extra>",
            row=1,
            col=2,
        )
    style(figure, 440)
    figure.update_yaxes(tickformat=".0%", row=1, col=2)
    figure.update_xaxes(range=[0, 1], row=1, col=2)
    return with_legend(figure).update_layout(barmode="group")


def dependences(reports: Reports) -> Table:
    """How far each variable determines firing, beside chance."""
    rows = [
        [name, d.variable, *map(percent, (d.firing, d.firing_shuffled, d.firing_median, d.lookups))]
        for name, report in reports.items()
        for d in report.information.dependences
    ]
    return Table(["layer", "determined by", "firing", "by chance", "median expert", "lookups"], rows)


def examples(name: str, report: AblationReport) -> list[Section]:
    """The experts that the token determines most and least."""
    information = report.information
    if not information.lookups:
        return [Section(f"{name}: experts", "No expert fires often enough to be measured.")]

    def table(found: list, title: str) -> Table:
        rows = [
            [
                e.expert,
                percent(e.share),
                f"{', '.join(f'{text!r} {percent(share)}' for text, share in e.tokens)} of {e.fired:,}",
            ]
            for e in found
        ]
        return Table(["expert", "determined by the token", "fires on"], rows, title)

    claim = (
        f"{information.n_judged:,} experts fire often enough to be measured, and "
        f"{information.n_always_on:,} fire always."
    )
    tables = (
        table(information.lookups, "Determined most by the token"),
        table(information.contextual, "Determined least"),
    )
    return [Section(f"{name}: experts", claim, tables)]


def stability(reports: Reports) -> Table:
    """How alike the experts of other seeds are."""
    rows = [
        [
            f"{name}, {s.n_layers} seeds",
            s.by,
            f"{s.matched:.3f} (chance {s.matched_shuffled:.3f})",
            f"{s.nearest:.3f}",
            percent(s.found_again),
            percent(s.agreement),
        ]
        for name, report in reports.items()
        for s in report.stability
    ]
    columns = ["layer", "matched by", "similarity", "nearest", "found again", "same partner by both"]
    return Table(columns, rows)

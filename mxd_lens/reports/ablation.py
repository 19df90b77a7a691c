"""The page that says what the decomposition of a layer, or of several side by side, is worth."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    RED,
    facts_table,
    style,
    write_page,
    write_png,
)
from mxd_lens.artifacts.tables import percent, printable
from mxd_lens.evals.ablation import AblationReport
from mxd_lens.evals.token_dependence import BINS, ExampleExpert

Reports = Mapping[str, AblationReport]

NONE_AT = 0.5
"""Where no expert stands on an axis that counts them in powers of two."""


def write_carry_page(path: str | Path, reports: Reports, notes: Mapping[str, str] | None = None) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        reports: what `ablation_study` measured, by the layers' names; one or several.
        notes: further facts, by name.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("There is no report to make a page of.")
    first = next(iter(reports.values())).faithfulness
    return write_page(
        path,
        f"What the experts carry: {', '.join(reports)}",
        f"{first.model_name}, {first.hook_name_out}; judged on {first.n_tokens:,} held-out tokens, firing "
        f"read from {next(iter(reports.values())).information.n_tokens:,}.",
        [
            "".join(f"<p>{verdict(name, report)}</p>" for name, report in reports.items()),
            "<h2>Without the experts</h2><p>The layer in the MLP's place, beside the same layer with its "
            "experts' part exchanged: for the best constant, for its mean, for another token's. Experts are "
            "worth what the layer gains on the best constant.</p>",
            gates_figure(reports),
            f'<div class="wide"><table>{gate_rows(reports)}</table></div>',
            "<h2>With some of the experts</h2><p>At every token, only the experts that write most there "
            "(solid), or all but these (dashed). A few that do nearly everything are a short explanation; "
            "dashed lines that rise late say that the rest can do without them.</p>",
            ablation_figure(reports),
            "<h2>What decides which experts fire</h2><p>The share of the information in firing that the "
            "token itself, the token before it, both, or the position determines; 0 is chance, 1 is all. "
            "What the token leaves open, only the context can decide. An expert near 1 on the right is a "
            "token lookup.</p>",
            information_figure(reports),
            f'<div class="wide"><table>{information_rows(reports)}</table></div>',
            *(examples(name, report) for name, report in reports.items()),
            stability_section(reports),
            f"<h2>The run</h2>{facts_table(notes)}" if notes else "",
        ],
    )


def write_carry_png(path: str | Path, reports: Reports) -> list[Path]:
    """Writes the page's three figures as pictures, `path` with -gates, -ablations and -tokens in its name.

    Raises:
        ImportError: kaleido is not installed.
    """
    path = Path(path)
    figures = {
        "gates": gates_figure(reports),
        "ablations": ablation_figure(reports),
        "tokens": information_figure(reports),
    }
    return [write_png(path.with_name(f"{path.stem}-{name}.png"), fig) for name, fig in figures.items()]


def verdict(name: str, report: AblationReport) -> str:
    """What a report says, in two sentences of HTML."""
    r, token = report.faithfulness, report.information.of("token")
    half = report.half_explained_by
    alone = (
        "All of them together do no better than none."
        if half is None
        else f"Kept alone, the {half} strongest of a token do at least half of what all {r.l0:.3g} do."
        if half > 1
        else f"Kept alone, the strongest of a token does at least half of what all {r.l0:.3g} do."
    )
    return (
        f"<b>{escape(name)}</b>: of the error that the best constant gate leaves "
        f"({report.normalized_mse_best_constant_gate:.3f}), the experts explain "
        f"{percent(report.explained_by_experts)}. {alone} The token itself determines "
        f"{percent(token.firing)} of which experts fire; "
        f"{percent(token.lookups)} of the experts judged are token lookups."
    )


# Gates


def gates_figure(reports: Reports) -> go.Figure:
    """Normalised MSE and cross-entropy of the layers and of their drained gates."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("Normalised MSE", "Cross-entropy above the unmodified model, nats"),
        horizontal_spacing=0.09,
    )
    names = list(reports)
    kinds = {
        "the layer": (BLUE, "normalized_mse", "ce_loss_replaced"),
        "best constant gate": (ORANGE, "", ""),
        "mean gate": ("#b08d3c", "normalized_mse_mean_gate", "ce_loss_mean_gate"),
        "shuffled gate": (RED, "normalized_mse_shuffled_gate", "ce_loss_shuffled_gate"),
        "zero ablated": (GREY, "", "ce_loss_zero_ablated"),
    }
    for kind, (colour, error, loss) in kinds.items():
        errors, losses = [], []
        for report in reports.values():
            r = report.faithfulness
            if kind == "best constant gate":
                errors.append(report.normalized_mse_best_constant_gate)
                losses.append(report.ce_loss_best_constant_gate - r.ce_loss)
            else:
                errors.append(getattr(r, error) if error else 1.0)
                losses.append(getattr(r, loss) - r.ce_loss)
        for column, values in enumerate((errors, losses), start=1):
            figure.add_bar(
                x=names,
                y=values,
                name=kind,
                legendgroup=kind,
                marker_color=colour,
                showlegend=column == 1,
                hovertemplate=f"%{{x}}, {kind}: %{{y:.4f}}<extra></extra>",
                row=1,
                col=column,
            )
    return with_legend(style(figure, 420))


def gate_rows(reports: Reports) -> str:
    """A table row a layer: errors and what they add to the cross-entropy."""
    head = (
        "layer",
        "K",
        "experts",
        "parameters",
        "normalised MSE",
        "best constant",
        "mean gate",
        "shuffled",
        "carried",
        "+ nats",
        "best constant",
        "zero ablated",
    )
    rows = [row(head, "th")]
    for name, report in reports.items():
        r = report.faithfulness
        rows.append(
            row(
                (
                    name,
                    "–" if report.k is None else str(report.k),
                    f"{r.n_experts:,}",
                    f"{r.n_parameters:,}",
                    f"{r.normalized_mse:.3f}",
                    f"{report.normalized_mse_best_constant_gate:.3f}",
                    f"{r.normalized_mse_mean_gate:.3f}",
                    f"{r.normalized_mse_shuffled_gate:.3f}",
                    percent(report.explained_by_experts),
                    f"{r.ce_loss_replaced - r.ce_loss:+.3f}",
                    f"{report.ce_loss_best_constant_gate - r.ce_loss:+.3f}",
                    f"{r.ce_loss_zero_ablated - r.ce_loss:+.3f}",
                )
            )
        )
    return "".join(rows)


# Ablations


def ablation_figure(reports: Reports) -> go.Figure:
    """Errors and cross-entropies against how many experts are kept (solid) or removed (dashed)."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("Normalised MSE", "Cross-entropy above the unmodified model, nats"),
        horizontal_spacing=0.09,
    )
    ticks = sorted({a.n for report in reports.values() for a in report.ablations})
    for i, (name, report) in enumerate(reports.items()):
        colour, base = COLOURS[i % len(COLOURS)], report.faithfulness.ce_loss
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
                    line={"color": colour, "dash": dash, "width": 2.2 if dash == "solid" else 1.4},
                    marker_size=6 if dash == "solid" else 4,
                    name=name,
                    legendgroup=name,
                    showlegend=(kind, column) == ("kept", 1),
                    hovertemplate=f"{escape(name)}, %{{customdata}} {kind}: %{{y:.4f}}<extra></extra>",
                    row=1,
                    col=column,
                )
    style(figure, 440)
    figure.update_xaxes(
        type="log",
        tickvals=[n or NONE_AT for n in ticks],
        ticktext=[str(n) for n in ticks],
        title_text="experts kept (solid) or removed (dashed)",
    )
    figure.update_yaxes(rangemode="tozero", col=1)
    return with_legend(figure)


# Tokens


def information_figure(reports: Reports) -> go.Figure:
    """How far each variable determines the firing, and how far the token determines each expert."""
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=(
            "Which experts fire is determined by (share)",
            "Share of the experts, by how far the token determines them",
        ),
        horizontal_spacing=0.09,
    )
    for i, (name, report) in enumerate(reports.items()):
        colour, information = COLOURS[i % len(COLOURS)], report.information
        figure.add_bar(
            x=[d.variable for d in information.dependences],
            y=[d.firing for d in information.dependences],
            marker_color=colour,
            name=name,
            legendgroup=name,
            hovertemplate=f"{escape(name)}, %{{x}}: %{{y:.3f}}<extra></extra>",
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
            hovertemplate=f"{escape(name)}, %{{x:.2f}}: %{{y:.1%}} of the experts<extra></extra>",
            row=1,
            col=2,
        )
    style(figure, 420)
    figure.update_yaxes(tickformat=".0%", row=1, col=2)
    figure.update_xaxes(range=[0, 1], row=1, col=2)
    return with_legend(figure)


def information_rows(reports: Reports) -> str:
    """A table row a layer and variable."""
    head = (
        "layer",
        "determined by",
        "firing",
        "shuffled (chance)",
        "median expert",
        "lookups",
        "strongest expert",
        "bits a token",
    )
    rows = [row(head, "th")]
    for name, report in reports.items():
        entropy = report.information.strongest_entropy
        for d in report.information.dependences:
            cells = [percent(v) for v in (d.firing, d.firing_shuffled, d.firing_median, d.lookups)]
            bits = f"{d.strongest_bits:.2f} of {entropy:.2f}"
            rows.append(row((name, d.variable, *cells, percent(d.strongest), bits)))
    return "".join(rows)


def examples(name: str, report: AblationReport) -> str:
    """The experts that the token determines most and least."""
    information = report.information
    if not information.lookups:
        return f"<h2>{escape(name)}: experts</h2><p>No expert fires often enough to be judged.</p>"
    rows = [
        '<tr><th colspan="3">determined most by the token</th><th colspan="3">least</th></tr>'
        + row(("expert", "by the token", "fires on", "expert", "by the token", "fires on"), "th")
    ]
    for pair in zip(information.lookups, information.contextual, strict=True):
        rows.append(f"<tr>{''.join(example_cells(e) for e in pair)}</tr>")
    judged = f"{information.n_judged:,} experts judged, {information.n_always_on:,} always on"
    return f'<h2>{escape(name)}: {judged}</h2><div class="wide"><table>{"".join(rows)}</table></div>'


def example_cells(example: ExampleExpert) -> str:
    tokens = ", ".join(f"{printable(repr(text))} {percent(share)}" for text, share in example.tokens)
    return (
        f'<td class="number">{example.expert}</td><td class="number">{percent(example.share)}</td>'
        f'<td class="soft">{escape(tokens)} of {example.fired:,}</td>'
    )


# Seeds


def stability_section(reports: Reports) -> str:
    """A table row a layer and way of matching; nothing where no seeds were compared."""
    compared = {name: report.stability for name, report in reports.items() if report.stability}
    if not compared:
        return ""
    head = (
        "layer",
        "seeds",
        "matched by",
        "similarity",
        "shuffled (chance)",
        "nearest",
        "found again",
        "same partner by both",
    )
    rows = [row(head, "th")]
    for name, stabilities in compared.items():
        for s in stabilities:
            numbers = [f"{v:.3f}" for v in (s.matched, s.matched_shuffled, s.nearest)]
            cells = (*numbers, percent(s.found_again), percent(s.agreement))
            rows.append(row((name, str(s.n_layers), s.by, *cells)))
    return (
        "<h2>The same experts from another seed?</h2><p>Experts of layers trained alike from several seeds, "
        "matched one to one: by the cosine of what they write on average, and by the correlation of their "
        "firing. Found again are those whose partner is as similar as 0.7.</p>"
        f'<div class="wide"><table>{"".join(rows)}</table></div>'
    )


# What the parts share


def row(cells: tuple[str, ...], tag: str = "td") -> str:
    """A table row; all cells but those that are names are numbers."""

    def cell(text: str) -> str:
        is_number = tag == "td" and any(c.isdigit() for c in text) and text[0] in "0123456789+-–"
        return f"<{tag}{' class=number' if is_number else ''}>{escape(text)}</{tag}>"

    return f"<tr>{''.join(cell(text) if text else f'<{tag}></{tag}>' for text in cells)}</tr>"


def with_legend(figure: go.Figure) -> go.Figure:
    """With a legend under the panels."""
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": -0.22, "x": 0}, margin_b=90, barmode="group"
    )
    return figure

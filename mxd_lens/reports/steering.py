"""The page of steering scores: concept coherence against fluency, and the best and worst texts."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import plotly.graph_objects as go

from mxd_lens.artifacts.page import (
    Section,
    Texts,
    colours_of,
    facts,
    picture,
    style,
    write_page,
    write_png,
)
from mxd_lens.artifacts.tables import Cell, Table
from mxd_lens.evals.steering_scores import SteeringScore, SteeringScores

N_SHOWN = 5
"""Experts of each layer whose texts are shown, of the best and of the worst."""


def write_steering_page(path: str | Path, scores: SteeringScores, picture_file: str = "") -> Path:
    """Write the figure, the means of every layer, and the texts of its best and worst experts.

    Args:
        path: the HTML file.
        scores: what it is about.
        picture_file: a PNG beside it to show in place of the figure: without plotly.js the page is small.
    """
    settings = scores.settings
    shown = picture(Path(path).parent / picture_file) if picture_file else steering_figure(scores)
    sections = [
        Section(
            "",
            "Each point is one expert: how much the texts steered by it have in common that the unsteered "
            "ones lack, against how fluent they are. Ellipses: one standard deviation around the mean.",
            (shown, means(scores)),
        )
    ]
    for layer in settings["layers"]:
        ranked = sorted((s for s in scores.scores if s.layer == layer), key=worth, reverse=True)
        for which, chosen in {"best": ranked[:N_SHOWN], "worst": ranked[N_SHOWN:][-N_SHOWN:]}.items():
            if chosen:
                texts = {label(score): continuations(score) for score in chosen}
                claim = f"The {which} experts by concept x fluency."
                sections.append(Section(f"{layer}: the {which} {len(chosen)}", claim, (Texts(texts),)))
    sections.append(Section("Settings", "", (facts(settings),)))
    return write_page(
        path,
        f"Steering {settings['model_name']} with one expert at a time",
        f"{len(scores.scores):,} experts of {len(settings['layers'])} layers, scored by {settings['judge']}.",
        sections,
    )


def write_steering_png(path: str | Path, scores: SteeringScores) -> Path:
    """Write the figure as a picture.

    Raises:
        ImportError: kaleido is not installed.
    """
    return write_png(path, steering_figure(scores), width=900)


def worth(score: SteeringScore) -> float:
    """concept x fluency / 100: neither is worth anything without the other."""
    return score.concept * score.fluency / 100


def means(scores: SteeringScores) -> Table:
    """Mean and standard error of each layer."""
    columns = ("layer", "experts", "concept", "fluency", "concept x fluency / 100", "median perplexity")
    rows: list[list[Cell]] = []
    for layer in scores.settings["layers"]:
        found = [score for score in scores.scores if score.layer == layer]
        if found:
            unsteered = f"({found[0].perplexity_unsteered:.1f} unsteered)"
            rows.append(
                [
                    layer,
                    len(found),
                    with_error([score.concept for score in found]),
                    with_error([score.fluency for score in found]),
                    with_error([worth(score) for score in found]),
                    f"{median(s.perplexity for s in found):.1f} {unsteered}",
                ]
            )
    return Table(columns, rows)


def with_error(numbers: Sequence[float]) -> str:
    """The mean, and its standard error where there are two numbers."""
    error = f" ± {stdev(numbers) / len(numbers) ** 0.5:.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{error}"


def label(score: SteeringScore) -> str:
    """An expert and its scores."""
    return (
        f"expert {score.expert}: concept {score.concept:.0f}, fluency {score.fluency:.0f}, perplexity "
        f"{score.perplexity:.1f}"
    )


def continuations(score: SteeringScore) -> str:
    """One expert's texts; equal ones once, with how often."""
    counts = {text: score.texts.count(text) for text in score.texts}
    return "\n\n".join(f"{text} ({n} times)" if n > 1 else text for text, n in counts.items())


def steering_figure(scores: SteeringScores) -> go.Figure:
    """Every expert as a point; the mean and one standard deviation of each architecture."""
    figure = go.Figure()
    architectures = list(dict.fromkeys(score.architecture for score in scores.scores))
    for architecture, colour in colours_of({a: a for a in architectures}).items():
        found = [score for score in scores.scores if score.architecture == architecture]
        name = " and ".join(dict.fromkeys(score.layer for score in found))
        concept, fluency = [score.concept for score in found], [score.fluency for score in found]
        figure.add_scatter(
            x=concept,
            y=fluency,
            mode="markers",
            marker={"color": colour, "size": 6, "opacity": 0.45},
            name=name,
            legendgroup=architecture,
            showlegend=False,
            text=[f"{score.layer}, expert {score.expert}" for score in found],
            hovertemplate="%{text}<br>concept %{x:.0f}, fluency %{y:.0f}<extra></extra>",
        )
        x, y = ellipse(concept, fluency)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": colour, "width": 2.5},
            name=f"{name}, {len(found)} experts",
            legendgroup=architecture,
            hoverinfo="skip",
        )
    style(figure, 480)
    figure.update_xaxes(title_text="concept coherence")
    figure.update_yaxes(title_text="fluency")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "yanchor": "bottom", "y": 1, "x": 0})
    return figure


def ellipse(x: Sequence[float], y: Sequence[float], n: int = 90) -> tuple[list[float], list[float]]:
    """The points at Mahalanobis distance 1 from the mean, by the sample covariance; a point where n < 2."""
    centre = np.array([np.mean(x), np.mean(y)])
    covariance = np.cov(x, y) if len(x) > 1 else np.zeros((2, 2))
    variances, axes = np.linalg.eigh(covariance)
    angle = np.linspace(0, 2 * np.pi, n)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    around = centre[:, None] + axes @ (np.sqrt(variances.clip(min=0))[:, None] * circle)
    return around[0].tolist(), around[1].tolist()

"""The page of steering scores: concept coherence against fluency, an ellipse an architecture, and texts."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import plotly.graph_objects as go

from mxd_lens.artifacts.page import COLOURS, facts_table, style, write_page, write_png
from mxd_lens.evals.steering_scores import SteeringScore, SteeringScores

N_SHOWN = 5
"""Experts a layer whose texts are shown, of the best and of the worst."""


def write_steering_page(path: str | Path, scores: SteeringScores, picture: str = "") -> Path:
    """Writes the figure, every layer's means, and the texts of its best and worst experts.

    Args:
        path: the HTML file.
        scores: what it is about.
        picture: a picture file beside it to show in the place of the figure: without plotly.js the page
            is small.
    """
    parts: list[str | go.Figure] = [
        f'<img src="{escape(picture)}" alt="" style="width: 100%">' if picture else steering_figure(scores),
        f'<div class="wide"><table>{means(scores)}</table></div>',
    ]
    for layer in scores.settings["layers"]:
        ranked = sorted((s for s in scores.scores if s.layer == layer), key=worth, reverse=True)
        shown = {"best": ranked[:N_SHOWN], "worst": ranked[N_SHOWN:][-N_SHOWN:]}
        for which, of_it in shown.items():
            if of_it:
                parts.append(f"<h2>{escape(layer)}: the {which} {len(of_it)}</h2>")
                parts += [texts_of(score) for score in of_it]
    settings = scores.settings
    parts.append(f"<h2>How</h2>{facts_table(settings)}")
    return write_page(
        path,
        f"Steering {settings['model_name']} one expert at a time",
        "Each point is one expert: how much the texts written while it was raised have in common that the "
        "unsteered ones lack, and how likely and unrepetitive they are. Ellipses: one standard deviation "
        "around the mean. Best and worst are by the product of the two.",
        parts,
    )


def write_steering_png(path: str | Path, scores: SteeringScores) -> Path:
    """Writes the figure as a picture.

    Raises:
        ImportError: kaleido is not installed.
    """
    return write_png(path, steering_figure(scores), width=900)


def worth(score: SteeringScore) -> float:
    """concept x fluency / 100: neither is worth anything without the other."""
    return score.concept * score.fluency / 100


def means(scores: SteeringScores) -> str:
    """The rows of a table with a line a layer: mean and standard error."""
    columns = (
        "layer",
        "experts",
        "concept",
        "fluency",
        "concept x fluency / 100",
        "median perplexity",
        "unsteered",
        "repetition",
    )
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"]
    for layer in scores.settings["layers"]:
        of_it = [score for score in scores.scores if score.layer == layer]
        if of_it:
            cells = [
                with_error([score.concept for score in of_it]),
                with_error([score.fluency for score in of_it]),
                with_error([worth(score) for score in of_it]),
                f"{median(score.perplexity for score in of_it):.1f}",
                f"{of_it[0].perplexity_unsteered:.1f}",
                f"{mean(score.repetition for score in of_it):.2f}",
            ]
            rows.append(
                f"<tr><td>{escape(layer)}</td><td class='number'>{len(of_it)}</td>"
                + "".join(f"<td class='number'>{cell}</td>" for cell in cells)
                + "</tr>"
            )
    return "".join(rows)


def with_error(numbers: Sequence[float]) -> str:
    """The mean, and its standard error where there are two numbers."""
    error = f" <small>&plusmn; {stdev(numbers) / len(numbers) ** 0.5:.1f}</small>" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{error}"


def texts_of(score: SteeringScore) -> str:
    """One expert's texts; equal ones once, with how often."""
    counts = {text: score.texts.count(text) for text in score.texts}
    texts = "".join(
        f"<p>{escape(text)}{f' <small>({n} times)</small>' if n > 1 else ''}</p>"
        for text, n in counts.items()
    )
    return (
        f'<div class="continuation"><b>expert {score.expert}: concept {score.concept:.0f}, fluency '
        f"{score.fluency:.0f}, perplexity {score.perplexity:.1f}</b>{texts}</div>"
    )


def steering_figure(scores: SteeringScores) -> go.Figure:
    """Every expert as a point, and for each architecture the mean and one standard deviation around it."""
    figure = go.Figure()
    architectures = list(dict.fromkeys(score.architecture for score in scores.scores))
    for i, architecture in enumerate(architectures):
        colour = COLOURS[i % len(COLOURS)]
        of_it = [score for score in scores.scores if score.architecture == architecture]
        label = " and ".join(dict.fromkeys(score.layer for score in of_it))
        concept, fluency = [score.concept for score in of_it], [score.fluency for score in of_it]
        figure.add_scatter(
            x=concept,
            y=fluency,
            mode="markers",
            marker={"color": colour, "size": 6, "opacity": 0.45},
            name=label,
            legendgroup=architecture,
            showlegend=False,
            text=[f"{score.layer}, expert {score.expert}" for score in of_it],
            hovertemplate="%{text}<br>concept %{x:.0f}, fluency %{y:.0f}<extra></extra>",
        )
        x, y = ellipse(concept, fluency)
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": colour, "width": 2.5},
            name=f"{label}, {len(of_it)} experts",
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

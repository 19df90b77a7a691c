"""The figure of steering scores: concept coherence against fluency, an ellipse an architecture."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from mxd_lens.dashboards.page import COLOURS, style
from mxd_lens.evals.steering_scores import SteeringScores


def steering_figure(scores: SteeringScores) -> go.Figure:
    """Every expert as a point, and for each architecture the mean and one standard deviation around it."""
    figure = go.Figure()
    architectures = list(dict.fromkeys(score.architecture for score in scores.scores))
    for i, architecture in enumerate(architectures):
        colour = COLOURS[i % len(COLOURS)]
        of_it = [score for score in scores.scores if score.architecture == architecture]
        concept, fluency = [score.concept for score in of_it], [score.fluency for score in of_it]
        figure.add_scatter(
            x=concept,
            y=fluency,
            mode="markers",
            marker={"color": colour, "size": 6, "opacity": 0.45},
            name=architecture,
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
            name=f"{architecture}, {len(of_it)} experts",
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

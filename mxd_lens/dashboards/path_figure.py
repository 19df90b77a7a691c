"""The graph of the strongest paths to an expert's pre-activation."""

import plotly.graph_objects as go

from mxd_lens.dashboards.page import BLUE, GREY, RED, style
from mxd_lens.paths import PathGraph, Vertex

HEIGHTS = {"embedding": -1.0, "head": -0.4, "attention bias": -0.4}
"""Of parts, relative to the MLP of their block; the embedding lies below block 0."""


def path_figure(graph: PathGraph, n_paths: int = 16) -> go.Figure:
    """The parts on the strongest paths, by their layer, and what each reads from the others.

    The width of a line and the size of a point stand for the effect on the target's pre-activation by
    magnitude; blue adds to it, red takes away. What lies on no path shown is left out.
    """
    paths = graph.strongest(n_paths)
    effects = graph.effects
    vertices = list(dict.fromkeys(v for path in paths for v in reversed(path.vertices)))
    edges = dict.fromkeys(
        pair for path in paths for pair in zip(path.vertices, path.vertices[1:], strict=False)
    )
    at = places(vertices)
    largest = max((abs(effects[v]) for v in vertices if v != graph.target), default=1.0) or 1.0
    figure = go.Figure()
    for read, reader in edges:
        effect = graph.edges[reader][read]
        (x0, y0), (x1, y1) = at[read], at[reader]
        steps = [i / 12 for i in range(13)]
        figure.add_scatter(
            x=[x0 + (x1 - x0) * t * t * (3 - 2 * t) for t in steps],
            y=[y0 + (y1 - y0) * t for t in steps],
            mode="lines",
            line={"color": BLUE if effect > 0 else RED, "width": 1 + 7 * min(1.0, abs(effect) / largest)},
            opacity=0.45,
            name=f"{read} to {reader}",
            text=f"{read} → {reader}: {effect:+.3g}",
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_scatter(
        x=[at[v][0] for v in vertices],
        y=[at[v][1] for v in vertices],
        mode="markers+text",
        marker={
            "color": [GREY if v == graph.target else BLUE if effects[v] > 0 else RED for v in vertices],
            "size": [10 + 16 * min(1.0, abs(effects[v]) / largest) for v in vertices],
            "line": {"width": 0},
        },
        text=[f"{v.part if v.index is None else f'{v.part} {v.index}'}" for v in vertices],
        textposition="top center",
        cliponaxis=False,
        customdata=[[str(v), effects[v]] for v in vertices],
        hovertemplate="%{customdata[0]}: %{customdata[1]:+.3g}<extra></extra>",
        name="parts",
    )
    levels = sorted({v.layer for v in vertices if v.layer is not None})
    style(figure, max(380, 70 * (len({y for _, y in at.values()}) + 2)))
    figure.update_xaxes(visible=False, range=[-0.08, 1.08])
    figure.update_yaxes(
        tickvals=[-1, *levels] if any(v.layer is None for v in vertices) else levels,
        ticktext=["tokens", *map(str, levels)] if any(v.layer is None for v in vertices) else levels,
        title_text="layer",
    )
    return figure


def places(vertices: list[Vertex]) -> dict[Vertex, tuple[float, float]]:
    """Where vertices lie: those of one height side by side, in the order given, which is by strength."""
    heights = {v: (v.layer or 0) + HEIGHTS.get(v.part, 0.0) for v in vertices}
    at = {}
    for height in set(heights.values()):
        beside = [v for v in vertices if heights[v] == height]
        for i, vertex in enumerate(beside):
            at[vertex] = (i + 1) / (len(beside) + 1), height
    return at

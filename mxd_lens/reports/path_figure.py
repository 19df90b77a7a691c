"""The graph of the strongest paths to an expert's pre-activation."""

from statistics import mean

import plotly.graph_objects as go

from mxd_lens.analysis.circuits import PathGraph, Vertex
from mxd_lens.artifacts.page import BLUE, GREY, RED, style

BELOW_MLP = {"embedding", "head", "attention bias"}
"""Parts that lie below the MLP of their block; the embedding lies below them all."""
COLUMNS = {"head": (0.2, 0.46), "mlp": (0.5, 0.6), "embedding": (0.5, 0.6), "expert": (0.64, 1.0)}
OTHER_COLUMN = (0.0, 0.16)
"""Where a figure's width has which parts; biases, skip connections and errors are the others."""


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
    at = places(vertices, list(edges))
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
    rows = {
        y: "tokens" if v.layer is None else f"{v.layer}{', attention' if v.part in BELOW_MLP else ''}"
        for v, (_, y) in at.items()
    }
    style(figure, 150 + 52 * len(rows))
    figure.update_xaxes(visible=False, range=[-0.08, 1.08])
    figure.update_yaxes(
        tickvals=list(rows), ticktext=list(rows.values()), range=[-0.7, len(rows)], title_text="layer"
    )
    return figure


def places(
    vertices: list[Vertex], edges: list[tuple[Vertex, Vertex]], n_sweeps: int = 4
) -> dict[Vertex, tuple[float, float]]:
    """A row for each block's attention and for each MLP that has any part, in their order.

    In its row a part is placed by the mean place of the parts that it is connected with, so that few lines
    cross.
    """
    rows = [(-1 if v.layer is None else v.layer, v.part not in BELOW_MLP) for v in vertices]
    heights = {row: y for y, row in enumerate(sorted(set(rows)))}
    beside: dict[tuple[int, tuple[float, float]], list[Vertex]] = {}
    for vertex, row in zip(vertices, rows, strict=True):
        beside.setdefault((heights[row], COLUMNS.get(vertex.part, OTHER_COLUMN)), []).append(vertex)
    near: dict[Vertex, list[Vertex]] = {vertex: [] for vertex in vertices}
    for one, other in edges:
        near[one].append(other)
        near[other].append(one)
    at: dict[Vertex, tuple[float, float]] = {}
    for _ in range(n_sweeps):
        for (y, (left, right)), parts in beside.items():
            parts.sort(key=lambda v: mean([at[n][0] for n in near[v] if n in at] or [0.5]))
            for i, vertex in enumerate(parts):
                at[vertex] = left + (right - left) * (i + 0.5) / len(parts), float(y)
    return at

"""The page about a probing run: the best experts of each class, and several experts together."""

from pathlib import Path
from statistics import mean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mxd_lens.artifacts.page import GREY, Section, colours_of, style, write_page, write_png
from mxd_lens.artifacts.tables import Table
from mxd_lens.evals.probing.probing import ALL, ALWAYS, CONSTANT, N_KEPT, SparseProbing, of_k, spread

COLUMNS = 2
"""Tasks beside each other."""


def write_probing_page(path: str | Path, result: SparseProbing) -> Path:
    """Write the page; `write_probing_png` writes its last figure as a picture."""
    settings = result.settings
    best = [
        Section(
            f"Single experts: {task}",
            f"Each point is one of the {N_KEPT} experts that are best on the training split; the grey line "
            "is a constant answer.",
            (experts_figure(result, task),),
        )
        for task in result.tasks
    ]
    layers = ", ".join(f"{name} ({layer['d_sae']:,} experts)" for name, layer in settings["layers"].items())
    return write_page(
        path,
        f"Sparse probing of {settings['model_name']}",
        f"The mean coefficient of one expert over a text as a probe of the text's class: {layers}; "
        f"{len(settings['seeds'])} splits, up to {settings['context_size']} tokens of each text.",
        [
            Section(
                "Several experts together",
                "Test F1 against the number of experts in a probe; dotted: dense activations.",
                (together_figure(result),),
            ),
            *best,
            Section("All means", "", (result,)),
            Section("The texts", "", (texts(result),)),
        ],
    )


def write_probing_png(path: str | Path, result: SparseProbing) -> Path:
    """Write the figure of F1 against k as a picture.

    Raises:
        ImportError: kaleido is not installed.
    """
    return write_png(path, together_figure(result))


def colours(result: SparseProbing) -> dict[str, str]:
    """The colour of each layer, by its architecture; grey for dense activations."""
    layers = result.settings["layers"]
    dense = [name for name in result.features if name not in layers and is_probed(result, name)]
    found = colours_of({name: layer.get("architecture", "") for name, layer in layers.items()})
    return found | dict.fromkeys(dense, GREY)


def is_probed(result: SparseProbing, features: str) -> bool:
    """Whether it is a layer or dense activations, and no constant answer."""
    return any(probe.experts for probe in result.probes if probe.features == features)


def experts_figure(result: SparseProbing, task: str) -> go.Figure:
    """The test F1 of the best single experts: a box for each class and layer."""
    figure = go.Figure()
    for features, colour in colours(result).items():
        points = [(probe, expert) for probe in result.select(task, features) for expert in probe.experts]
        figure.add_box(
            x=[probe.label for probe, _ in points],
            y=[expert.f1 for _, expert in points],
            text=[f"expert {expert.expert}, split {probe.seed}" for probe, expert in points],
            hovertemplate="%{fullData.name}, %{text}<br>F1 %{y:.3f}<extra></extra>",
            name=features,
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            marker={"color": colour, "size": 3, "opacity": 0.6},
            line_width=1.2,
            fillcolor="rgba(0,0,0,0)",
        )
    for i, label in enumerate(result.tasks[task].balance):
        level = [probe.scores[CONSTANT].f1 for probe in result.select(task, ALWAYS, label)]
        figure.add_scatter(
            x=[label],
            y=[mean(level)],
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 60, "color": GREY},
            name=ALWAYS,
            hovertemplate=f"{ALWAYS}: F1 %{{y:.3f}}<extra></extra>",
            showlegend=not i,
        )
    style(figure, 430)
    figure.update_layout(boxmode="group", showlegend=True, legend={"orientation": "h", "y": -0.15})
    return figure.update_yaxes(range=[0, 1.02], title_text="F1 on the test split")


def together_figure(result: SparseProbing) -> go.Figure:
    """F1 against the number of experts in a probe, a panel for each task, dense activations beside it."""
    ks, tasks = result.settings["ks"], list(result.tasks)
    rows = -(-len(tasks) // COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=COLUMNS,
        subplot_titles=tasks,
        vertical_spacing=0.22 / rows,
        horizontal_spacing=0.08,
    )
    for i, task in enumerate(tasks):
        for features, colour in colours(result).items():
            dense = features not in result.settings["layers"]
            kinds = [*(of_k(k) for k in ks), *([ALL] if dense else [])]
            values = {kind: [s.f1 for s in result.by_seed(task, features, kind)] for kind in kinds}
            values = {kind: f1 for kind, f1 in values.items() if f1}
            figure.add_scatter(
                x=list(values),
                y=[mean(f1) for f1 in values.values()],
                error_y={"array": [spread(f1) for f1 in values.values()], "width": 2, "thickness": 1},
                mode="lines+markers",
                line={"color": colour, "width": 1.5, "dash": "dot" if dense else "solid"},
                marker_symbol="x" if dense and "out" in features else "circle",
                name=features,
                legendgroup=features,
                showlegend=i == 0,
                hovertemplate="%{fullData.name}, %{x}: F1 %{y:.3f}<extra></extra>",
                row=i // COLUMNS + 1,
                col=i % COLUMNS + 1,
            )
    style(figure, 90 + 300 * rows)
    figure.update_yaxes(title_text="F1", col=1)
    return figure.update_layout(
        showlegend=True,
        margin_t=100,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1 + 40 / figure.layout.height, "x": 0},
    )


def texts(result: SparseProbing) -> Table:
    """Where the texts of each task are from, how many, of which class."""

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {n:,}" for name, n in counts.items() if n) or "none"

    return Table(
        ["task", "source", "texts of each class", "tokens", "cut", "left out"],
        [
            [name, f.provider, listed(f.balance), f"{f.n_tokens:,}", f"{f.n_cut:,}", listed(f.removed)]
            for name, f in result.tasks.items()
        ],
    )

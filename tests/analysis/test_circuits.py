"""Paths to a pre-activation, against direct effects put together by hand in float64."""

from io import StringIO

import pytest
import torch
from attached import MODELS, PROMPT
from layers import make_layer
from rich.console import Console
from test_attribution import by_hand

from mxd_lens import MxD, load_model
from mxd_lens.analysis.circuits import Path, PathGraph, Vertex, strongest_paths
from mxd_lens.reports.path_figure import path_figure


@pytest.fixture
def later():
    return make_layer("mxd, k", layer=2)


@pytest.fixture
def graph(tiny_folder, later) -> PathGraph:
    model = load_model(tiny_folder, dtype="float64")
    layers = [make_layer("mxd, k", layer=i) for i in (0, 1)]
    return strongest_paths(model, later, 7, PROMPT, layers=layers, width=2)


@pytest.mark.parametrize(
    "kind", ["mxd, k", "skip_mxd, relu", "topk_transcoder, k", "saelens skip_transcoder"]
)
def test_against_direct_effects_by_hand(tiny_folder, later, kind):
    model = load_model(tiny_folder, dtype="float64")
    layers = {i: make_layer(kind, layer=i) for i in (0, 1)}
    tokens = model.to_tokens(PROMPT)[0]
    found = strongest_paths(model, later, 7, PROMPT, 3, layers=layers.values(), width=2)

    to_target = by_hand(tiny_folder, later, 7, tokens, 3, layers)
    assert found.edges[found.target] == pytest.approx(
        {Vertex(*name): effect for name, effect in to_target.items()}, rel=1e-4, abs=1e-6
    )
    in_block_1 = {v: e for v, e in found.effects.items() if v.layer == 1 and v.part == "expert"}
    followed = sorted(in_block_1, key=lambda v: -abs(in_block_1[v]))[:2]
    assert followed == [v for v in found.edges if v.layer == 1]
    for vertex in followed:
        read = by_hand(tiny_folder, layers[1], vertex.index, tokens, 3, {0: layers[0]}, at=1)
        pre_activation = sum(read.values())
        effect = to_target["expert", 1, vertex.index]
        expected = {Vertex(*name): effect * e / pre_activation for name, e in read.items()}
        assert found.edges[vertex] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("width", [0, 1, 3, 100])
def test_the_ends_sum_to_the_pre_activation(tiny_folder, later, width):
    model = load_model(tiny_folder, dtype="float64")
    layers = [make_layer("skip_mxd, k", layer=i) for i in (0, 1)]
    found = strongest_paths(model, later, 7, PROMPT, layers=layers, width=width)
    assert sum(found.ends.values()) == pytest.approx(found.pre_activation, abs=1e-10)
    for vertex, read in found.edges.items():
        assert sum(read.values()) == pytest.approx(found.effects[vertex], abs=1e-10)
    n_followed = {block: sum(v.layer == block for v in found.edges) for block in (0, 1)}
    assert n_followed == {block: min(width, 4) for block in (0, 1)}
    everything = found.strongest(100_000)
    assert sum(path.effect for path in everything) == pytest.approx(found.pre_activation, abs=1e-10)


def test_paths_are_the_products_of_their_shares(graph):
    effects = graph.effects
    every: list[Path] = []

    def walk(vertex: Vertex, after: tuple[Vertex, ...], effect: float) -> None:
        for read, on_target in graph.edges[vertex].items():
            share = effect * on_target / effects[vertex]
            if read in graph.edges:
                walk(read, (read, *after), share)
            else:
                every.append(Path((read, *after), share))

    walk(graph.target, (graph.target,), graph.pre_activation)
    every.sort(key=lambda path: -abs(path.effect))
    for n in (1, 5, 30):
        found = graph.strongest(n)
        assert [p.vertices for p in found] == [p.vertices for p in every[:n]]
        assert [p.effect for p in found] == pytest.approx([p.effect for p in every[:n]])


@pytest.mark.parametrize("name", MODELS)
def test_on_every_model(name, tiny_folder, later):
    model = MODELS[name](tiny_folder)
    found = strongest_paths(model, later, 7, PROMPT, layers=[make_layer("topk_transcoder, k", layer=1)])
    assert sum(found.ends.values()) == pytest.approx(found.pre_activation, abs=1e-5)


def test_the_features_of_an_sae_are_ends(tiny_model, later):
    sae = make_layer("saelens sae", layer=1)
    found = strongest_paths(tiny_model, later, 7, PROMPT, layers=[sae])
    assert list(found.edges) == [found.target]
    assert any(v.part == "expert" for v in found.ends)


def test_results_print_and_draw(graph):
    console = Console(file=StringIO(), width=160)
    console.print(graph)
    printed = console.file.getvalue()
    assert "layer 2 expert 7" in printed
    assert str(graph.strongest(1)[0]).split(" → ")[0] in printed
    assert len(graph.to_pandas()) == 12

    figure = path_figure(graph, n_paths=6)
    paths = graph.strongest(6)
    shown = {v for path in paths for v in path.vertices}
    (points,) = [t for t in figure.data if t.mode == "markers+text"]
    assert len(points.x) == len(shown)
    edges = {pair for path in paths for pair in zip(path.vertices, path.vertices[1:], strict=False)}
    assert sum(t.mode == "lines" for t in figure.data) == len(edges)


def test_what_does_not_fit_is_said(tiny_model, later):
    with pytest.raises(ValueError, match="width must not be negative"):
        strongest_paths(tiny_model, later, 7, PROMPT, width=-1)
    with pytest.raises(IndexError):
        strongest_paths(tiny_model, later, later.cfg.d_sae, PROMPT)
    with pytest.raises(ValueError, match="not earlier"):
        strongest_paths(tiny_model, later, 7, PROMPT, layers=[later])


@pytest.mark.real_model
@torch.no_grad()
def test_on_the_real_model(smollm2):
    sae = MxD.from_pretrained("smollm2-135m-mxd", "blocks.11.mlp", dtype="float32")
    tokens = smollm2.to_tokens("The capital of France is")
    _, cache = smollm2.run_with_cache(tokens, names_filter=[sae.cfg.metadata.hook_name], stop_at_layer=12)
    pre = cache[sae.cfg.metadata.hook_name][0, -1].double() @ sae.W_enc.double() + sae.b_enc.double()
    expert = int(pre.argmax())
    found = strongest_paths(smollm2, sae, expert, tokens[0])
    assert found.pre_activation == pytest.approx(pre[expert].item(), rel=1e-6)
    assert sum(found.ends.values()) == pytest.approx(pre[expert].item(), rel=1e-5)

"""Attribution graphs: effects against finite differences of the frozen model, and sums that must be exact."""

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from small_random import random_layer

from mxd_lens import load_model
from mxd_lens.adapters.circuit_tracer_graph import graph_json
from mxd_lens.analysis.frozen import FrozenModel
from mxd_lens.analysis.graph import AttributionGraph, attribution_graph
from mxd_lens.evals.graph_validation import validate_graph

PROMPT = "the cat sat on the mat"
CLASSES = [HookedSAETransformer, SAETransformerBridge]


@pytest.fixture(params=CLASSES, ids=["HookedTransformer", "bridge"])
def model(request, tiny_folder):
    return load_model(tiny_folder, dtype=torch.float64, model_class=request.param)


KINDS = ["mxd", "gated mxd", "affine", "transcoder", "skip"]


@pytest.fixture(params=KINDS)
def layers(request, model):
    return {block: random_layer(model, block, request.param) for block in range(3)}


def test_effects_into_every_node_sum_to_its_activation(model, layers):
    graph = attribution_graph(model, layers, PROMPT, max_experts=10_000, progress=False)
    experts, logits = graph.of_kind("expert"), graph.of_kind("logit")
    assert len(experts) == graph.n_active > 20
    targets = torch.cat([experts, logits])
    total = graph.gate.sum(1) + graph.constant
    assert not graph.left_out.any()
    torch.testing.assert_close(total[targets], graph.activations[targets], rtol=1e-10, atol=1e-10)


def test_fewer_experts_leave_the_rest_of_the_effects_counted(model, layers):
    graph = attribution_graph(model, layers, PROMPT, max_experts=5, batch_size=2, progress=False)
    assert len(graph.of_kind("expert")) == 5
    targets = graph.of_kind("expert", "logit")
    total = graph.gate.sum(1) + graph.constant + graph.left_out
    torch.testing.assert_close(total[targets], graph.activations[targets], rtol=1e-10, atol=1e-10)
    assert graph.left_out[graph.of_kind("logit")].any()


def test_the_frozen_model_gives_the_models_own_activations(model, layers):
    tokens = model.to_tokens(PROMPT)[0]
    frozen = FrozenModel(model, layers, tokens)
    written = [
        y - torch.where(frozen.covered[b][:, None], frozen.parts[b].rest, 0)
        for b, y in enumerate(frozen.mlp_out)
    ]
    readings = frozen.run(frozen.embedding[None], [w[None] for w in written])
    for block, x in frozen.inputs.items():
        torch.testing.assert_close(readings.inputs[block][0], x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(readings.final[0], frozen.final, rtol=1e-10, atol=1e-12)


def test_an_edge_is_a_difference_of_the_frozen_model(model, layers):
    """A source's effect is what changes when it is taken away, the model frozen: no gradient asked."""
    graph = attribution_graph(model, layers, PROMPT, max_experts=10_000, progress=False)
    tokens = model.to_tokens(PROMPT)[0]
    frozen = FrozenModel(model, layers, tokens)
    written = [
        y - torch.where(frozen.covered[b][:, None], frozen.parts[b].rest, 0)
        for b, y in enumerate(frozen.mlp_out)
    ]
    early = [i for i in graph.of_kind("expert").tolist() if graph.nodes[i].block == 0]
    late = [i for i in graph.of_kind("expert").tolist() if graph.nodes[i].block == 2]
    source = max(early, key=lambda i: graph.gate[late, i].abs().sum())
    node = graph.nodes[source]
    parts = frozen.parts[0]
    vector = node.activation * parts.written_by(torch.tensor([node.position]), torch.tensor([node.index]))[0]
    without = [w.clone() for w in written]
    without[0][node.position] -= vector
    whole, less = (frozen.run(frozen.embedding[None], [w[None] for w in of]) for of in (written, without))
    assert graph.gate[late, source].abs().max() > 1e-4
    for target in late:
        n, p = graph.nodes[target].index, graph.nodes[target].position
        g = layers[2].W_enc[:, n]
        expected = (whole.inputs[2][0, p] - less.inputs[2][0, p]) @ g
        assert graph.gate[target, source].item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-12)


def test_branch_edges_are_effects_on_the_length_of_what_an_expert_writes(model):
    layers = {block: random_layer(model, block, "mxd") for block in range(3)}
    graph = attribution_graph(model, layers, PROMPT, max_experts=10_000, progress=False)
    experts = graph.of_kind("expert")
    assert graph.has_branch[experts].all()
    assert not graph.has_branch[graph.of_kind("token", "error", "logit")].any()
    shares = graph.gate_share[experts]
    assert ((shares > 0) & (shares < 1)).all()
    plain = attribution_graph(
        model, {b: random_layer(model, b, "transcoder") for b in range(3)}, PROMPT, progress=False
    )
    assert not plain.has_branch.any()
    assert (plain.gate_share[plain.of_kind("expert")] == 1).all()
    assert torch.equal(plain.edges, plain.gate)


def test_a_block_without_a_layer_is_an_error_node(model):
    graph = attribution_graph(model, [random_layer(model, 1, "mxd")], PROMPT, progress=False)
    assert {node.block for node in graph.nodes if node.kind == "expert"} == {1}
    assert {node.text for node in graph.nodes if node.kind == "error"} == {
        "MLP of block 0",
        "error of block 1",
        "MLP of block 2",
    }


def test_scores_of_a_graph_made_by_hand():
    """Two tokens, one expert, one error, one logit: influence counted with a pencil."""
    from mxd_lens.analysis.graph import Node

    nodes = [
        Node("token", None, 0, 3, 1.0, "a"),
        Node("token", None, 1, 4, 1.0, "b"),
        Node("expert", 0, 1, 7, 2.0, "expert 7 of block 0"),
        Node("error", 0, 1, None, 1.0, "error of block 0"),
        Node("logit", None, 1, 5, 1.0, "c"),
    ]
    gate = torch.zeros(5, 5, dtype=torch.float64)
    gate[2, :2] = torch.tensor([3.0, -1.0])  # shares 3/4, 1/4
    gate[4, 1:4] = torch.tensor([1.0, 2.0, -1.0])  # shares 1/4, 1/2, 1/4
    zeros = torch.zeros(5, dtype=torch.float64)
    graph = AttributionGraph(
        nodes,
        gate,
        torch.zeros_like(gate),
        torch.zeros(5, dtype=torch.bool),
        zeros,
        zeros,
        torch.tensor([1.0], dtype=torch.float64),
        ["a", "b"],
        [3, 4],
        "none",
        1,
    )
    expected = torch.tensor([3 / 8, 1 / 4 + 1 / 8, 1 / 2, 1 / 4, 0], dtype=torch.float64)
    torch.testing.assert_close(graph.influence, expected)
    assert graph.replacement_score == pytest.approx(0.75 / 1.0)
    # logit: weight 1, 3/4 explained; expert: weight 1/2, all of it; tokens and error have no input.
    weight = 1 + expected.sum().item()
    assert graph.completeness_score == pytest.approx((weight - 1 / 4) / weight)
    # Doubling the expert changes the logit by its edge, of which the tokens made 3/2 and -1/2 per unit.
    effects = graph.effects_on_logits()[0]
    torch.testing.assert_close(effects, torch.tensor([3.0, 0.0, 2.0, -1.0, 0.0], dtype=torch.float64))


def test_pruning_keeps_what_it_promises(model, layers):
    graph = attribution_graph(model, layers, PROMPT, max_experts=10_000, progress=False)
    small = graph.pruned(0.6, 0.9)
    assert len(small.nodes) < len(graph.nodes)
    assert [n for n in small.nodes if n.kind in ("token", "logit")] == [
        n for n in graph.nodes if n.kind in ("token", "logit")
    ]
    kept = set(small.nodes)
    influence = graph.influence
    share = sum(v for n, v in zip(graph.nodes, influence.tolist(), strict=True) if n in kept)
    assert share > 0.5 * influence.sum().item()
    targets = small.of_kind("logit")
    total = small.gate.sum(1) + small.constant + small.left_out
    torch.testing.assert_close(total[targets], small.activations[targets], rtol=1e-9, atol=1e-9)


def always_on(model, kind="transcoder"):
    """Layers whose features are all active and stay so."""
    layers = {block: random_layer(model, block, kind, k=20) for block in range(3)}
    for layer in layers.values():
        layer.W_dec.data *= 1e-2
        layer.b_enc.data += 20.0
    return layers


def test_effects_along_all_paths_are_those_of_the_frozen_model(model):
    """Gates that stay open are linear: the whole effect of an ablation, with later features computed anew."""
    layers = always_on(model)
    graph = attribution_graph(model, layers, PROMPT, max_experts=10_000, progress=False)
    predicted = -graph.effects_on_logits()[0]
    frozen = FrozenModel(model, layers, model.to_tokens(PROMPT)[0])
    unembed = model.W_U[:, graph.nodes[-len(graph.probabilities)].index] - model.W_U.mean(1)

    def logit(ablated):
        written = list(frozen.errors)
        for block, layer in layers.items():  # each block's features, from what the earlier ones left
            readings = frozen.run(frozen.embedding[None], [w[None] for w in written])
            a = layer.encode(readings.inputs[block][0]) * frozen.covered[block][:, None]
            if ablated.block == block:
                a[ablated.position, ablated.index] = 0
            written[block] = written[block] + a @ layer.W_dec
        return frozen.run(frozen.embedding[None], [w[None] for w in written]).final[0, -1] @ unembed

    with torch.no_grad():
        whole = logit(graph.nodes[0])
        for i in graph.of_kind("expert")[::37].tolist():
            change = (logit(graph.nodes[i]) - whole).item()
            assert predicted[i].item() == pytest.approx(change, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_ablations_are_measured_in_the_model(model, kind):
    """An ablation of the last block, where nothing comes after but the norm, by hand."""
    layers = {block: random_layer(model, block, kind) for block in range(3)}
    graph = attribution_graph(model, layers, PROMPT, max_experts=10_000, progress=False)
    found = validate_graph(model, layers, graph, n=40)
    assert len(found.ablations) == 40
    assert -1 <= found.pearson <= 1
    last = next(a for a in found.ablations if a.node.block == 2 and a.node.position == 6)
    frozen = FrozenModel(model, layers, model.to_tokens(PROMPT)[0])
    writes = last.node.activation * frozen.parts[2].written_by(
        torch.tensor([6]), torch.tensor([last.node.index])
    )
    without = frozen.mlp_out[2] - torch.nn.functional.pad(writes, (0, 0, 6, 0))
    hook = model.cfg.model_name and "blocks.2.hook_mlp_out"
    with torch.no_grad():
        logits = model.run_with_hooks(
            frozen.tokens[None],
            fwd_hooks=[(lambda n: n in (hook, "blocks.2.mlp.hook_out"), lambda y, hook: without[None].to(y))],
        )[0, -1]
    target = graph.nodes[-len(graph.probabilities)].index
    change = (logits - logits.mean())[target] - (frozen.logits[-1] - frozen.logits[-1].mean())[target]
    assert last.measured == pytest.approx(change.item(), rel=1e-4, abs=1e-6)


def test_half_precision_is_refused(tiny_folder):
    model = load_model(tiny_folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="half precision"):
        attribution_graph(model, [random_layer(model, 1, "mxd", torch.bfloat16)], PROMPT)


def test_two_layers_of_one_block_are_refused(model):
    with pytest.raises(ValueError, match="Two layers are given for block 1"):
        attribution_graph(model, [random_layer(model, 1, "mxd"), random_layer(model, 1, "skip")], PROMPT)
    with pytest.raises(ValueError, match="Name each layer by its own block"):
        attribution_graph(model, {0: random_layer(model, 1, "mxd")}, PROMPT)


def test_a_saved_graph_is_the_same(model, layers, tmp_path):
    graph = attribution_graph(model, layers, PROMPT, max_experts=8, progress=False)
    graph.save(tmp_path / "graph")
    again = AttributionGraph.load(tmp_path / "graph")
    assert again.nodes == graph.nodes
    assert torch.equal(again.edges, graph.edges)
    assert str(again) == str(graph)


def test_the_json_of_circuit_tracer(model, layers):
    graph = attribution_graph(model, layers, PROMPT, max_experts=50, progress=False)
    found = graph_json(graph, "cat", "tiny", labels={(0, 3): "cats"})
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {link["source"] for link in found["links"]} | {link["target"] for link in found["links"]} <= set(
        ids
    )
    assert sum(node["is_target_logit"] for node in found["nodes"]) == 1
    assert found["metadata"]["prompt_tokens"] == graph.prompt

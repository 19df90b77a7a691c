"""Attribution graphs in the JSON that circuit-tracer's page and Neuronpedia read.

The schema is the one of decoderesearch/circuit-tracer, circuit_tracer/frontend/graph_models.py.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mxd_lens.analysis.graph import AttributionGraph, Node
from mxd_lens.artifacts.files import write_json

KINDS = {
    "expert": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


def graph_json(
    graph: AttributionGraph,
    slug: str,
    scan: str,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    labels: dict[tuple[int, int], str] | None = None,
) -> dict[str, Any]:
    """A graph as circuit-tracer's page shows it, pruned.

    Args:
        graph: the whole graph.
        slug: the graph's name in an address.
        scan: the name of the set of layers.
        node_share, edge_share: as for `AttributionGraph.pruned`.
        labels: descriptions of experts, by block and id.
    """
    influence = graph.influence
    order = influence.argsort(descending=True)
    cumulative: Float[Tensor, " nodes"] = torch.empty_like(influence)
    cumulative[order] = influence[order].cumsum(0) / influence.sum()
    of_node = dict(zip(map(_key, graph.nodes), cumulative.tolist(), strict=True))
    shown = graph.pruned(node_share, edge_share)
    n_blocks = 1 + max((node.block for node in graph.nodes if node.block is not None), default=-1)
    probabilities = iter(shown.probabilities.tolist())
    nodes: list[dict[str, Any]] = []
    for node in shown.nodes:
        entry = _node(node, n_blocks)
        if node.kind == "logit":
            p = next(probabilities)
            entry |= {
                "token_prob": p,
                "is_target_logit": not any(other["is_target_logit"] for other in nodes),
                "clerp": f'Output "{node.text}" (p={p:.3f})',
            }
        else:
            entry["influence"] = of_node[_key(node)]
        if node.kind == "expert":
            entry["activation"] = node.activation
            entry["clerp"] = (labels or {}).get((node.block, node.index), "")  # type: ignore[arg-type]
        nodes.append(entry)
    edges = shown.edges
    links = [
        {
            "source": nodes[s]["node_id"],
            "target": nodes[t]["node_id"],
            "weight": edges[t, s].item(),
        }
        for t, s in edges.nonzero().tolist()
    ]
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": graph.prompt,
        "prompt": "".join(graph.prompt),
        "node_threshold": node_share,
        "schema_version": 1,
    }
    parameters = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": parameters, "nodes": nodes, "links": links}


def write_graph_json(graph: AttributionGraph, path: str | Path, scan: str, **settings: Any) -> Path:
    """Writes `graph_json` to a file named SLUG.json."""
    return write_json(path, graph_json(graph, slug=Path(path).stem, scan=scan, **settings))


def _key(node: Node) -> tuple[Any, ...]:
    return node.kind, node.block, node.position, node.index


def _node(node: Node, n_blocks: int) -> dict[str, Any]:
    """The fields that every node has."""
    layer = {"token": "E", "logit": str(n_blocks + 1)}.get(node.kind, str(node.block))
    index = -1 if node.index is None else node.index
    feature = {"token": node.position, "expert": _paired(node.block or 0, index)}.get(node.kind, index)
    of_script = {
        "token": f"E_{index}-{node.position}",
        "expert": f"{layer}_{index}-0",
        "error": f"{layer}_-1-{node.position}",
        "logit": f"L_{index}-{node.position}",
    }
    return {
        "node_id": f"{layer}_{index}_{node.position}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": KINDS[node.kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": of_script[node.kind],
        "clerp": node.text if node.kind == "token" else "",
        "influence": None,
        "activation": None,
    }


def _paired(block: int, index: int) -> int:
    """One number for a block and an id (Cantor's pairing), as Neuronpedia names a feature."""
    return (block + index) * (block + index + 1) // 2 + index

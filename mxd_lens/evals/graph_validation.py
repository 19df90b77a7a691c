"""Whether an attribution graph says what happens: the effects of ablating nodes, predicted and measured."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from mxd_lens.analysis.decomposition import decompose
from mxd_lens.analysis.frozen import FrozenModel
from mxd_lens.analysis.graph import AttributionGraph, Node
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.hooks.replace import Replaced, Replacement


class AblatedNode(NamedTuple):
    """What ablating one expert at one token does to one logit, less the mean logit."""

    node: Node
    """The expert."""
    logit: str
    """The token whose logit it is."""
    predicted: float
    """By the graph, along all paths."""
    measured: float
    """In the model, with attention, norms and all later experts computed anew."""


@dataclass(frozen=True, repr=False)
class GraphValidation(Tabular):
    """What `validate_graph` found."""

    ablations: list[AblatedNode]
    """The strongest node first."""
    pearson: float
    """The correlation of predicted and measured changes."""
    spearman: float
    """Of their ranks."""

    @property
    def title(self) -> str:
        return (
            f"{len(self.ablations)} ablations: correlation of predicted and measured changes "
            f"{self.pearson:.3f} (ranks {self.spearman:.3f})"
        )

    @property
    def columns(self) -> list[str]:
        return ["node", "position", "logit", "predicted", "measured"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for node, logit, predicted, measured in self.ablations:
            yield [node.text, node.position, logit, predicted, measured]


@torch.no_grad()
def validate_graph(
    model: Any, layers: Mapping[int, SAE[Any]], graph: AttributionGraph, n: int = 20
) -> GraphValidation:
    """Ablate the strongest experts of a graph one at a time, and compare each effect with the graph's.

    The effect is on the logit of the likeliest next token, less the mean logit. The model runs with every
    layer in its MLP's place and each layer's error on the prompt added, so that without an ablation its
    logits are the model's own.

    Args:
        model: the model the graph is of.
        layers: the layers it was made with, by block.
        graph: pruned or not.
        n: experts, those with the largest predicted effects.

    Raises:
        ValueError: the graph has fewer than two experts.
    """
    experts = graph.of_kind("expert")
    if len(experts) < 2:
        raise ValueError(f"The graph has {len(experts)} experts; a correlation needs at least two.")
    predicted = -graph.effects_on_logits()[0, experts]
    strongest = predicted.abs().topk(min(n, len(experts))).indices
    nodes = [graph.nodes[int(i)] for i in experts[strongest]]
    tokens = torch.tensor(graph.token_ids, device=model.cfg.device)
    frozen = FrozenModel(model, layers, tokens)
    with ExitStack() as stack:
        for block in frozen.layers:
            hook_in, hook_out = frozen.input_names[block], frozen.output_names[block]
            edited = _without(frozen, block, nodes)
            stack.enter_context(Replaced(model, hook_in, hook_out, edited))
        logits = model(tokens.expand(len(nodes) + 1, -1))[:, -1]
    centred = logits - logits.mean(-1, keepdim=True)
    logit = graph.nodes[int(graph.of_kind("logit")[0])]
    measured = (centred[1:, logit.index] - centred[0, logit.index]).double().cpu()
    chosen = predicted[strongest].double()
    return GraphValidation(
        [
            AblatedNode(node, logit.text, p, m)
            for node, p, m in zip(nodes, chosen.tolist(), measured.tolist(), strict=True)
        ],
        float(pearsonr(chosen, measured).statistic),
        float(spearmanr(chosen, measured).statistic),
    )


def _without(frozen: FrozenModel, block: int, nodes: list[Node]) -> Replacement:
    """The layer of a block with its error; in copy i + 1 of the prompt, node i is ablated."""
    sae, covered, error = frozen.layers[block], frozen.covered[block], frozen.errors[block]
    ablated = [(copy, node) for copy, node in enumerate(nodes, start=1) if node.block == block]

    def replacement(x: Tensor, y: Tensor) -> Tensor:
        parts = decompose(sae, x.flatten(0, 1))
        coefficients = parts.coefficients.clone()
        for copy, node in ablated:
            row = copy * x.shape[1] + node.position
            coefficients[row] = coefficients[row].masked_fill(parts.experts[row].eq(node.index or 0), 0)
        y_hat = parts.with_coefficients(coefficients).y.view_as(y).to(y) + error
        return torch.where(covered[:, None], y_hat, y)

    return replacement

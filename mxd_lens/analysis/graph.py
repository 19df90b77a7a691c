"""Attribution graphs: how tokens, experts and errors add up to a model's next-token logits.

Nodes are the token embeddings, the active experts (features) of the layers that replace the MLPs, the errors
of these layers, and the logits. An edge is a direct effect, with attention patterns, norm scales and gates
held fixed (`frozen`). Into an expert n of token t

    gate edges      g_s, sum_s g_s + constant = g_n . x + b_n = a_n
    branch edges    h_s, sum_s h_s + constant = a_n         only where what n writes depends on x

The branch edges are the effects on the length of what expert n writes, ||u_n|| with u_n = c_n * (D^T z) for
an MxD, phi's slope in z held at phi(pre) / pre; they are given in units of a_n, scaled by a_n / ||u_n||. What
n writes, a_n u_n, is the product of both, so that a relative change of it is the sum of the two relative
changes. Edge weights are the mean of both kinds, and of a transcoder's feature its gate edges alone.

Scores and pruning are those of circuit-tracer (Ameisen et al., "Circuit Tracing", 2025): influence is the
share of a node in the paths to the logits, with |edges| normalised per target.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.frozen import FrozenModel
from mxd_lens.analysis.prompt import one_prompt
from mxd_lens.artifacts.files import atomic_files, write_json
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.hooks.site import block_of_layer
from mxd_lens.sparse.coefficients import Active

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative errors of the sum of edges beyond which the model was not affine."""


@dataclass(frozen=True, order=False)
class Node:
    """One node of an attribution graph."""

    kind: str
    """token, expert, error, or logit."""
    block: int | None
    """Which block's layer; None for tokens and logits."""
    position: int
    """At which token of the prompt."""
    index: int | None
    """The expert's id, or the token's; None for an error."""
    activation: float
    """a_n of an expert; of a logit its value less the mean logit, before a bias of the unembedding and a soft
    cap; for tokens and errors 1."""
    text: str
    """What it is called: the token's text, or "expert 17 of block 3"."""


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph(Tabular):
    """What `attribution_graph` found. Rows of the edges are targets, columns sources.

    Nodes are ordered: tokens, then block by block experts and errors, then logits.
    """

    nodes: list[Node]
    """All nodes."""
    gate: Float[Tensor, "nodes nodes"]
    """Effects on each expert's pre-activation, and on each logit above the mean logit. 0 elsewhere."""
    branch: Float[Tensor, "nodes nodes"]
    """Effects through what an expert writes, in units of its coefficient. 0 where that is fixed."""
    has_branch: Bool[Tensor, " nodes"]
    """Of which experts what they write depends on the token."""
    constant: Float[Tensor, " nodes"]
    """What biases add to each pre-activation and each logit."""
    left_out: Float[Tensor, " nodes"]
    """The effect on it of all the experts that are no nodes."""
    probabilities: Float[Tensor, " logits"]
    """The model's probabilities of the logits' tokens."""
    prompt: list[str]
    """The prompt's tokens."""
    token_ids: list[int]
    """Their ids."""
    model_name: str
    """The language model."""
    n_active: int
    """Experts that are active on the prompt, all tokens and layers together."""

    @property
    def edges(self) -> Float[Tensor, "nodes nodes"]:
        """The weights: the mean of gate and branch edges where there are both."""
        return torch.where(self.has_branch[:, None], (self.gate + self.branch) / 2, self.gate)

    def of_kind(self, *kinds: str) -> Int[Tensor, " n"]:
        """The indices of the nodes of some kinds."""
        return torch.tensor([i for i, node in enumerate(self.nodes) if node.kind in kinds], dtype=torch.long)

    @property
    def activations(self) -> Float[Tensor, " nodes"]:
        return torch.tensor([node.activation for node in self.nodes], dtype=self.gate.dtype)

    @property
    def gate_share(self) -> Float[Tensor, " nodes"]:
        """Of the effects into each node, by magnitude, the share that comes through its gate."""
        gate, branch = self.gate.abs().sum(1), self.branch.abs().sum(1)
        return torch.where(gate + branch > 0, gate / (gate + branch), torch.nan)

    @property
    def influence(self) -> Float[Tensor, " nodes"]:
        """Each node's share in the paths to the logits, weighted by their probabilities."""
        return influence(self.edges, self._logit_weights)

    @property
    def _logit_weights(self) -> Float[Tensor, " nodes"]:
        weights = self.gate.new_zeros(len(self.nodes))
        weights[self.of_kind("logit")] = self.probabilities.to(weights)
        return weights

    @property
    def replacement_score(self) -> float:
        """Of the influence that reaches back to tokens and errors, the share of the tokens."""
        found = self.influence
        tokens, errors = (found[self.of_kind(kind)].sum() for kind in ("token", "error"))
        return (tokens / (tokens + errors)).item()

    @property
    def completeness_score(self) -> float:
        """The mean share of a node's input that comes from no error, weighted by the nodes' influence."""
        normalised = _normalised(self.edges)
        explained = 1 - normalised[:, self.of_kind("error")].sum(1)
        weight = self.influence + self._logit_weights
        return ((explained * weight).sum() / weight.sum()).item()

    def pruned(self, node_share: float = 0.8, edge_share: float = 0.98) -> "AttributionGraph":
        """The nodes that carry this share of the influence, and their edges that carry this share of it.

        Tokens and logits stay. An expert that no edge enters or leaves goes too.
        """
        for name, share in (("node_share", node_share), ("edge_share", edge_share)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}.")
        fixed = torch.zeros(len(self.nodes), dtype=torch.bool)
        fixed[self.of_kind("token", "logit")] = True
        kept = fixed | _covering(self.influence, node_share)
        edges = self.edges * (kept[:, None] & kept)
        flow = _normalised(edges) * (influence(edges, self._logit_weights) + self._logit_weights)[:, None]
        kept_edges = _covering(flow.flatten(), edge_share).view_as(flow) & (flow > 0)
        while True:  # an expert that lost its last edge takes its other ones with it
            inner = ~fixed & kept
            idle = inner & ~kept_edges.any(0)
            experts = torch.tensor([node.kind == "expert" for node in self.nodes])
            idle |= inner & experts & ~kept_edges.any(1)
            if not idle.any():
                break
            kept &= ~idle
            kept_edges &= kept[:, None] & kept
        return self._selected(kept, kept_edges)

    def _selected(
        self, kept: Bool[Tensor, " nodes"], edges: Bool[Tensor, "nodes nodes"]
    ) -> "AttributionGraph":
        at = kept.nonzero().flatten()
        gone = (self.gate * ~edges).sum(1) + self.left_out
        return AttributionGraph(
            [self.nodes[i] for i in at.tolist()],
            (self.gate * edges)[at][:, at],
            (self.branch * edges)[at][:, at],
            self.has_branch[at],
            self.constant[at],
            gone[at],
            self.probabilities,
            self.prompt,
            self.token_ids,
            self.model_name,
            self.n_active,
        )

    def effects_on_logits(self) -> Float[Tensor, "logits nodes"]:
        """The change of each logit, relative to the mean logit, per relative change of what a node writes.

        Along every path, gates and branches changed to first order and none switched on or off: minus this
        is what ablating a node is predicted to do.
        """
        relative = torch.where(self.has_branch[:, None], self.gate + self.branch, self.gate)
        logits = self.of_kind("logit")
        experts = self.of_kind("expert")
        per_change = torch.zeros_like(relative)
        per_change[experts] = relative[experts] / self.activations[experts, None]
        # effects = logit edges (1 + M + M^2 + ...); M has no cycle, so that the sum is finite.
        identity = torch.eye(len(self.nodes), dtype=relative.dtype)
        return torch.linalg.solve(identity - per_change, self.gate[logits], left=False)

    @property
    def title(self) -> str:
        prompt = "".join(self.prompt)
        return (
            f"{prompt!r}: {len(self.nodes)} nodes, {int((self.edges != 0).sum()):,} edges; replacement "
            f"{self.replacement_score:.3f}, completeness {self.completeness_score:.3f}"
        )

    @property
    def columns(self) -> list[str]:
        return ["node", "token", "activation", "influence", "gate share"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        found, shares = self.influence, self.gate_share
        for i in found.argsort(descending=True)[:20].tolist():
            node = self.nodes[i]
            where = f"{node.position} {self.prompt[node.position]}"
            share = shares[i].item() if self.has_branch[i] else None
            yield [node.text, where, node.activation, found[i].item(), share]

    def save(self, folder: str | Path) -> None:
        """Writes graph.json and graph.safetensors into a folder."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        facts = {name: getattr(self, name) for name in ("prompt", "token_ids", "model_name", "n_active")}
        facts["nodes"] = [asdict(node) for node in self.nodes]
        with atomic_files(folder, last="graph.json") as partial:
            save_file(tensors, partial / "graph.safetensors")
            write_json(partial / "graph.json", facts)

    @classmethod
    def load(cls, folder: str | Path) -> "AttributionGraph":
        """Reads a graph that `save` wrote."""
        facts = json.loads((Path(folder) / "graph.json").read_text(encoding="utf-8"))
        nodes = [Node(**node) for node in facts.pop("nodes")]
        tensors: dict[str, Any] = dict(load_file(Path(folder) / "graph.safetensors"))
        return cls(nodes=nodes, **tensors, **facts)


TENSORS = ("gate", "branch", "has_branch", "constant", "left_out", "probabilities")


def attribution_graph(
    model: Any,
    layers: Mapping[int, SAE[Any]] | Iterable[SAE[Any]],
    prompt: str | Int[Tensor, " positions"],
    max_experts: int = 1000,
    max_logits: int = 10,
    logit_share: float = 0.95,
    batch_size: int = 64,
    progress: bool = True,
) -> AttributionGraph:
    """The graph from a prompt's tokens, through experts, to the logits after its last token.

        graph = attribution_graph(model, [layer_0, layer_1, ...], "The capital of France is").pruned()

    Args:
        model: any hooked model, with nothing attached; float32 or float64.
        layers: layers that replace MLPs, at most one per block. The MLP of a block without one is an error
            node.
        prompt: text or token ids.
        max_experts: experts that become nodes, those with the most influence. The effects of the others are
            in `left_out`.
        max_logits: logits at most.
        logit_share: the probability that the logits are to cover.
        batch_size: effects computed in one backward pass.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a layer does not fit the model, two are of one block, the model's weights are of half
            precision, or it cannot be made affine (see `FrozenModel`).
    """
    named = layers if isinstance(layers, Mapping) else _by_block(layers)
    dtype = next(model.parameters()).dtype
    if dtype not in TOLERANCE:
        raise ValueError(
            f"The model's weights are {dtype}: effects do not add up in half precision. Load it with "
            "dtype='float32'."
        )
    tokens = one_prompt(model, prompt)
    frozen = FrozenModel(model, named, tokens)
    sources = Sources(frozen)
    effects = Effects(frozen, sources, batch_size)
    probabilities = frozen.logits[-1].float().softmax(-1)
    top = probabilities.topk(min(max_logits, len(probabilities)))
    n_logits = 1 + int((top.values.cumsum(0)[:-1] < logit_share).sum())
    ids = top.indices[:n_logits]
    logit_rows = effects.on_logits(ids)

    chosen: list[int] = []
    rows = Rows(len(sources), logit_rows.gate.dtype)
    budget = min(max_experts, sources.n_experts)
    with tqdm(total=budget, desc="Attribution graph", unit="expert", disable=not progress) as bar:
        while len(chosen) < budget:
            found = rows.influence(logit_rows.gate, top.values[:n_logits])[: sources.n_experts].clone()
            found[chosen] = -1
            now = found.topk(min(batch_size, budget - len(chosen))).indices.tolist()
            rows.add(now, effects.on_experts(now))
            chosen += now
            bar.update(len(now))
    return _graph(model, frozen, sources, sorted(chosen), rows, ids, top.values[:n_logits], logit_rows)


def _by_block(layers: Iterable[SAE[Any]]) -> dict[int, SAE[Any]]:
    named: dict[int, SAE[Any]] = {}
    for sae in layers:
        if (block := block_of_layer(sae)) in named:
            raise ValueError(f"Two layers are given for block {block}: give one for each block.")
        named[block] = sae
    return named


class Sources:
    """Whatever can be the source of an effect: active experts first, then tokens, then errors."""

    def __init__(self, frozen: FrozenModel) -> None:
        self.positions = len(frozen.tokens)
        self.n_blocks = len(frozen.errors)
        block: list[int] = []
        position: list[int] = []
        expert: list[int] = []
        activation: list[float] = []
        self.vectors: dict[int, Tensor] = {}
        self.slices: dict[int, slice] = {}
        for at, parts in frozen.parts.items():
            token_of, experts, a = parts.fired
            covered = frozen.covered[at].to(token_of.device)[token_of]
            token_of, experts, a = token_of[covered], experts[covered], a[covered]
            self.slices[at] = slice(len(block), len(block) + len(a))
            self.vectors[at] = a[:, None] * parts.written_by(token_of, experts)
            block += [at] * len(a)
            position += token_of.tolist()
            expert += experts.tolist()
            activation += a.tolist()
        self.block, self.position, self.expert, self.activation = block, position, expert, activation
        self.embedding, self.errors = frozen.embedding, frozen.errors

    @property
    def n_experts(self) -> int:
        return len(self.expert)

    def __len__(self) -> int:
        return self.n_experts + self.positions * (1 + self.n_blocks)

    def effects(
        self, embedding: Float[Tensor, "batch positions d"], written: list[Float[Tensor, "batch positions d"]]
    ) -> Float[Tensor, "batch sources"]:
        """The effect of every source, from the gradients at the embeddings and at what each block writes."""
        batch = len(embedding)
        of_experts = embedding.new_zeros(batch, self.n_experts)
        for at, span in self.slices.items():
            positions = torch.tensor(self.position[span], device=embedding.device, dtype=torch.long)
            at_source = written[at][:, positions]
            of_experts[:, span] = (at_source * self.vectors[at].to(at_source)).sum(-1)
        errors = [(w * e.to(w)).sum(-1) for w, e in zip(written, self.errors, strict=True)]
        return torch.cat([of_experts, (embedding * self.embedding).sum(-1), *errors], dim=1)


class EffectRows(NamedTuple):
    """The effects on some targets."""

    gate: Float[Tensor, "targets sources"]
    branch: Float[Tensor, "targets sources"]
    constant: Float[Tensor, " targets"]


class Effects:
    """The effects of all sources on targets: backward passes through the frozen model, checked to add up."""

    def __init__(self, frozen: FrozenModel, sources: Sources, batch_size: int) -> None:
        self.frozen, self.sources, self.batch_size = frozen, sources, batch_size
        self.dtype = next(frozen.model.parameters()).dtype
        with torch.no_grad():
            zeros = torch.zeros_like(frozen.embedding)[None]
            self._constants = frozen.run(zeros, [zeros] * len(frozen.errors))

    def _gradients(self, reading: Any, n: int) -> Float[Tensor, "n sources"]:
        """The effects on reading(readings) [n], one target in each copy of the prompt."""
        frozen = self.frozen
        with torch.enable_grad():
            leaves = [
                value.detach().expand(n, -1, -1).clone().requires_grad_()
                for value in (frozen.embedding, *self._written())
            ]
            value = reading(frozen.run(leaves[0], leaves[1:]))
            found = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
        return self.sources.effects(found[0], list(found[1:]))

    def _written(self) -> list[Tensor]:
        frozen = self.frozen
        written = []
        for block, y in enumerate(frozen.mlp_out):
            if block not in frozen.parts:
                written.append(y)
                continue
            rest = frozen.parts[block].rest.to(y)
            written.append(y - torch.where(frozen.covered[block][:, None], rest, 0))
        return written

    def on_logits(self, ids: Int[Tensor, " n"]) -> EffectRows:
        """The effects on logits at the last token, each less the mean logit."""
        unembed = self.frozen.model.W_U
        directions = (unembed[:, ids] - unembed.mean(1, keepdim=True)).T

        def read(readings: Any) -> Tensor:
            return (readings.final[:, -1] * directions.to(readings.final)).sum(-1)

        gate = self._gradients(read, len(ids))
        constant = read(self._constants)
        self._check(gate, constant, (self.frozen.final[-1] * directions).sum(-1), "a logit")
        return EffectRows(gate, torch.zeros_like(gate), constant)

    def on_experts(self, targets: list[int]) -> EffectRows:
        """The effects on some experts, by their number among the sources."""
        by_block: dict[int, list[int]] = {}
        for i, target in enumerate(targets):
            by_block.setdefault(self.sources.block[target], []).append(i)
        n = len(self.sources)
        gate, branch = (self.frozen.embedding.new_zeros(len(targets), n) for _ in range(2))
        constant = self.frozen.embedding.new_zeros(len(targets))
        for block, at in by_block.items():
            rows = self._on_experts_of(block, [targets[i] for i in at])
            gate[at], branch[at], constant[at] = rows.gate, rows.branch, rows.constant
        return EffectRows(gate, branch, constant)

    def _on_experts_of(self, block: int, targets: list[int]) -> EffectRows:
        frozen, sources = self.frozen, self.sources
        sae, parts = frozen.layers[block], frozen.parts[block]
        device = frozen.embedding.device
        positions = torch.tensor([sources.position[i] for i in targets], device=device)
        experts = torch.tensor([sources.expert[i] for i in targets], device=device)
        a = torch.tensor([sources.activation[i] for i in targets], device=device, dtype=self.dtype)
        copies = torch.arange(len(targets), device=device)

        def inputs(readings: Any) -> Tensor:
            x = readings.inputs[block]
            return x[copies if len(x) > 1 else 0, positions]

        encoder = sae.W_enc[:, experts.to(sae.W_enc.device)].T

        def pre(readings: Any) -> Tensor:
            return (inputs(readings).to(encoder) * encoder).sum(-1)

        gate = self._gradients(pre, len(targets))
        bias = sae.b_enc[experts.to(sae.b_enc.device)]
        if sae.cfg.apply_b_dec_to_input:
            bias = bias - encoder @ sae.b_dec
        constant = (pre(self._constants) + bias).to(a)
        self._check(gate, constant, a, f"the pre-activations of block {block}")
        branch = torch.zeros_like(gate)
        if not parts.layer.writes_directions:
            written = parts.written_by(positions, experts)
            length = written.norm(dim=-1)
            along = written / length[:, None]
            one = Active(torch.ones_like(a)[:, None].to(along), experts[:, None], sae.cfg.d_sae)
            mixture = parts.layer.mixture(one).detach()
            at = frozen.inputs[block][positions].to(sae.W_enc)

            def writes(readings: Any) -> Tensor:
                s = parts.layer.linear_expert_input(inputs(readings).to(sae.W_enc), at)
                return (parts.layer.experts_out(mixture, s) * along).sum(-1)

            branch = self._gradients(writes, len(targets))
            self._check(
                branch, writes(self._constants).to(a), length.to(a), f"what experts of block {block} write"
            )
            branch = branch * (a / length.to(a))[:, None]
        return EffectRows(gate, branch, constant.detach())

    def _check(self, effects: Tensor, constant: Tensor, value: Tensor, of: str) -> None:
        """Raises ValueError where effects and constant do not sum to the value."""
        total = effects.sum(1) + constant
        size = effects.abs().sum(1) + constant.abs() + value.abs()
        error = ((total - value).abs() / size.clamp_min(1e-30)).max().item()
        if not error < TOLERANCE[self.dtype]:
            raise ValueError(
                f"The effects on {of} do not add up (relative error {error:.1e}): with attention patterns "
                f"and norm scales held fixed, "
                f"{self.frozen.model.cfg.model_name} is not affine between its MLPs."
            )


class Rows:
    """The effects on the experts reached so far."""

    def __init__(self, n_sources: int, dtype: torch.dtype) -> None:
        self.n_sources = n_sources
        self.gate, self.branch = (torch.zeros(0, n_sources, dtype=dtype) for _ in range(2))
        self.constant = torch.zeros(0, dtype=dtype)
        self.targets: list[int] = []

    def add(self, targets: list[int], rows: EffectRows) -> None:
        self.targets += targets
        self.gate = torch.cat([self.gate, rows.gate.cpu()])
        self.branch = torch.cat([self.branch, rows.branch.cpu()])
        self.constant = torch.cat([self.constant, rows.constant.cpu()])

    def influence(
        self, logits: Float[Tensor, "logits sources"], probabilities: Float[Tensor, " logits"]
    ) -> Float[Tensor, " sources"]:
        """The influence of every source on the logits, along the experts reached so far."""
        both = (self.branch != 0).any(1, keepdim=True)
        normalised = _normalised(torch.where(both, (self.gate + self.branch) / 2, self.gate))
        flow = probabilities.to(logits).cpu() @ _normalised(logits.cpu())
        total = flow
        while self.targets and flow[self.targets].any():
            flow = flow[self.targets] @ normalised
            total = total + flow
        return total


def _normalised(edges: Float[Tensor, "targets sources"]) -> Float[Tensor, "targets sources"]:
    """|edges|, those into a target summing to 1."""
    size = edges.abs()
    return size / size.sum(1, keepdim=True).clamp_min(1e-30)


def influence(
    edges: Float[Tensor, "nodes nodes"], weights: Float[Tensor, " nodes"]
) -> Float[Tensor, " nodes"]:
    """weights (A + A^2 + ...), A the normalised |edges|: each node's share in the paths to the targets."""
    normalised = _normalised(edges)
    flow = weights @ normalised
    total = torch.zeros_like(flow)
    while flow.any():
        total = total + flow
        flow = flow @ normalised
    return total


def _covering(values: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """The largest values that together are this share of the sum."""
    order = values.argsort(descending=True)
    cumulative = values[order].cumsum(0)
    n = 1 + int((cumulative[:-1] < share * cumulative[-1]).sum())
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[order[:n]] = True
    return kept & (values > 0)


def _graph(
    model: Any,
    frozen: FrozenModel,
    sources: Sources,
    chosen: list[int],
    rows: Rows,
    logit_ids: Int[Tensor, " logits"],
    probabilities: Float[Tensor, " logits"],
    logit_rows: EffectRows,
) -> AttributionGraph:
    """The nodes and edges, in order: tokens, block by block experts and errors, logits."""
    prompt = [model.tokenizer.decode([t]) for t in frozen.tokens.tolist()]
    P, n_experts = sources.positions, sources.n_experts
    nodes: list[Node] = []
    source_of: list[int] = []
    for p, text in enumerate(prompt):
        nodes.append(Node("token", None, p, int(frozen.tokens[p]), 1.0, text))
        source_of.append(n_experts + p)
    for block in range(sources.n_blocks):
        for i in chosen:
            if sources.block[i] == block:
                n = sources.expert[i]
                name = f"expert {n} of block {block}"
                nodes.append(Node("expert", block, sources.position[i], n, sources.activation[i], name))
                source_of.append(i)
        what = "error" if block in frozen.parts else "MLP"
        for p in range(P):
            if frozen.errors[block][p].any():
                nodes.append(Node("error", block, p, None, 1.0, f"{what} of block {block}"))
                source_of.append(n_experts + P * (1 + block) + p)
    n_sources = len(nodes)
    values = (logit_rows.gate.sum(1) + logit_rows.constant).tolist()
    for token, value in zip(logit_ids.tolist(), values, strict=True):
        nodes.append(Node("logit", None, P - 1, token, value, model.tokenizer.decode([token])))
    dtype = rows.gate.dtype
    gate, branch = (torch.zeros(len(nodes), len(nodes), dtype=dtype) for _ in range(2))
    constant, left_out = (torch.zeros(len(nodes), dtype=dtype) for _ in range(2))
    row_of = {target: row for row, target in enumerate(rows.targets)}
    kept = torch.zeros(len(sources), dtype=torch.bool)
    kept[source_of] = True
    for i, source in enumerate(source_of):
        if (row := row_of.get(source)) is not None:
            gate[i, :n_sources] = rows.gate[row, source_of]
            branch[i, :n_sources] = rows.branch[row, source_of]
            constant[i] = rows.constant[row]
            left_out[i] = rows.gate[row, ~kept].sum()
    logit_gate = logit_rows.gate.cpu()
    gate[n_sources:, :n_sources] = logit_gate[:, source_of]
    constant[n_sources:] = logit_rows.constant.detach().cpu()
    left_out[n_sources:] = logit_gate[:, ~kept].sum(1)
    return AttributionGraph(
        nodes,
        gate,
        branch,
        (branch != 0).any(1),
        constant,
        left_out,
        probabilities.cpu().to(dtype),
        prompt,
        frozen.tokens.tolist(),
        model.cfg.model_name,
        n_experts,
    )

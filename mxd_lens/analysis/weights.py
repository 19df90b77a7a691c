"""What one expert is: its weights and rank, its direction in words, and what it resembles.

How experts are used on a text is in `statistics`; which fire on a prompt, in `reading`. An expert's mean
direction, which the logit lens and the neurons are asked about, is `ExpertStatistics.mean_direction`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import expert_directions, expert_ids
from mxd_lens.analysis.statistics import ExpertStatistics
from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.hooks.site import hook_names

BLOCK = 256
"""Experts compared at once, each with all others."""

Experts = int | Iterable[int] | Int[Tensor, " n"]


# The weights


@dataclass(frozen=True)
class Spectrum(Tabular):
    """The singular values of experts' maps W_n, from `spectrum`."""

    experts: Int[Tensor, " n"]
    """Which experts."""
    singular_values: Float[Tensor, "n r"]
    """Of each W_n, largest first; r = min(d_hidden, d_out) for an MxD, 1 for a transcoder."""
    rank: Int[Tensor, " n"]
    """How many exceed max(d_hidden, d_out) * eps * the largest, numpy's rule, eps that of the weights'
    dtype."""
    effective_rank: Float[Tensor, " n"]
    """(sum s^2)^2 / sum s^4: as many equal singular values would be as evenly spread."""

    @property
    def title(self) -> str:
        return "The singular values of each expert's map W_n"

    @property
    def columns(self) -> list[str]:
        return ["expert", "rank", "effective rank", "largest", "median", "smallest"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for i, n in enumerate(self.experts.tolist()):
            s = self.singular_values[i]
            values = (self.effective_rank[i], s[0], s.median(), s[-1])
            yield [n, int(self.rank[i]), *(v.item() for v in values)]


@torch.no_grad()
def spectrum(
    sae: SAE[Any], experts: Experts | None = None, batch_size: int = 16, progress: bool = True
) -> Spectrum:
    """The singular values and the rank of experts' linear maps from z to the output.

    For an MxD, W_n = D diag(c_n) with D = Q R, and the singular values of W_n are those of R diag(c_n),
    which is no larger than [d_out, d_out]: D is taken apart once, and no [d_hidden, d_out] matrix is made
    for an expert. The rank of W_n is that of D wherever no entry of c_n is zero: experts are of full rank.

    A transcoder's feature writes a_n c_n, whatever the token: as a map from its coefficient it is the one
    row c_n, of rank 1 and singular value ||c_n||. So does an expert of a layer that is neither, where v is 1.

    Args:
        sae: the layer.
        experts: which; None for all, of which each costs a singular value decomposition.
        batch_size: experts taken apart at once.
        progress: whether to show a progress bar.

    Raises:
        IndexError: there is no such expert.
    """
    ids = expert_ids(sae, experts)
    directions = expert_directions(sae)
    if isinstance(sae, PairedTranscoder):
        batches = tqdm(ids.split(batch_size), desc="Singular values", disable=not progress)
        values = torch.cat(list(sae.singular_values(batches)))
        shape = sae.expert_weight(0).shape
    else:
        values = directions[ids].double().norm(dim=-1, keepdim=True)
        shape = torch.Size([1, directions.shape[1]])
    squares = values**2
    threshold = max(shape) * torch.finfo(directions.dtype).eps * values[:, :1]
    return Spectrum(
        experts=ids.cpu(),
        singular_values=values.cpu(),
        rank=((values > threshold) & (values > 0)).sum(-1).cpu(),
        effective_rank=(squares.sum(-1) ** 2 / (squares**2).sum(-1)).cpu(),
    )


@torch.no_grad()
def mean_gate_share(sae: SAE[Any], statistics: ExpertStatistics) -> Float[Tensor, " d_sae"]:
    """The share of each c_n's squared length that lies along the mean gate m = mean over tokens of C^T a.

        (c_n . m)^2 / (||c_n||^2 ||m||^2)

    An MxD's output is (C^T a) * (D^T z) + b. With m in the place of C^T a the layer is dense and the same
    for every token: what an expert adds along m only scales that common part up or down. A share near 1
    says that the expert does little else; near 0, that what it does is its own. For a transcoder m is the
    mean of what the features write, and the share is how much of a feature points along it.

    Raises:
        ValueError: the statistics are of another layer.
    """
    statistics.check_is_of(sae)
    c = expert_directions(sae).double()
    m = F.normalize(statistics.mean_mixture.to(c), dim=0)
    return ((c @ m) ** 2 / c.pow(2).sum(-1)).cpu()


# What experts resemble


@dataclass(frozen=True)
class Neighbours(Tabular):
    """The experts most similar to some."""

    experts: Int[Tensor, " n"]
    """Whose neighbours."""
    neighbours: Int[Tensor, "n k"]
    """Most similar first; the expert itself is left out."""
    similarities: Float[Tensor, "n k"]
    """How similar."""
    measure: str
    """What was compared."""

    @property
    def title(self) -> str:
        return f"Nearest experts by {self.measure}"

    @property
    def columns(self) -> list[str]:
        return ["expert", "rank", "neighbour", self.measure]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for n, ids, values in zip(
            self.experts.tolist(), self.neighbours.tolist(), self.similarities.tolist(), strict=True
        ):
            for rank, (other, value) in enumerate(zip(ids, values, strict=True), start=1):
                yield [n, rank, other, value]


@torch.no_grad()
def similar_experts(
    sae: SAE[Any], experts: Experts | None = None, by: Literal["decoder", "gate"] = "decoder", k: int = 10
) -> Neighbours:
    """The experts whose weights point the same way, by the cosine.

    Args:
        sae: the layer.
        experts: whose neighbours; None for all. They are compared in blocks, and no [d_sae, d_sae] matrix
            is made.
        by: "decoder", the rows c_n of W_dec: what they write; "gate", the columns of W_enc: when they fire.
        k: neighbours each.

    Raises:
        IndexError: there is no such expert.
        ValueError: `by` is neither, or there are not k others.
    """
    if by not in ("decoder", "gate"):
        raise ValueError(f"experts are similar by 'decoder' or 'gate', got {by!r}.")
    ids = expert_ids(sae, experts)
    unit = F.normalize(sae.W_dec if by == "decoder" else sae.W_enc.T, dim=-1)
    blocks = ((block, unit[block] @ unit.T) for block in ids.split(BLOCK))
    return _nearest(blocks, k, sae.cfg.d_sae, f"cosine of {'c_n' if by == 'decoder' else 'gates'}")


def coactive_experts(
    statistics: ExpertStatistics, by: Literal["jaccard", "correlation"] = "jaccard", k: int = 10
) -> Neighbours:
    """The experts that fire on the same tokens as each of the watched ones; see `coactivation`.

    Raises:
        ValueError: no expert is watched, `by` is neither, or there are not k others.
    """
    similarity = statistics.coactivation(by).nan_to_num(nan=-torch.inf)
    blocks = [(statistics.watched, similarity)]
    return _nearest(blocks, k, len(statistics.fired), f"{by} of firing")


def _nearest(
    blocks: Iterable[tuple[Int[Tensor, " n"], Float[Tensor, "n d_sae"]]], k: int, d_sae: int, measure: str
) -> Neighbours:
    if not 1 <= k < d_sae:
        raise ValueError(f"each of {d_sae} experts has 1 to {d_sae - 1} neighbours, not k = {k}.")
    found = []
    for ids, similarity in blocks:
        values, neighbours = similarity.scatter(1, ids[:, None], -torch.inf).topk(k)
        found.append((ids.cpu(), neighbours.cpu(), values.cpu()))
    ids, neighbours, values = (torch.cat(part) for part in zip(*found, strict=True))
    return Neighbours(ids, neighbours, values, measure)


# What a direction says in the model's own terms


@dataclass(frozen=True)
class LogitLens(Tabular):
    """The tokens that directions promote and suppress, from `logit_lens`."""

    names: list[str]
    """What the directions are of."""
    promoted: list[list[str]]
    """For each direction the tokens with the largest logits, largest first."""
    promoted_logits: Float[Tensor, "n k"]
    """Their logits, less the mean over the vocabulary."""
    suppressed: list[list[str]]
    """The tokens with the smallest, smallest first."""
    suppressed_logits: Float[Tensor, "n k"]
    """Their logits, less the mean over the vocabulary."""

    @property
    def title(self) -> str:
        return "Logit lens: logits before the final norm's division, less their mean over the vocabulary"

    @property
    def columns(self) -> list[str]:
        return ["of", "rank", "promoted", "logit, promoted", "suppressed", "logit, suppressed"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for i, name in enumerate(self.names):
            for j, (up, down) in enumerate(zip(self.promoted[i], self.suppressed[i], strict=True)):
                up_logit, down_logit = self.promoted_logits[i, j].item(), self.suppressed_logits[i, j].item()
                yield [name, j + 1, up, up_logit, down, down_logit]


@torch.no_grad()
def logit_lens(
    model: Any,
    directions: Float[Tensor, "n d_model"] | Float[Tensor, " d_model"],
    k: int = 10,
    names: Sequence[Any] | None = None,
) -> LogitLens:
    """The tokens that directions in the residual stream promote and suppress most.

        logit_lens(model, statistics.mean_direction([5, 17]), names=[5, 17])

    See `direction_logits` for what is done about the final norm. Logits are given less their mean over
    the vocabulary, which changes no probability.

    Args:
        model: any hooked model.
        directions: one, or a row each.
        k: tokens on either side.
        names: what the rows are of, for the table; None numbers them.

    Raises:
        ValueError: the directions are not of the residual stream's width or not finite, or the names do
            not fit.
    """
    directions = directions.reshape(-1, directions.shape[-1])
    if not directions.isfinite().all():
        raise ValueError("a direction is not finite: an expert that never fired has no mean direction.")
    labels = [str(name) for name in (range(len(directions)) if names is None else names)]
    if len(labels) != len(directions):
        raise ValueError(f"there are {len(directions)} directions and {len(labels)} names.")
    (up, promoted), (down, suppressed) = extreme_logits(model, directions, k)
    words = [
        [[model.tokenizer.decode([t]) for t in row] for row in ids.tolist()] for ids in (promoted, suppressed)
    ]
    return LogitLens(labels, words[0], up, words[1], down)


@torch.no_grad()
def extreme_logits(
    model: Any, directions: Float[Tensor, "n d_model"], k: int
) -> tuple[tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]], tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]]:
    """The largest logits of each direction with their token ids, largest first, and the smallest likewise.

    See `direction_logits`; less the mean over the vocabulary. No [n, d_vocab] matrix is made.
    """
    sides: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for block in directions.split(BLOCK):
        logits = direction_logits(model, block)
        logits = logits - logits.mean(-1, keepdim=True)
        for largest, found in sides.items():
            values, tokens = logits.topk(k, largest=largest)
            found.append((values.cpu(), tokens.cpu()))
    up, down = (
        (torch.cat([values for values, _ in found]), torch.cat([tokens for _, tokens in found]))
        for found in sides.values()
    )
    return up, down


@torch.no_grad()
def direction_logits(model: Any, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """What a step along each direction adds to the logits, the final norm's scale held fixed: (w * d) W_U.

    The final norm makes w * r / rms(r) of the residual stream r (a layer norm subtracts the mean of r
    first, and then so does this). Its weight w is applied; its division is not, because the scale is
    another at every token: divide by rms(r) for a given token's logits. The norm's and the unembedding's
    biases add the same to every direction and are left out, as is a soft cap on the logits.

    Raises:
        ValueError: the directions are not of the residual stream's width.
    """
    W_U = model.W_U
    if directions.shape[-1] != len(W_U):
        raise ValueError(
            f"expected directions [..., d_model = {len(W_U)}], got {tuple(directions.shape)}: only a layer "
            "that writes into the residual stream has a logit lens."
        )
    return read_norm(model.ln_final, W_U).before_scale(directions.to(W_U)) @ W_U


class Norm(NamedTuple):
    """A layer norm or RMS norm: weight * (r [- mean r]) / scale(r) + bias."""

    weight: Float[Tensor, " d_model"]
    """Ones where it has been folded into what follows."""
    bias: Float[Tensor, " d_model"]
    """Zeros for an RMS norm."""
    centres: bool
    """Whether the mean is subtracted, as in a layer norm."""

    def before_scale(self, r: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """weight * (r [- mean r]): linear in r, as is the norm itself where its scale is held fixed."""
        return self.weight * (r - r.mean(-1, keepdim=True) if self.centres else r)


@torch.no_grad()
def read_norm(norm: Callable[[Tensor], Tensor], like: Float[Tensor, "d_model *other"]) -> Norm:
    """What a norm of a model does, found by doing it.

    To a vector of zero mean and unit root mean square, to its negative, and to the vector with 1 added: each
    library, and each family of models, keeps the weight in a form of its own (folded away; less 1; under
    another name). Right to the norm's epsilon, 1e-5 or less of the weight.

    Args:
        norm: the norm's module.
        like: a tensor as long as the residual stream is wide, of the model's dtype and device.
    """
    probe = torch.ones(len(like), dtype=like.dtype, device=like.device)
    probe[1::2] = -1
    probe = probe - probe.mean()
    probe = probe / probe.pow(2).mean().sqrt()
    plus, minus, moved = (norm(v.view(1, 1, -1)).view(-1) for v in (probe, -probe, probe + 1))
    centres = bool((moved - plus).norm() < 0.01 * (plus - minus).norm())
    return Norm((plus - minus) / (2 * probe), (plus + minus) / 2, centres)


@dataclass(frozen=True)
class NearestNeurons(Tabular):
    """The MLP's own neurons that experts resemble, from `nearest_neurons`."""

    experts: Int[Tensor, " n"]
    """Which experts."""
    neurons: dict[str, Int[Tensor, "n k"]]
    """For each of the MLP's weights compared, the most similar neurons, by the magnitude of the cosine.
    "output": the expert's mean direction with rows of W_out; "input" and "gate": its column of W_enc with
    columns of W_in and of W_gate."""
    cosines: dict[str, Float[Tensor, "n k"]]
    """Their cosines."""

    @property
    def title(self) -> str:
        return "Nearest neurons of the MLP, by cosine of the weights"

    @property
    def columns(self) -> list[str]:
        return [
            "expert",
            "rank",
            *(name for weight in self.neurons for name in (weight, f"cosine, {weight}")),
        ]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        k = next(iter(self.neurons.values())).shape[1]
        for i, n in enumerate(self.experts.tolist()):
            for j in range(k):
                cells: list[Cell] = []
                for weight, ids in self.neurons.items():
                    cells += [int(ids[i, j]), self.cosines[weight][i, j].item()]
                yield [n, j + 1, *cells]


@torch.no_grad()
def nearest_neurons(
    model: Any, sae: SAE[Any], statistics: ExpertStatistics, experts: Experts, k: int = 5
) -> NearestNeurons:
    """The neurons of the MLP a layer replaces that its experts resemble.

    An expert is compared as a neuron is: what it writes, its mean direction, with a neuron's row of W_out;
    when it fires, its gate (its column of W_enc), with a neuron's columns of W_in and, in a gated MLP, of
    W_gate. The gate compares with those where the layer reads the MLP's input as it is (mlp.hook_in);
    ln2.hook_normalized is before the norm's weight, unless that is folded in.

    Args:
        model: any hooked model.
        sae: the layer.
        statistics: of its use on a text, for the mean directions.
        experts: which experts.
        k: neurons each, by the magnitude of the cosine.

    Raises:
        IndexError: there is no such expert.
        ValueError: the statistics are of another layer, or the model's MLP there is of other widths, or
            not made of W_in and W_out (a mixture of experts, as some models have).
    """
    statistics.check_is_of(sae)
    ids = expert_ids(sae, experts)
    direction, gate = statistics.mean_direction(ids), sae.W_enc.T[ids]
    mlp = mlp_weights(model, hook_names(sae)[1])
    neurons, cosines = {}, {}
    for name, weight in mlp.items():
        of_expert = direction if name == "output" else gate
        if weight.shape[1] != of_expert.shape[1]:
            raise ValueError(
                f"the MLP's {name} weights are {weight.shape[1]} wide, the layer's {of_expert.shape[1]}: is "
                "it of another model?"
            )
        cosine = F.normalize(of_expert.to(weight), dim=-1) @ F.normalize(weight, dim=-1).T
        neurons[name] = cosine.abs().nan_to_num(nan=-1).topk(min(k, len(weight))).indices.cpu()
        cosines[name] = cosine.cpu().gather(1, neurons[name])
    return NearestNeurons(ids.cpu(), neurons, cosines)


def mlp_weights(model: Any, hook_name_out: str) -> dict[str, Float[Tensor, "d_mlp width"]]:
    """A row a neuron of the MLP at a hook point: "output" (W_out), "input" (W_in), "gate" (W_gate, if any).

    Raises:
        ValueError: there is no such MLP.
    """
    layer = extract_layer_from_tlens_hook_name(hook_name_out)
    mlp = model.blocks[layer].mlp if layer is not None and layer < len(model.blocks) else None
    W_in, W_gate, W_out = (getattr(mlp, name, None) for name in ("W_in", "W_gate", "W_out"))
    if not (isinstance(W_in, Tensor) and isinstance(W_out, Tensor) and W_in.ndim == W_out.ndim == 2):
        raise ValueError(f"{model.cfg.model_name} has no MLP of neurons at {hook_name_out}.")
    weights = {"output": W_out, "input": W_in.T}
    return weights | ({"gate": W_gate.T} if isinstance(W_gate, Tensor) else {})

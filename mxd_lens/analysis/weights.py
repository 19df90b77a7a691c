"""What one expert is by its weights: its rank, and the experts and neurons it resembles.

How experts are used on a text is in `statistics`; which fire on a prompt, in `prompt`. An expert's mean
direction, which neurons are compared with, is `ExpertStatistics.mean_direction`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import decomposable, expert_directions, mixture_rows
from mxd_lens.analysis.statistics import ExpertStatistics
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.hooks.site import hook_names
from mxd_lens.models import model_first

BLOCK = 256
"""Experts compared at once, each with all others."""

Experts = int | Iterable[int] | Int[Tensor, " n"]


# The weights


@dataclass(frozen=True, repr=False)
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

    The architecture computes them (`PairedTranscoder.singular_values`). For an MxD the rank of W_n = D
    diag(c_n) is that of D wherever no entry of c_n is zero: experts are of full rank.

    A transcoder's feature writes a_n c_n, whatever the token: as a map from its coefficient it is the one
    row c_n, of rank 1 and singular value ||c_n||. So does an expert of a layer that is neither, where v is 1.

    Args:
        sae: the layer.
        experts: which; None for all, of which each costs a singular value decomposition.
        batch_size: experts in one decomposition.
        progress: whether to show a progress bar.

    Raises:
        IndexError: there is no such expert.
    """
    ids, layer = expert_ids(sae, experts), decomposable(sae)
    batches = tqdm(ids.split(batch_size), desc="Singular values", disable=not progress)
    values = torch.cat(list(layer.singular_values(batches)))
    shape = layer.expert_weight(0).shape
    squares = values**2
    threshold = max(shape) * torch.finfo(sae.W_dec.dtype).eps * values[:, :1]
    return Spectrum(
        experts=ids.cpu(),
        singular_values=values.cpu(),
        rank=((values > threshold) & (values > 0)).sum(-1).cpu(),
        effective_rank=(squares.sum(-1) ** 2 / (squares**2).sum(-1)).cpu(),
    )


@torch.no_grad()
def mean_gate_share(sae: SAE[Any], statistics: ExpertStatistics) -> Float[Tensor, " d_sae"]:
    """The share of each c_n's squared length that lies along the mean mixture m = mean over tokens of C^T a.

        (c_n . m)^2 / (||c_n||^2 ||m||^2)

    An MxD's output is (C^T a) * (D^T z) + b. With m in the place of C^T a ("mean gate") the layer is dense
    and the same for every token: what an expert adds along m only scales that common part up or down. A
    share near 1 says that the expert does little else; near 0, that what it does is its own. For a
    transcoder m is the mean of what the features write, and the share is how much of a feature points along
    it.

    Raises:
        ValueError: the statistics are of another layer.
    """
    statistics.check_is_of(sae)
    c = mixture_rows(sae).double()
    m = F.normalize(statistics.mean_mixture.to(c), dim=0)
    return ((c @ m) ** 2 / c.pow(2).sum(-1)).cpu()


# What experts resemble


@dataclass(frozen=True, repr=False)
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
    unit = F.normalize(expert_directions(sae) if by == "decoder" else sae.W_enc.T, dim=-1)
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


# The MLP's own neurons


@dataclass(frozen=True, repr=False)
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
@model_first
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

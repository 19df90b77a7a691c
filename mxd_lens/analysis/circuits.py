"""The paths by which an expert's pre-activation comes about: direct effects, followed back layer by layer.

The effect e_m of an active earlier expert m on the target's pre-activation is its coefficient's doing, and
that is a sum over what m reads. Of e_m, part p has the share

    e_m * pre_mp / pre_m         pre_mp the direct effect of p on m's pre-activation pre_m

with all that m's coefficient is multiplied by (D^T z of an MxD, the norms' scales) held as it is. The shares
of all parts of m add up to e_m, so that whatever is followed back, the ends add up to the pre-activation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.attribution import Effect, read_stream
from mxd_lens.artifacts.tables import Cell, Tabular, percent
from mxd_lens.hooks.site import block_of_layer, hook_names
from mxd_lens.models import model_first

BEAM = 512
"""Unfinished paths kept at every step back."""


@dataclass(frozen=True)
class Vertex:
    """A part of the model, at the token in question."""

    part: str
    """expert, or another of `Effect.part`."""
    layer: int | None
    index: int | None

    def __str__(self) -> str:
        return str(Effect(self.part, self.layer, self.index, effect=0.0))


class Path(NamedTuple):
    """A chain of parts, each read by the next one's gate."""

    vertices: tuple[Vertex, ...]
    """From where it begins to the target."""
    effect: float
    """What it adds to the target's pre-activation."""

    def __str__(self) -> str:
        return " → ".join(map(str, self.vertices))


@dataclass(frozen=True, repr=False)
class PathGraph(Tabular):
    """What `strongest_paths` found."""

    target: Vertex
    pre_activation: float
    """The target's."""
    position: int
    """At which token."""
    token: str
    """Its text."""
    edges: dict[Vertex, dict[Vertex, float]]
    """For every vertex that was followed back: what each part that it reads adds, through it, to the
    target's pre-activation. They sum to the vertex's own effect."""
    n_paths: int = 12
    """How many paths a table shows."""

    @property
    def title(self) -> str:
        return (
            f"Strongest paths to the pre-activation of {self.target} at token {self.position}, "
            f"{self.token!r}: {self.pre_activation:.4g} in all"
        )

    @property
    def columns(self) -> list[str]:
        return ["path", "effect", "share"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for path in self.strongest(self.n_paths):
            share = percent(path.effect / self.pre_activation) if self.pre_activation else ""
            yield [str(path), path.effect, share]

    @property
    def effects(self) -> dict[Vertex, float]:
        """What every vertex adds to the target's pre-activation, over all ways from it to the target."""
        total = {self.target: self.pre_activation}
        for read in self.edges.values():
            for vertex, effect in read.items():
                total[vertex] = total.get(vertex, 0.0) + effect
        return total

    @property
    def ends(self) -> dict[Vertex, float]:
        """The effects of the vertices that were not followed back; they sum to the pre-activation."""
        return {vertex: effect for vertex, effect in self.effects.items() if vertex not in self.edges}

    def strongest(self, n: int) -> list[Path]:
        """The n paths with the largest effects by magnitude, among those whose parts are strongest."""
        effects = self.effects
        open_paths = [Path((self.target,), self.pre_activation)]
        finished: list[Path] = []
        while open_paths:
            longer = [
                Path((vertex, *path.vertices), path.effect * effect / (effects[path.vertices[0]] or 1.0))
                for path in open_paths
                for vertex, effect in self.edges[path.vertices[0]].items()
            ]
            longer.sort(key=lambda path: -abs(path.effect))
            finished += [path for path in longer if path.vertices[0] not in self.edges][:n]
            open_paths = [path for path in longer if path.vertices[0] in self.edges][:BEAM]
        return sorted(finished, key=lambda path: -abs(path.effect))[:n]


def reads_stream(sae: SAE[Any]) -> bool:
    """Whether a layer reads what its MLP reads, rather than what it writes."""
    hook_in, hook_out = hook_names(sae)
    return hook_in != hook_out


@torch.no_grad()
@model_first
def strongest_paths(
    model: Any,
    sae: SAE[Any],
    expert: int,
    prompt: str | Int[Tensor, " positions"],
    position: int = -1,
    layers: Iterable[SAE[Any]] = (),
    width: int = 5,
) -> PathGraph:
    """Follows an expert's gate pre-activation back through earlier layers' experts.

        graph = strongest_paths(model, later, 41, "The capital of France is", layers=[earlier])

    All is at one token: what comes from others arrives by the attention heads, where paths begin. Other
    beginnings are the embedding, biases, skip connections, errors, MLPs for which no layer stands, experts
    that were not followed back, and the features of an SAE, which reads what the MLP writes.

    Args:
        model, sae, expert, prompt, position, layers: as for `direct_effects`.
        width: how many experts of each layer are followed back, those with the largest effects on the
            target by magnitude.

    Raises:
        ValueError: width is negative; else as `direct_effects`, and IndexError.
    """
    if width < 0:
        raise ValueError(f"width must not be negative, got {width}.")
    stream, earlier, n = read_stream(model, sae, expert, prompt, position, layers)
    saes = earlier | {block_of_layer(sae): sae}
    target = Vertex("expert", block_of_layer(sae), n)
    found, pre_activation = stream.effects(sae, n, earlier)
    edges = {target: {Vertex(e.part, e.layer, e.index): e.effect for e in found}}
    effects = dict(edges[target])
    for block in sorted(earlier, reverse=True):
        if not reads_stream(earlier[block]):
            continue
        here = [v for v in effects if v.part == "expert" and v.layer == block and v.index is not None]
        for vertex in sorted(here, key=lambda v: -abs(effects[v]))[:width]:
            found, its_pre_activation = stream.effects(saes[block], vertex.index or 0, earlier)
            share = effects[vertex] / its_pre_activation
            edges[vertex] = {Vertex(e.part, e.layer, e.index): share * e.effect for e in found}
            for read, effect in edges[vertex].items():
                effects[read] = effects.get(read, 0.0) + effect
    token = model.tokenizer.decode([stream.token])
    return PathGraph(target, pre_activation, stream.position, token, edges)

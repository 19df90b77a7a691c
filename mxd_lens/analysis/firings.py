"""The one reader of which experts fire where: the model up to the layers, and the layers decomposed.

Statistics, dashboards, probing, token dependence, stability, concept search and delphi's cache are all
sums or selections of what `read` yields.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor

from mxd_lens.analysis.decomposition import Parts, decompose
from mxd_lens.analysis.sequences import Batch, Text, batch_of, token_batches, token_sequences_of
from mxd_lens.hooks.site import check_trained_on, hook_names
from mxd_lens.models import attached_layer, hook_point_name, model_first

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class Firings(NamedTuple):
    """Which experts of a layer fire on the counted tokens of a text, and how strongly."""

    n_experts: int
    """Experts there are."""
    token_of: Int[Tensor, " fired"]
    """The token, counted from 0, of every active expert on every token."""
    expert: Int[Tensor, " fired"]
    """Which expert."""
    coefficient: Float[Tensor, " fired"]
    """a_n, positive."""
    token: Int[Tensor, " tokens"]
    """The tokens' ids."""
    previous: Int[Tensor, " tokens"]
    """The ids of the tokens before them, special ones included; -1 at the start of a sequence."""
    sequence: Int[Tensor, " tokens"]
    """The sequences they are in, from 0."""
    position: Int[Tensor, " tokens"]
    """Their places in their sequences, from 0."""

    @property
    def n_tokens(self) -> int:
        return len(self.token)

    @property
    def counts(self) -> Int[Tensor, " n_experts"]:
        """On how many tokens each expert fires."""
        return torch.bincount(self.expert, minlength=self.n_experts)

    @property
    def matrix(self) -> "csr_matrix":
        """The coefficients, sparse, [tokens, n_experts], in float64."""
        from scipy.sparse import csr_matrix

        entries = self.coefficient.double().numpy(), (self.token_of.numpy(), self.expert.numpy())
        return csr_matrix(entries, shape=(self.n_tokens, self.n_experts))

    def of_experts(self, experts: Int[Tensor, " n"]) -> "Firings":
        """Only the firings of some experts, numbered from 0 as given; every token stays."""
        slots = torch.full((self.n_experts,), -1)
        slots[experts] = torch.arange(len(experts))
        slot = slots[self.expert]
        kept = slot >= 0
        return self._replace(
            n_experts=len(experts),
            token_of=self.token_of[kept],
            expert=slot[kept],
            coefficient=self.coefficient[kept],
        )

    @classmethod
    def join(cls, batches: Iterable["Firings"]) -> "Firings":
        """The firings of several batches, in one."""
        found = list(batches)
        first = [0]
        for batch in found:
            first.append(first[-1] + batch.n_tokens)
        shifted = [
            batch._replace(token_of=batch.token_of + start)
            for batch, start in zip(found, first, strict=False)
        ]
        columns: list[Any] = [torch.cat(part) for part in zip(*(batch[1:] for batch in shifted), strict=True)]
        return cls._make([found[0].n_experts, *columns])


class Reading(NamedTuple):
    """What one layer does on the counted tokens of one batch of sequences."""

    inputs: Float[Tensor, "tokens d_in"]
    """The layer's inputs."""
    parts: Parts
    """Its output there, decomposed."""
    token: Int[Tensor, " tokens"]
    """As in `Firings`, on the CPU, as are the next ones."""
    previous: Int[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]

    @property
    def firings(self) -> Firings:
        """Which experts fire on these tokens, on the CPU."""
        token_of, expert, coefficient = (part.cpu() for part in self.parts.fired)
        where = self.token, self.previous, self.sequence, self.position
        return Firings(self.parts.d_sae, token_of, expert, coefficient, *where)


@torch.no_grad()
def read(
    model: Any,
    saes: Mapping[str, SAE[Any]],
    text: Text,
    batch_size: int = 8,
    progress: bool = True,
    description: str = "Reading experts",
) -> Iterator[dict[str, Reading]]:
    """What several layers do on a text, by the layers' names, one batch of sequences at a time.

    The model runs once per batch for all layers, up to the last of them and no further. The layers may be
    attached or not; other layers that are attached do their part. Tokens that a layer's training excluded
    are left out of its reading.

    Args:
        model: any hooked model.
        saes: the layers by name.
        text: a string, strings, or token ids; see `Text`.
        batch_size: sequences in a forward pass. It does not change the numbers, beyond rounding.
        progress: whether to show a progress bar.
        description: what the bar says.

    Raises:
        ValueError: a layer does not belong to the model, its input has values that are not finite, or a
            text has no token.
        TypeError: the text is neither text nor token ids.
    """
    hooks = {}
    for name, sae in saes.items():
        check_trained_on(model, sae)
        hooks[name] = input_hook(model, sae)
    sequences = token_sequences_of(model, next(iter(saes.values())), text)
    for batch in token_batches(sequences, batch_size, description, progress):
        yield read_batch(model, saes, batch, hooks)


@torch.no_grad()
def read_batch(
    model: Any,
    saes: Mapping[str, SAE[Any]],
    batch: Batch,
    hooks: Mapping[str, str] | None = None,
    counted: Bool[Tensor, "sequences positions"] | None = None,
) -> dict[str, Reading]:
    """What several layers do on one batch.

    Args:
        model, saes: as for `read`.
        batch: the sequences.
        hooks: the hook points of the layers' inputs, by layer; None looks them up.
        counted: which tokens are read; None: those that each layer's training did not exclude.

    Raises:
        ValueError: as `read`.
    """
    at = hooks or {name: input_hook(model, sae) for name, sae in saes.items()}
    activations = run_to(model, batch.tokens, set(at.values()))
    found = {}
    for name, sae in saes.items():
        here = batch.counted(model, sae) if counted is None else counted
        x = activations[at[name]]
        x = x[here.to(x.device)]
        check_finite(x, at[name])
        sequence, position = here.cpu().nonzero(as_tuple=True)
        before = torch.cat([torch.full_like(batch.tokens[:, :1], -1), batch.tokens[:, :-1]], dim=1)
        token, previous = (ids[here].cpu() for ids in (batch.tokens, before))
        found[name] = Reading(x, decompose(sae, x), token, previous, sequence + batch.first, position)
    return found


@model_first
def firings(model: Any, sae: SAE[Any], text: Text, batch_size: int = 8, progress: bool = True) -> Firings:
    """Which experts of a layer fire on a text, and how strongly.

    Args:
        model, text, batch_size, progress: as for `read`. Memory grows with the tokens times the active
            experts of each.
        sae: the layer.

    Raises:
        ValueError, TypeError: as `read`.
    """
    readings = read(model, {"": sae}, text, batch_size, progress)
    return Firings.join(reading[""].firings for reading in readings)


def check_finite(values: Tensor, hook_name: str) -> None:
    """Raises ValueError where an activation is NaN or infinite: no number can be measured of it."""
    finite = values.isfinite()
    if not finite.all():
        rows = int((~finite).reshape(len(finite), -1).any(-1).sum())
        raise ValueError(
            f"The activations at {hook_name} are NaN or infinite at {rows} of {len(values)} tokens of a "
            "batch. Run the model in float32 or bfloat16, or leave out the text on which it overflows."
        )


# The layer's input in a language model


@model_first
def layer_input(model: Any, sae: SAE[Any], text: Text) -> Float[Tensor, "sequences positions d_in"]:
    """What the layer gets to see on some text; the model runs up to its MLP and no further.

    The layer may be attached or not. Other layers that are attached do their part. Special tokens and what
    fills up shorter texts are included.

    Raises:
        ValueError: the layer was trained on another model, or on a hook this one lacks.
    """
    check_trained_on(model, sae)
    name = input_hook(model, sae)
    tokens = batch_of(token_sequences_of(model, sae, text)).tokens
    with torch.no_grad():
        return run_to(model, tokens, [name])[name].to(sae.W_dec)


@torch.no_grad()
def run_to(
    model: Any, tokens: Int[Tensor, "sequences positions"], hooks: Collection[str]
) -> dict[str, Float[Tensor, "sequences positions d"]]:
    """The activations at some hook points; the model runs up to the last of them.

    Raises:
        ValueError: one of them does not fire.
    """
    captured: dict[str, Tensor] = {}

    def capturing(name: str) -> Any:
        return name, lambda x, hook: captured.__setitem__(name, x)  # noqa: ARG005

    stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hooks]
    model.run_with_hooks(
        tokens.to(model.cfg.device),
        stop_at_layer=None if None in stops else max(stop for stop in stops if stop is not None),
        fwd_hooks=[capturing(name) for name in hooks],
    )
    for name in hooks:
        if name not in captured:
            raise ValueError(f"{name} did not fire: this model does not run the hook point a layer reads.")
    return captured


def input_hook(model: Any, sae: SAE[Any]) -> str:
    """The hook point at which this model has the layer's input, attached or not.

    Raises:
        ValueError: the model has no such hook point.
    """
    name = hook_point_name(model, hook_names(sae)[0])
    attached = attached_layer(model, name)
    if attached is not None:  # an SAE that is attached takes the place of the hook point it reads
        return f"{name}.hook_sae_input" if attached is sae else f"{name}.hook_sae_output"
    return name

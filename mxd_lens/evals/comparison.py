"""One prompt through several decompositions of one MLP.

    y_hat = (C^T a - m) * v + m * v + skip + b        v = D^T z for an MxD, 1 for a transcoder or SAE
            `- experts     `- mean gate               m the mean of C^T a over a text

Mean ablation of the experts leaves the last three summands, the dense part. Every part is measured along the
MLP's own output y, which all layers share: <part, y> / ||y||^2. The shares of the four parts and of what is
missing, y - y_hat, sum to 1; one that points against y is negative.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import Parts, decompose
from mxd_lens.analysis.firings import read
from mxd_lens.analysis.prompt import one_prompt
from mxd_lens.analysis.sequences import Text, batch_of, token_sequences_of
from mxd_lens.analysis.token_text import token_texts, vocabulary_text
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.evals.harness import Forward, Target, layer_output, zero
from mxd_lens.hooks.replace import Replaced, Replacement
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import attached_layer, hook_point_name, model_first

PARTS = ("experts", "mean gate", "skip", "bias", "missing")
"""Of the MLP's output, in this order in `Decomposition.shares`."""


class Predictions(NamedTuple):
    """What the model expects after each token of a prompt."""

    tokens: Int[Tensor, "positions n"]
    """The likeliest next tokens, likeliest first."""
    probabilities: Float[Tensor, "positions n"]
    """Their probabilities."""
    loss: Float[Tensor, " positions"]
    """-log probability of the token that follows, in nats; NaN at the last."""
    divergence: Float[Tensor, " positions"]
    """KL(unmodified || this), in nats."""

    @property
    def means(self) -> tuple[float, float]:
        """The mean loss and the mean divergence over the positions whose next token is known."""
        return self.loss[:-1].mean().item(), self.divergence[:-1].mean().item()

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "positions vocabulary"],
        tokens: Int[Tensor, " positions"],
        unmodified: Float[Tensor, "positions vocabulary"],
        n: int,
    ) -> "Predictions":
        log_p, log_q = (F.log_softmax(some.double().cpu(), dim=-1) for some in (unmodified, logits))
        top = log_q.topk(n)
        loss = F.nll_loss(log_q[:-1], tokens[1:].cpu(), reduction="none")
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return cls(top.indices, top.values.exp(), F.pad(loss, (0, 1), value=math.nan), divergence)


@dataclass(frozen=True, repr=False)
class Decomposition:
    """One layer's decomposition of the MLP's output on a prompt."""

    name: str
    """What it is called here."""
    architecture: str
    """As SAELens calls it."""
    n_experts: int
    """Experts there are (d_sae)."""
    n_parameters: int
    """Parameters of the layer."""
    kept: Bool[Tensor, " positions"]
    """Where it replaces the MLP: not at tokens that its training excluded."""
    experts: Int[Tensor, "positions k"]
    """The experts with the largest share of y, by magnitude."""
    coefficients: Float[Tensor, "positions k"]
    """a_n; 0 where fewer than k experts are active."""
    expert_shares: Float[Tensor, "positions k"]
    """<a_n u_n, y> / ||y||^2, with a_n u_n the expert's contribution."""
    norms: Float[Tensor, "positions k"]
    """||a_n u_n||."""
    n_active: Int[Tensor, " positions"]
    """Active experts."""
    shares: Float[Tensor, "positions parts"]
    """Of the parts in `PARTS`, along y. The experts' is what they write beyond the mean gate."""
    error: Float[Tensor, " positions"]
    """||y_hat - y||^2 / ||y||^2."""
    error_mean_gate: Float[Tensor, " positions"]
    """The same of the dense part alone."""
    replaced: Predictions
    """With the layer in the MLP's place."""
    mean_gate: Predictions
    """With the dense part alone in its place."""


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """What `compare` found."""

    model_name: str
    """The language model."""
    hook_name_out: str
    """Where all the layers write."""
    prompt: list[str]
    """The text of each token of the prompt."""
    vocabulary: dict[int, str]
    """The texts of the tokens that are predicted."""
    output_norms: Float[Tensor, " positions"]
    """||y||, of the MLP's own output."""
    unmodified: Predictions
    """Of the model as it is."""
    zero_ablated: Predictions
    """With zero in the place of the MLP's output."""
    layers: list[Decomposition]
    """In the order given."""
    n_mean_tokens: int | None
    """Tokens of the text over which the experts' mean was taken; None: the prompt's own."""

    @property
    def title(self) -> str:
        return f"{self.hook_name_out} of {self.model_name}, {len(self.layers)} decompositions of one prompt"

    @property
    def columns(self) -> list[str]:
        return [
            "",
            "error",
            "error, dense",
            "CE",
            "CE, dense",
            "KL",
            "active",
            "experts",
            "parameters",
        ]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        """Means over the prompt: errors over the tokens where the layer stands, CE and KL over all."""
        nan = math.nan
        for name, error, predictions in (
            ("unmodified", 0.0, self.unmodified),
            ("zero ablated", 1.0, self.zero_ablated),
        ):
            loss, divergence = predictions.means
            yield [name, error, nan, loss, nan, divergence, "", "", ""]
        for layer in self.layers:
            kept = layer.kept
            loss, divergence = layer.replaced.means
            yield [
                layer.name,
                layer.error[kept].mean().item(),
                layer.error_mean_gate[kept].mean().item(),
                loss,
                layer.mean_gate.means[0],
                divergence,
                layer.n_active[kept].double().mean().item(),
                layer.n_experts,
                layer.n_parameters,
            ]


@torch.no_grad()
@model_first
def compare(
    model: Any,
    layers: Mapping[str, SAE[Any]],
    prompt: str | Int[Tensor, " positions"],
    text: Text | None = None,
    k: int = 5,
    n_predictions: int = 5,
    batch_size: int = 8,
    progress: bool = True,
) -> Comparison:
    """Decompose one MLP on one prompt with several layers.

        comparison = compare(model, {"MxD": mxd, "transcoder": transcoder}, "The capital of France is")
        write_comparison_page("comparison.html", comparison)

    For layers of this package and of SAELens, transcoders and SAEs alike, none of them attached. A layer
    leaves the tokens alone that its training excluded, as in `evaluate`.

    Args:
        model: any hooked model.
        layers: the layers by name, all of the same MLP.
        prompt: text, which gets a BOS as the model's `to_tokens` gives one, or token ids.
        text: a string, strings, or token ids over which the experts' mean is taken. None: the prompt itself,
            which flatters the dense part where the prompt is short.
        k: experts per token, the ones with the largest share of the MLP's output by magnitude.
        n_predictions: next tokens at each position.
        batch_size: sequences of the text in a forward pass.
        progress: whether to show progress bars.

    Raises:
        ValueError: there are no layers, or they are of different MLPs or of another model, or one of them is
            attached; the prompt is empty or more than one, or nothing of it is left without special tokens;
            k or n_predictions is not positive.
    """
    if k < 1 or n_predictions < 1:
        raise ValueError(f"k and n_predictions must be positive, got {k} and {n_predictions}.")
    hook_name_out = _one_mlp(model, layers)
    tokens = one_prompt(model, prompt)
    forward = Forward(model, batch_of(tokens[None]))
    targets = {name: Target.of(model, sae) for name, sae in layers.items()}
    if not all(forward.counted(target).any() for target in targets.values()):
        raise ValueError("There are no tokens to compare on: all of the prompt are excluded special tokens.")
    first = next(iter(targets.values()))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with tqdm(total=2 + 2 * len(layers), desc="Comparing", disable=not progress) as bar:

        def logits(target: Target, replacement: Replacement) -> Float[Tensor, "positions vocabulary"]:
            bar.update()
            return forward.replaced(target, replacement)[0]

        def predictions(logits: Float[Tensor, "positions vocabulary"]) -> Predictions:
            return Predictions.of(logits, tokens, unmodified, n_predictions)

        unmodified = forward.logits(
            Replaced(model, target.hook_name, target.hook_name_out, _recorder(seen, name))
            for name, target in targets.items()
        )[0]
        bar.update()
        zero_ablated = predictions(logits(first, zero))
        sequences = None if text is None else token_sequences_of(model, next(iter(layers.values())), text)
        means = None if sequences is None else _means(model, layers, sequences, batch_size, progress)
        decompositions = []
        for name, sae in layers.items():
            target, (x, y) = targets[name], seen[name]
            parts = decompose(sae, x)
            kept = forward.counted(target)[0].to(x.device)
            mean = parts.mixture[kept].mean(0) if means is None else means[name]
            replaced = predictions(logits(target, layer_output(sae, lambda parts: parts.y)))
            dense = predictions(logits(target, layer_output(sae, partial(Parts.with_mixture, mixture=mean))))
            decompositions.append(_decompose(name, sae, parts, y.double(), mean, kept, k, replaced, dense))
    everywhere = [zero_ablated, Predictions.of(unmodified, tokens, unmodified, n_predictions)]
    everywhere += [p for d in decompositions for p in (d.replaced, d.mean_gate)]
    predicted = torch.cat([p.tokens.flatten() for p in everywhere]).unique().tolist()
    return Comparison(
        model_name=model.cfg.model_name,
        hook_name_out=hook_name_out,
        prompt=token_texts(model.tokenizer, tokens.tolist()),
        vocabulary={t: vocabulary_text(model.tokenizer, t) for t in predicted},
        output_norms=next(iter(seen.values()))[1].norm(dim=-1).cpu(),
        unmodified=everywhere[1],
        zero_ablated=zero_ablated,
        layers=decompositions,
        n_mean_tokens=None if sequences is None else sum(map(len, sequences)),
    )


def _one_mlp(model: Any, layers: Mapping[str, SAE[Any]]) -> str:
    """The hook point at which all the layers write."""
    if not layers:
        raise ValueError("There is no layer to compare: give them by name, {'MxD': mxd, ...}.")
    names = {}
    for name, sae in layers.items():
        check_fits(model, sae)
        names[name] = hook_names(sae)[1]
        if attached_layer(model, names[name]) is not None:
            raise ValueError(
                f"A layer is attached at {names[name]}: compare with what the MLP itself writes."
            )
    first = next(iter(names.values()))
    if len({hook_point_name(model, name) for name in names.values()}) > 1:
        told = ", ".join(f"{name} at {where}" for name, where in names.items())
        raise ValueError(f"These layers are not of one MLP; they write: {told}.")
    return first


def _recorder(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Replacement:
    def record(x: Tensor, y: Tensor) -> Tensor:
        seen[name] = x[0], y[0]
        return y

    return record


def _means(
    model: Any, layers: Mapping[str, SAE[Any]], text: Text, batch_size: int, progress: bool
) -> dict[str, Float[Tensor, " m"]]:
    """The mean mixture of each layer over the tokens of a text that its training did not exclude."""
    sums: dict[str, Tensor] = {}
    n_tokens = dict.fromkeys(layers, 0)
    for readings in read(model, layers, text, batch_size, progress, "Reading means"):
        for name, reading in readings.items():
            sums[name] = sums.get(name, 0.0) + reading.parts.mixture.double().sum(0)
            n_tokens[name] += len(reading.parts)
    if not all(n_tokens.values()):
        raise ValueError("The text for the mean has no tokens but special ones, which are excluded.")
    return {name: (total / n_tokens[name]).to(layers[name].b_dec) for name, total in sums.items()}


def _decompose(
    name: str,
    sae: SAE[Any],
    parts: Parts,
    y: Float[Tensor, "tokens d_out"],
    mean: Float[Tensor, " d_out"],
    kept: Bool[Tensor, " tokens"],
    k: int,
    replaced: Predictions,
    mean_gate: Predictions,
) -> Decomposition:
    squared = y.pow(2).sum(-1)
    y_hat = parts.y.to(y)
    dense = parts.with_mixture(mean).to(y)
    nothing = torch.zeros_like(y)
    pieces = {
        "experts": y_hat - dense,
        "mean gate": parts.experts_out(mean) + nothing,
        "skip": nothing if parts.skip is None else parts.skip,
        "bias": parts.bias + nothing,
        "missing": y - y_hat,
    }
    expert_shares = parts.dots(y.to(parts.bias)) / squared.unsqueeze(-1)
    order = parts.largest(expert_shares, k)
    return Decomposition(
        name=name,
        architecture=sae.cfg.architecture(),
        n_experts=sae.cfg.d_sae,
        n_parameters=sum(p.numel() for p in sae.parameters()),
        kept=kept.cpu(),
        experts=parts.experts.gather(1, order).cpu(),
        coefficients=parts.coefficients.gather(1, order).cpu(),
        expert_shares=expert_shares.gather(1, order).cpu(),
        norms=parts.norms().gather(1, order).cpu(),
        n_active=(parts.coefficients != 0).sum(-1).cpu(),
        shares=torch.stack([(pieces[part] * y).sum(-1) / squared for part in PARTS], dim=-1).cpu(),
        error=((y_hat - y).pow(2).sum(-1) / squared).cpu(),
        error_mean_gate=((dense - y).pow(2).sum(-1) / squared).cpu(),
        replaced=replaced,
        mean_gate=mean_gate,
    )

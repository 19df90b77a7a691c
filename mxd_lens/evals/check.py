"""Is a layer in its right place: what it reads, at which scale, with everything that it writes?

    check_layer(model, sae)      # or: mxd-lens check FOLDER --model gpt2

A layer that is attached at the wrong hook point, or read from its file without its skip connection, runs and
gives numbers. Here it is tried on a short text in every way that released layers differ, and a sentence says
which one fits.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.decomposition import active_experts
from mxd_lens.analysis.firings import run_to
from mxd_lens.artifacts.tables import Cell, Table, Tabular
from mxd_lens.evals.faithfulness import USELESS
from mxd_lens.hooks.positions import trained_positions
from mxd_lens.hooks.replace import replacement_hooks
from mxd_lens.hooks.site import check_fires, check_trained_on, hook_names
from mxd_lens.models import hook_point_name
from mxd_lens.pretrained.formats.foreign import CONVENTIONS, block_of, convention_of
from mxd_lens.text import EMBEDDED, load_text, split_text, token_sequences

SEQUENCES = 8
"""Of 128 tokens, of the text that every machine has."""
MUCH_BETTER = 0.8
"""Another reading of a layer is named where it has less than this share of the stated one's error."""
SCALES = tuple(2.0**n for n in range(-8, 9))
LINEAR_SHARE = 0.2
"""Of what a layer leaves unexplained; where a linear map of its input explains more, a skip is missing."""


@dataclass(frozen=True)
class InputCandidate:
    """The layer on one of the three tensors that a transcoder may read."""

    convention: str
    """"pre_gain", "post_gain" or "unnormalized"; or "as stated" for another tensor."""
    hook_name: str
    normalized_mse: float
    """Mean over the tokens of ||y_hat - y||^2 / ||y||^2."""
    l0: float
    """Active features on a token, on average."""
    is_stated: bool
    """Whether the layer's metadata names this hook point."""


@dataclass(frozen=True)
class LayerCheck(Tabular):
    """What `check_layer` found."""

    verdict: str
    """One sentence."""
    fits: bool
    """Whether nothing is wrong."""
    n_tokens: int
    candidates: list[InputCandidate] = field(default_factory=list)
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """What else was measured, by name."""

    def to_dict(self) -> dict[str, Any]:
        """The verdict and the numbers, as JSON holds them."""
        return asdict(self)

    @property
    def tables(self) -> list[Table]:
        rows: list[list[Cell]] = [
            [c.convention, c.hook_name, c.normalized_mse, c.l0, "yes" if c.is_stated else ""]
            for c in self.candidates
        ]
        tables = []
        if rows:
            columns = ["input", "hook point", "normalised MSE", "L0", "stated"]
            tables.append(
                Table(columns, rows, f"The layer on each tensor it may read, {self.n_tokens} tokens")
            )
        if self.facts:
            tables.append(Table(["measured", "value"], [[k, v] for k, v in self.facts.items()], "Beside it"))
        return [*tables, Table(["verdict"], [[self.verdict]])]


@torch.no_grad()
def check_layer(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"] | None = None,
    stated_normalized_mse: float | None = None,
) -> LayerCheck:
    """Try a layer on its model in every way that released layers differ, and say what fits.

    1. The hook points that it names exist and fire.
    2. Its error and L0 on the three tensors that a transcoder may read: the norm's output before its gain,
       after it, and the residual stream before the norm.
    3. Attached by SAELens, it writes what `forward` computes.
    4. Its error is below 1, and near the stated one.
    5. No other scale of input and output has a much smaller error.
    6. No linear map of the input explains what it leaves, as a missing skip connection does. The map is
       fitted on half of the tokens and tried on the others.

    The first of these that fails makes the verdict.

    Args:
        model: any hooked model.
        sae: the layer; its metadata says where it belongs, and the L0 and the positions it was trained with.
        tokens: token ids. None: 1,024 tokens of the text that every machine has.
        stated_normalized_mse: the error that the layer's card or report states.

    Raises:
        ValueError: the layer does not say where it belongs.
    """
    hook_name, hook_name_out = hook_names(sae)
    try:
        check_trained_on(model, sae)
        check_fires(model, hook_name, hook_name_out)
    except ValueError as e:
        return LayerCheck(f"It does not fit this model: {e}", False, 0)
    if tokens is None:
        tokens = token_sequences(model, split_text(load_text(EMBEDDED))[1], SEQUENCES)
    kept = trained_positions(model, sae, tokens)
    activations = _activations(model, hook_name, hook_name_out, tokens, kept)
    y = activations.pop(hook_name_out)
    if y.shape[-1] != sae.W_dec.shape[-1]:
        return LayerCheck(
            f"It does not fit this model: it writes {sae.W_dec.shape[-1]} numbers for a token, and "
            f"{hook_name_out} has {y.shape[-1]}.",
            False,
            len(y),
        )
    candidates = [
        _candidate(sae, name, x, y, name == hook_name)
        for name, x in activations.items()
        if x.shape[-1] == sae.cfg.d_in
    ]
    stated = next((c for c in candidates if c.is_stated), None)
    if stated is None:
        return LayerCheck(
            f"It does not fit this model: it reads {sae.cfg.d_in} numbers for a token, and {hook_name} has "
            f"{activations[hook_name].shape[-1]}.",
            False,
            len(y),
        )
    x = activations[hook_name]
    facts: dict[str, float | str] = {}
    fault = (
        _wrong_input(candidates, stated, sae.cfg.metadata.stated_l0)
        or _lost_when_attached(model, sae, tokens, facts)
        or _wrong_scale(sae, x, y, stated, facts)
        or _missing_skip(sae, x, y, stated, facts)
        or _useless(stated)
        or _unlike_what_is_stated(stated, sae.cfg.metadata.stated_l0, stated_normalized_mse)
    )
    fits = (
        f"It fits: it reads {hook_name}{_named(stated.convention)} with a normalised MSE of "
        f"{stated.normalized_mse:.3f} at an L0 of {stated.l0:.1f}."
    )
    return LayerCheck(fault or fits, not fault, len(y), candidates, facts)


def _activations(
    model: Any,
    hook_name: str,
    hook_name_out: str,
    tokens: Int[Tensor, "sequences positions"],
    kept: Bool[Tensor, "sequences positions"],
) -> dict[str, Float[Tensor, "tokens d"]]:
    """The layer's input and output and the other tensors that it may read, at the counted tokens."""
    names = [hook_name, hook_name_out]
    block = block_of(hook_name)
    if convention_of(hook_name) is not None:
        for point in CONVENTIONS.values():
            name = f"blocks.{block}.{point}"
            try:
                check_fires(model, name)
            except ValueError:
                continue
            if hook_point_name(model, name) not in [hook_point_name(model, known) for known in names]:
                names.append(name)
    points = {name: hook_point_name(model, name) for name in names}
    activations = run_to(model, tokens, list(points.values()))
    return {
        name: activations[point].detach()[kept.to(activations[point].device)]
        for name, point in points.items()
    }


def _normalized_mse(y_hat: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens d"]) -> float:
    y, y_hat = y.double(), y_hat.double().to(y.device)
    return ((y_hat - y).pow(2).sum(-1) / y.pow(2).sum(-1).clamp_min(1e-12)).mean().item()


def _candidate(sae: SAE[Any], name: str, x: Tensor, y: Tensor, is_stated: bool) -> InputCandidate:
    x = x.to(sae.W_dec)
    coefficients, _ = active_experts(sae, x)
    l0 = (coefficients != 0).sum(-1).double().mean().item()
    return InputCandidate(convention_of(name) or "as stated", name, _normalized_mse(sae(x), y), l0, is_stated)


def _named(convention: str) -> str:
    return "" if convention == "as stated" else f" ({convention})"


def _wrong_input(
    candidates: list[InputCandidate], stated: InputCandidate, stated_l0: float | None
) -> str | None:
    best = min(candidates, key=lambda c: c.normalized_mse)
    if best is stated or best.normalized_mse > min(USELESS, MUCH_BETTER * stated.normalized_mse):
        return None
    nearest = ""
    if stated_l0:
        closest = min(candidates, key=lambda c: abs(c.l0 - stated_l0))
        nearest = f" The L0 nearest to the stated {stated_l0:g} is that of {closest.hook_name}."
    return (
        f"It reads the wrong tensor: its metadata says {stated.hook_name}{_named(stated.convention)}, where "
        f"its normalised MSE is {stated.normalized_mse:.3f} (L0 {stated.l0:.1f}); at "
        f"{best.hook_name}{_named(best.convention)} it is {best.normalized_mse:.3f} (L0 {best.l0:.1f}). Set "
        f"sae.cfg.metadata.hook_name = {best.hook_name!r}.{nearest}"
    )


def _lost_when_attached(
    model: Any, sae: SAE[Any], tokens: Int[Tensor, "sequences positions"], facts: dict[str, float | str]
) -> str | None:
    if not hasattr(model, "saes"):
        return None
    one = tokens[:1].to(model.cfg.device)
    expected = model.run_with_hooks(one, fwd_hooks=replacement_hooks(sae)).float()
    with model.saes(saes=[sae]):
        attached = model(one).float()
    difference = (attached - expected).abs().max().item()
    facts["largest difference of a logit, attached and by forward"] = difference
    if difference < 1e-2 * expected.abs().max().item():
        return None
    return (
        "Attached by SAELens, it does not write what its forward pass computes (a logit differs by "
        f"{difference:.3g}): {type(sae).__module__.split('.')[0]}.{type(sae).__name__} loses "
        f"{'its skip connection' if hasattr(sae, 'W_skip') else 'a part of its output'} there. Load it with "
        "mxd_lens.load_layer, or use replacement_hooks."
    )


def _wrong_scale(
    sae: SAE[Any], x: Tensor, y: Tensor, stated: InputCandidate, facts: dict[str, float | str]
) -> str | None:
    """The best scale of the input, with the best of the output for it, by least squares."""
    x, target = x.to(sae.W_dec), y.to(sae.W_dec)
    weight = target.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    best = (stated.normalized_mse, 1.0, 1.0)
    for s_in in SCALES:
        y_hat = sae(x * s_in)
        a, b = y_hat / weight, target / weight
        s_out = ((a * b).sum() / a.pow(2).sum().clamp_min(1e-12)).item()
        for scale in (1.0, s_out):
            best = min(best, (_normalized_mse(y_hat * scale, y), s_in, scale))
    error, s_in, s_out = best
    facts["normalised MSE at the best scale"] = error
    is_another = s_in != 1 or not 0.5 < s_out < 2
    # A layer that is merely poor does better at a smaller scale: half of the error is more than that.
    if not is_another or error > min(stated.normalized_mse, 1.0) / 2:
        return None
    return (
        f"Its scale is wrong: its normalised MSE is {stated.normalized_mse:.3f}, and {error:.3f} with its "
        f"input times {s_in:g} and its output times {s_out:.3g}. Was it trained on normalised activations, "
        "whose scale was not folded into its weights?"
    )


def _missing_skip(
    sae: SAE[Any], x: Tensor, y: Tensor, stated: InputCandidate, facts: dict[str, float | str]
) -> str | None:
    """How much of the residual a ridge regression on the input explains, on tokens it was not fitted to."""
    x, target = x.to(sae.W_dec), y.to(sae.W_dec)
    weight = target.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    residual = ((target - sae(x)) / weight).double().cpu()
    ones = x.new_ones(len(x), 1)
    inputs = (torch.cat([x / x.norm(dim=-1).mean(), ones], dim=1) / weight * weight.mean()).double().cpu()
    fit, tried = slice(0, None, 2), slice(1, None, 2)
    gram = inputs[fit] @ inputs[fit].T
    explained = 0.0
    for ridge in (1e-4, 1e-3, 1e-2, 1e-1):
        damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        predicted = inputs[tried] @ inputs[fit].T @ torch.linalg.solve(damped, residual[fit])
        left = (residual[tried] - predicted).pow(2).sum() / residual[tried].pow(2).sum().clamp_min(1e-12)
        explained = max(explained, 1 - left.item())
    facts["share of what it leaves that a linear map of its input explains"] = explained
    if explained < LINEAR_SHARE or stated.normalized_mse < USELESS * (0.25 if explained > 0.5 else 1):
        return None
    what = (
        "its skip connection is wrong: is it transposed?"
        if hasattr(sae, "W_skip")
        else "a skip connection is missing: does the file have one that the class has not?"
    )
    return (
        f"Its normalised MSE is {stated.normalized_mse:.3f}, and a linear map of its input explains "
        f"{explained:.0%} of what it leaves, on tokens that the map was not fitted to: {what}"
    )


def _useless(stated: InputCandidate) -> str | None:
    if stated.normalized_mse < USELESS:
        return None
    return (
        f"It does not replace this MLP: its normalised MSE is {stated.normalized_mse:.3f}, and that of "
        "writing nothing is 1. No other input, scale or linear map does much better. Is it another block's, "
        "or another model's?"
    )


def _unlike_what_is_stated(
    stated: InputCandidate, stated_l0: float | None, stated_error: float | None
) -> str | None:
    if stated_error is not None and stated.normalized_mse > max(2 * stated_error, stated_error + 0.1):
        return (
            f"Its normalised MSE is {stated.normalized_mse:.3f} here, and {stated_error:.3f} is stated: is "
            "the text of another kind, or is a part of the layer wrong?"
        )
    if stated_l0 and not stated_l0 / 2 < stated.l0 < stated_l0 * 2:
        return f"It has {stated.l0:.1f} active features on a token, and {stated_l0:g} are stated."
    return None

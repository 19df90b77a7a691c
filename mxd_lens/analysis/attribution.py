"""What an expert's gate reads: the direct effect of everything earlier on its pre-activation.

    pre_n = g_n . x + b_n         g_n column n of W_enc, x the input of the MLP that the layer replaces
    x = w * r / s + b_ln          the norm before it; r [- mean r] for a layer norm; s its scale
    r = embedding + sum of heads + sum of MLPs + biases        the residual stream at that token

With s held fixed x is linear in r, and each summand v of r has the direct effect g_n . (w * v) / s. Where a
layer of this package stands for an earlier MLP, the MLP's summand is taken apart further: its experts, its
skip connection, its bias, and the error, which is what the model's MLP writes beyond the layer.

An earlier expert m that is active has a_m = pre_m, so its effect e on pre_n is again a sum over what m reads:
e_p / pre_m * e for each part p with the effect e_p on pre_m, what else is in m's summand (D^T z, s) held
fixed. Going on like this, `strongest_paths` follows a pre-activation back to heads and embeddings.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.decomposition import decompose
from mxd_lens.analysis.firings import input_hook
from mxd_lens.analysis.logit_lens import Norm, read_norm
from mxd_lens.analysis.prompt import one_prompt
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.hooks.site import block_of_layer, check_trained_on, hook_names
from mxd_lens.models import check_fires, hook_point_name, model_first, normalises_what_mlps_write

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Effect:
    """The direct effect of one summand of the residual stream."""

    part: str
    """embedding, head, attention bias, mlp, expert, skip, bias, error, gate bias, or rounding: what the
    activations of a model in half precision lost."""
    layer: int | None
    """The block it belongs to; None for the embedding."""
    index: int | None
    """Which head or expert; None for the rest."""
    effect: float
    """What it adds to the pre-activation."""

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer} "
        return f"{where}{self.part}" + ("" if self.index is None else f" {self.index}")


@dataclass(frozen=True, repr=False)
class DirectEffects(Tabular):
    """What `direct_effects` found, largest effect first by magnitude."""

    effects: list[Effect]
    """They sum to the pre-activation."""
    pre_activation: float
    """g_n . x + b_n, of the input the layer had."""
    expert: int
    """Whose."""
    layer: int
    """In which block."""
    position: int
    """At which token."""
    token: str
    """Its text."""

    @property
    def title(self) -> str:
        return (
            f"Direct effects on the pre-activation of expert {self.expert} of layer {self.layer} at token "
            f"{self.position}, {self.token!r}: {self.pre_activation:.4g} in all"
        )

    @property
    def columns(self) -> list[str]:
        return ["from", "effect", "sum so far"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        total = 0.0
        for effect in self.effects:
            total += effect.effect
            yield [str(effect), effect.effect, total]

    def to_pandas(self) -> "pandas.DataFrame":
        """A row an effect: part, layer, index (which head or expert; missing for the rest) and effect."""
        import pandas

        frame = pandas.DataFrame([vars(effect) for effect in self.effects])
        return frame.astype({"layer": "Int64", "index": "Int64"})

    def top(self, n: int) -> "DirectEffects":
        """Only the n largest; these do not sum to the pre-activation."""
        return DirectEffects(
            self.effects[:n], self.pre_activation, self.expert, self.layer, self.position, self.token
        )


@torch.no_grad()
@model_first
def direct_effects(
    model: Any,
    sae: SAE[Any],
    expert: int,
    prompt: str | Int[Tensor, " positions"],
    position: int = -1,
    layers: Iterable[SAE[Any]] = (),
) -> DirectEffects:
    """What each earlier part of a model adds to an expert's gate pre-activation at one token.

        effects = direct_effects(model, later, 41, "The capital of France is", layers=[earlier])

    Exact with the norm's scale held fixed; an indirect effect, through a part in between, is counted to the
    part in between. The model runs as it is, with what is attached to it: a layer attached in the place of
    its MLP has an error of 0.

    Args:
        model: any hooked model whose MLPs read the normalised residual stream.
        sae: the layer that has the expert; it reads mlp.hook_in, or ln2.hook_normalized.
        expert: whose gate.
        prompt: text or token ids.
        position: of the token; negative counts from the end.
        layers: layers that stand for earlier MLPs, attached or not, to take their MLPs apart into experts.

    Raises:
        IndexError: there is no such expert or position.
        ValueError: a layer does not belong to the model, two of them stand for one MLP or one is not
            earlier, the layer reads something else than the normalised residual stream, or the model
            normalises what attention and MLP write, so that heads do not add up.
    """
    stream, earlier, n = read_stream(model, sae, expert, prompt, position, layers)
    effects, pre_activation = stream.effects(sae, n, earlier)
    return DirectEffects(
        effects,
        pre_activation,
        n,
        block_of_layer(sae),
        stream.position,
        model.tokenizer.decode([stream.token]),
    )


def read_stream(
    model: Any,
    sae: SAE[Any],
    expert: int,
    prompt: str | Int[Tensor, " positions"],
    position: int,
    layers: Iterable[SAE[Any]],
) -> "tuple[Stream, dict[int, SAE[Any]], int]":
    """The stream below a layer's MLP, the earlier layers by their block, and the expert's id."""
    if normalises_what_mlps_write(model):
        raise ValueError(
            f"{model.cfg.model_name} normalises what attention and MLPs write: heads do not add up there."
        )
    (n,) = expert_ids(sae, expert).tolist()
    tokens = one_prompt(model, prompt)
    if not -len(tokens) <= position < len(tokens):
        raise IndexError(f"there is no token {position}: the prompt has {len(tokens)}.")
    at = block_of_layer(sae)
    earlier = _by_block(layers, at)
    for layer in (sae, *earlier.values()):
        check_trained_on(model, layer)
        check_fires(model, hook_names(layer)[0])
    return Stream.of(model, tokens, position % len(tokens), at, [sae, *earlier.values()]), earlier, n


@dataclass(frozen=True)
class Stream:
    """The residual stream at one token and what has been written into it, in float64."""

    model: Any
    position: int
    token: int
    before: list[Float[Tensor, " d_model"]]
    """Before each block, up to the last that counts."""
    heads: list[Float[Tensor, "heads d_model"]]
    """What each head of each block that counts writes."""
    attention_biases: list[Float[Tensor, " d_model"] | None]
    """b_O of the same blocks; None where there is none."""
    inputs: dict[int, Float[Tensor, " d_in"]]
    """Each layer's input, by the layer's id()."""
    dtype: torch.dtype
    """The coarsest of the activations."""

    @classmethod
    def of(
        cls, model: Any, tokens: Int[Tensor, " positions"], position: int, last: int, saes: Sequence[SAE[Any]]
    ) -> "Stream":
        """Runs the model up to block `last`."""
        n_attention = last if _side_by_side(model) else last + 1
        before = [hook_point_name(model, f"blocks.{block}.hook_resid_pre") for block in range(last + 1)]
        mixed = [hook_point_name(model, f"blocks.{block}.attn.hook_z") for block in range(n_attention)]
        inputs = {id(sae): input_hook(model, sae) for sae in saes}
        captured: dict[str, Tensor] = {}
        dtypes: set[torch.dtype] = set()

        def capturing(name: str) -> tuple[str, Callable[..., None]]:
            # A hook's own name may be another than the one it was asked for by.
            def capture(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
                captured[name] = activation[0, position].double()
                dtypes.add(activation.dtype)

            return name, capture

        names = {*before, *mixed, *inputs.values()}
        model.run_with_hooks(
            tokens[None].to(model.cfg.device),
            stop_at_layer=last + 1,
            fwd_hooks=[capturing(name) for name in names],
        )
        heads, biases = [], []
        for block, name in enumerate(mixed):
            attention = model.blocks[block].attn
            W_O = attention.W_O.double()
            heads.append(torch.einsum("hd,hdm->hm", captured[name].reshape(W_O.shape[:2]), W_O))
            b_O = attention.b_O
            biases.append(None if b_O is None or not b_O.any() else b_O.double())
        return cls(
            model,
            position,
            int(tokens[position]),
            [captured[name] for name in before],
            heads,
            biases,
            {key: captured[name] for key, name in inputs.items()},
            max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
        )

    def attention(self, block: int) -> Float[Tensor, " d_model"]:
        """What a block's attention writes."""
        bias = self.attention_biases[block]
        heads = self.heads[block].sum(0)
        return heads if bias is None else heads + bias

    def mlp(self, block: int) -> Float[Tensor, " d_model"]:
        """What a block's MLP, or what is attached in its place, writes: the rest of what the block writes."""
        return self.before[block + 1] - self.before[block] - self.attention(block)

    def effects(self, sae: SAE[Any], n: int, earlier: Mapping[int, SAE[Any]]) -> tuple[list[Effect], float]:
        """The direct effects on the pre-activation of expert n of one of the layers, and that itself."""
        at = block_of_layer(sae)
        n_attention = at if _side_by_side(self.model) else at + 1
        r = self.before[at] + (self.attention(at) if n_attention > at else 0)
        x = self.inputs[id(sae)]
        norm, scale = _norm_and_scale(_norm_before_mlp(self.model.blocks[at]), r, x, self.dtype)
        gate = sae.W_enc[:, n].double()
        reading = norm.weight * gate / scale
        if norm.centres:
            reading = reading - reading.mean()
        gate_bias = sae.b_enc[n].double()
        if sae.cfg.apply_b_dec_to_input:
            gate_bias = gate_bias - gate @ sae.b_dec.double()

        effects = [
            Effect("embedding", None, None, (self.before[0] @ reading).item()),
            Effect("gate bias", at, None, (gate @ norm.bias + gate_bias).item()),
        ]
        for block in range(n_attention):
            by_head = (self.heads[block] @ reading).tolist()
            effects += [Effect("head", block, h, effect) for h, effect in enumerate(by_head)]
            bias = self.attention_biases[block]
            if bias is not None:
                effects.append(Effect("attention bias", block, None, (bias @ reading).item()))
        for block in range(at):
            effects += self._of_mlp(block, earlier.get(block), reading)
        pre_activation = (gate @ x + gate_bias).item()
        if torch.finfo(self.dtype).bits < 32:
            rest = pre_activation - sum(e.effect for e in effects)
            effects.append(Effect("rounding", at, None, rest))
        effects.sort(key=lambda e: -abs(e.effect))
        return effects, pre_activation

    def _of_mlp(self, block: int, sae: SAE[Any] | None, reading: Float[Tensor, " d_model"]) -> list[Effect]:
        written = self.mlp(block)
        if sae is None:
            return [Effect("mlp", block, None, (written @ reading).item())]
        parts = decompose(sae, self.inputs[id(sae)][None])
        if len(parts.bias) != len(written):
            raise ValueError(
                f"the layer of block {block} is {len(parts.bias)} wide, the model's residual stream "
                f"{len(written)}."
            )
        vectors = [(n, a[:, None].double() * u.double()) for _, n, a, u in parts.contributions()]
        summands = {"bias": parts.bias.double()}
        if parts.skip is not None:
            summands["skip"] = parts.skip[0].double()
        summands["error"] = written - sum(v.sum(0) for _, v in vectors) - sum(summands.values())
        return [
            *(
                Effect("expert", block, m, effect)
                for n, v in vectors
                for m, effect in zip(n.tolist(), (v @ reading).tolist(), strict=True)
            ),
            *(Effect(name, block, None, (v @ reading).item()) for name, v in summands.items()),
        ]


def _side_by_side(model: Any) -> bool:
    """Whether attention and MLP read the same stream, as in Pythia: a block's heads do not reach its MLP."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False))


def _norm_before_mlp(block: Any) -> Any:
    """The norm that the block's MLP reads; a parallel block may have one for attention and MLP together."""
    return block.ln2 if hasattr(block, "ln2") else block.ln1


def _norm_and_scale(
    module: Any, r: Float[Tensor, " d_model"], x: Float[Tensor, " d_in"], dtype: torch.dtype
) -> tuple[Norm, Float[Tensor, ""]]:
    """The norm that makes x of r, and its scale there.

    A hook point may be before or after the norm's weight and bias: of the two, the one that gives x. Both
    were rounded to `dtype`, that of the model, and so was what they were made of.
    """
    like = next(iter(module.parameters()), r)
    weight, bias, centres = read_norm(module, r.to(like.dtype))
    whole = Norm(weight.double(), bias.double(), centres)
    found: list[tuple[float, Norm, Tensor]] = []
    for norm in (whole, Norm(torch.ones_like(r), torch.zeros_like(r), centres)):
        unscaled, target = norm.before_scale(r), x - norm.bias if len(x) == len(r) else x
        if len(x) == len(r) and unscaled @ target > 0:
            scale = (unscaled @ unscaled) / (unscaled @ target)
            misfit = (unscaled / scale - target).norm() / target.norm()
            found.append((misfit.item(), norm, scale))
    allowed = max(1e-3, 8 * torch.finfo(dtype).eps)
    misfit, norm, scale = min(found, key=lambda one: one[0], default=(math.inf, whole, r.new_ones(())))
    if misfit < allowed:
        return norm, scale
    raise ValueError(
        "This layer's input is not the normalised residual stream that the MLP reads: only there does what "
        f"was written earlier add up. The nearest norm misses it by {misfit:.1%}, and {allowed:.1%} are "
        f"allowed for a model in {str(dtype).removeprefix('torch.')}."
    )


def _by_block(layers: Iterable[SAE[Any]], last: int) -> dict[int, SAE[Any]]:
    by_block: dict[int, SAE[Any]] = {}
    for layer in layers:
        block = block_of_layer(layer)
        if block >= last:
            raise ValueError(f"the layer of block {block} is not earlier than block {last}.")
        if block in by_block:
            raise ValueError(f"two layers stand for the MLP of block {block}.")
        by_block[block] = layer
    return by_block

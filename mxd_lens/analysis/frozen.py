"""A language model on one prompt as an affine map of what its embeddings and its MLPs write.

Attention patterns and the scales of norms are held at the values they have on the prompt. What is left of the
model, between the MLPs' outputs and the residual stream that any later part reads, is then affine: gradients
through it are exact effects, not approximations (arXiv 2406.11944; Ameisen et al., "Circuit Tracing", 2025).

A layer that replaces an MLP writes what its experts write, its bias and its skip connection. The experts'
part and the error, what the MLP writes beyond the layer, are held as given; a skip connection is linear and
stays part of the map.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from mxd_lens.analysis.decomposition import Parts, decompose, own_dtype
from mxd_lens.analysis.sequences import counted_tokens
from mxd_lens.hooks.site import check_fits, check_free, hook_names
from mxd_lens.models import hook_point, hook_point_name, listen

FROZEN = re.compile(r"(blocks\.\d+\.attn\.hook_pattern|(blocks\.\d+\.)?ln\w*\.hook_scale)")
"""The hook points whose activations are held fixed."""

Change = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Readings:
    """What the layers and the unembedding read in one forward pass of the frozen model."""

    inputs: dict[int, Float[Tensor, "batch positions d_in"]]
    """The input of each block's layer."""
    final: Float[Tensor, "batch positions d_model"]
    """The normalised residual stream that is unembedded."""


class FrozenModel:
    """A model on one prompt with its attention patterns, norm scales and nonlinear outputs held fixed.

    Args:
        model: any hooked model; nothing may be attached to it.
        layers: the layer that replaces the MLP of each block. Blocks without one write their MLP's output.
        tokens: the prompt, [positions].

    Raises:
        ValueError: a layer does not fit the model, something is attached, or the model does not compute its
            attention patterns where they can be held fixed.
    """

    def __init__(self, model: Any, layers: Mapping[int, SAE[Any]], tokens: Int[Tensor, " positions"]) -> None:
        self.model = model
        self.layers = dict(sorted(layers.items()))
        self.tokens = tokens.to(model.cfg.device)
        self.embedding_name = hook_point_name(model, "blocks.0.hook_resid_pre")
        self.output_names = [
            hook_point_name(model, f"blocks.{block}.hook_mlp_out") for block in range(model.cfg.n_layers)
        ]
        self.input_names: dict[int, str] = {}
        for block, sae in self.layers.items():
            check_fits(model, sae)
            name, output = (hook_point_name(model, hook) for hook in hook_names(sae))
            if output != self.output_names[block]:
                raise ValueError(
                    f"The layer given for block {block} writes at {hook_names(sae)[1]}, and the MLP of that "
                    f"block writes at {self.output_names[block]}. Name each layer by its own block."
                )
            self.input_names[block] = name
        for name in self.output_names:
            check_free(model, name)
        self._record()

    @torch.no_grad()
    def _record(self) -> None:
        model = self.model
        names = [name for name in model.hook_dict if FROZEN.fullmatch(name)]
        fixed: dict[str, Tensor] = {}
        wanted = {self.embedding_name, *self.output_names, *self.input_names.values()}
        seen: dict[str, Tensor] = {}
        final: list[Tensor] = []

        def keep(name: str) -> Change:
            def change(value: Tensor) -> None:
                seen[name] = value

            return change

        def hold(name: str) -> Change:
            def change(value: Tensor) -> Tensor:
                # A copy counts as an edit: a bridge computes a norm in another way where its scale is edited.
                fixed[name] = value.clone()
                return fixed[name]

            return change

        changes = {name: hold(name) for name in names} | {name: keep(name) for name in wanted}
        logits = self._forward(self.tokens[None], changes, final)
        without = [b for b in range(model.cfg.n_layers) if f"blocks.{b}.attn.hook_pattern" not in fixed]
        if without:
            raise ValueError(
                f"{model.cfg.model_name} does not compute the attention pattern of block {without[0]} where "
                "it can be held fixed, so that direct effects through attention are not linear here. Load it "
                "as a HookedSAETransformer, or as a bridge with eager attention."
            )
        self.fixed = fixed
        self.logits: Float[Tensor, "positions vocabulary"] = logits[0]
        self.final: Float[Tensor, "positions d_model"] = final[-1][0]
        self.embedding: Float[Tensor, "positions d_model"] = seen[self.embedding_name][0]
        self.mlp_out: list[Float[Tensor, "positions d_model"]] = [seen[n][0] for n in self.output_names]
        self.covered: dict[int, Bool[Tensor, " positions"]] = {}
        self.parts: dict[int, Parts] = {}
        self.errors: list[Float[Tensor, "positions d_model"]] = []
        self.inputs: dict[int, Float[Tensor, "positions d_in"]] = {}
        for block, y in enumerate(self.mlp_out):
            if (sae := self.layers.get(block)) is None:
                self.errors.append(y)
                continue
            x = seen[self.input_names[block]][0]
            parts = decompose(sae, x)
            covered = counted_tokens(model, sae, self.tokens).to(y.device)
            self.inputs[block], self.parts[block], self.covered[block] = x, parts, covered
            self.errors.append(y - torch.where(covered[:, None], parts.y.to(y), 0))

    def _forward(
        self, tokens: Int[Tensor, "batch positions"], changes: Mapping[str, Change], final: list[Tensor]
    ) -> Float[Tensor, "batch positions vocabulary"]:
        """A forward pass with changes at hook points; appends what is unembedded to `final`."""
        with ExitStack() as stack:
            for name, change in changes.items():
                stack.callback(
                    listen(hook_point(self.model, name), lambda _m, _a, value, change=change: change(value))
                )
            handle = self.model.unembed.register_forward_pre_hook(lambda _m, args: final.append(args[0]))
            stack.callback(handle.remove)
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "A forward hook edited hook_scale", UserWarning)
            return self.model(tokens)

    def affine(self, block: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_model"]:
        """What a layer writes that is affine in its input: its skip connection and its bias."""
        parts, sae = self.parts[block], self.layers[block]
        with own_dtype(sae.W_dec):
            skip = parts.layer.skip_out(x.to(sae.W_dec))
            return parts.bias.expand(*x.shape[:-1], -1) if skip is None else skip + parts.bias

    def run(
        self,
        embedding: Float[Tensor, "batch positions d_model"],
        written: list[Float[Tensor, "batch positions d_model"]],
    ) -> Readings:
        """What is read when the embeddings and each block's experts and error write these.

        Affine in both, and differentiable.
        """
        inputs: dict[int, Tensor] = {}
        final: list[Tensor] = []

        def hold(value: Tensor) -> Change:
            return lambda now: value.to(now).expand_as(now)

        def read(block: int) -> Change:
            def change(x: Tensor) -> None:
                inputs[block] = x

            return change

        def write(block: int) -> Change:
            def change(y: Tensor) -> Tensor:
                if block not in self.layers:
                    return written[block].to(y)
                rest = self.affine(block, inputs[block]).to(y)
                return written[block].to(y) + torch.where(self.covered[block][:, None], rest, 0)

            return change

        changes = {name: hold(value) for name, value in self.fixed.items()}
        changes[self.embedding_name] = lambda now: embedding.to(now)
        changes |= {name: read(block) for block, name in self.input_names.items()}
        changes |= {name: write(block) for block, name in enumerate(self.output_names)}
        self._forward(self.tokens.expand(len(embedding), -1), changes, final)
        return Readings(inputs, final[-1])

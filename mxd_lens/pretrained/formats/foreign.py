"""A layer out of a foreign file, in the terms of this package.

A reader gives a `ForeignLayer`: weights under our names, and metadata that says where in the model the
layer belongs. What a transcoder reads is one of three tensors, which differ on most models:

| convention | tensor | hook point |
|---|---|---|
| pre_gain | the norm's output before its gain and bias | blocks.L.ln2.hook_normalized |
| post_gain | the norm's output, which is what the MLP reads | blocks.L.mlp.hook_in |
| unnormalized | the residual stream between attention and MLP | blocks.L.hook_resid_mid |
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE
from sae_lens.util import dtype_to_str
from torch import Tensor

CONVENTIONS = {
    "pre_gain": "ln2.hook_normalized",
    "post_gain": "mlp.hook_in",
    "unnormalized": "hook_resid_mid",
}
"""What a transcoder may read, and its hook point in a block."""

NORMS_THE_MLP_OUTPUT = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)
"""Models with a norm between the MLP and the residual stream, by their names."""


@dataclass
class ForeignLayer:
    """A layer out of a foreign file."""

    weights: dict[str, Tensor]
    """W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_out], b_dec, and where there are any W_skip
    [d_out, d_in] and threshold [d_sae]."""
    activation: str
    """"relu", "topk" (of relu), "raw_topk" (of the pre-activations) or "jumprelu"."""
    k: int | None
    hook_name: str | None
    hook_name_out: str | None
    model_name: str | None
    metadata: dict[str, Any] = field(default_factory=dict)
    """What else is known: context_size, prepend_bos, exclude_special_tokens, seqpos_slice, dataset_path,
    stated_l0, scale_folded."""

    @property
    def architecture(self) -> str:
        skip = "skip_" if "W_skip" in self.weights else ""
        return f"{'jumprelu' if self.activation == 'jumprelu' else 'topk'}_{skip}transcoder"

    def config(self, device: str, dtype: str) -> dict[str, Any]:
        """The configuration, as SAELens writes one."""
        d_in, d_sae = self.weights["W_enc"].shape
        known = {
            "model_name": self.model_name,
            "hook_name": self.hook_name,
            "hook_name_out": self.hook_name_out,
            **self.metadata,
        }
        config: dict[str, Any] = {
            "architecture": self.architecture,
            "d_in": d_in,
            "d_out": self.weights["W_dec"].shape[1],
            "d_sae": d_sae,
            "dtype": dtype,
            "device": device,
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                # SAELens takes a configuration without its version for one from before version 6.
                "sae_lens_version": sae_lens_version,
                **{name: value for name, value in known.items() if value is not None},
            },
        }
        if self.activation != "jumprelu":
            config["k"] = self.k if self.activation != "relu" else None
        if self.activation == "raw_topk":
            config["relu"] = False
        return config

    def loaded(
        self, device: str = "cpu", dtype: str | None = None, overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and the weights, as SAELens' loaders give them.

        Args:
            device: where to put the weights.
            dtype: their dtype. None: that of the file.
            overrides: settings that replace those of the configuration.
        """
        dtype = dtype or dtype_to_str(self.dtype)
        config = self.config(device, dtype) | (overrides or {})
        target = getattr(torch, config["dtype"].removeprefix("torch."))
        weights = {name: w.to(device, target).contiguous() for name, w in self.weights.items()}
        return config, weights

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight."""
        dtype = self.weights["W_enc"].dtype
        for weight in self.weights.values():
            dtype = torch.promote_types(dtype, weight.dtype)
        return dtype

    def layer(self, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
        """The layer itself."""
        config, weights = self.loaded(device, dtype)
        layer = get_sae_class(config["architecture"])[0].from_dict(config)
        layer.process_state_dict_for_loading(weights)
        layer.load_state_dict(weights)
        return layer


def convention_of(hook_name: str | None) -> str | None:
    """The input convention that a hook point stands for; None where it is another tensor."""
    point = re.sub(r"^blocks\.\d+\.", "", hook_name or "")
    # HookedTransformer's hook_mlp_in fires on a copy of the residual stream, before the norm.
    point = {"hook_mlp_in": "hook_resid_mid", "ln2.hook_out": "mlp.hook_in"}.get(point, point)
    return next((name for name, candidate in CONVENTIONS.items() if candidate == point), None)


def block_of(hook_name: str | None) -> int | None:
    """The index of the block that a hook point lies in."""
    match = re.match(r"blocks\.(\d+)\.", hook_name or "")
    return int(match[1]) if match else None


def mlp_module_output(block: int, model_name: str | None) -> str:
    """The hook point of what an MLP module returns.

    hook_mlp_out is what the block adds to the residual stream. They are one tensor, except in models that
    put a norm between the two.
    """
    has_norm = NORMS_THE_MLP_OUTPUT.search(model_name or "")
    return f"blocks.{block}.{'mlp.hook_out' if has_norm else 'hook_mlp_out'}"

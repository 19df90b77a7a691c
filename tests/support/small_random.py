"""Layers with random weights for any block of the tiny model, of several architectures."""

import torch
from sae_lens.saes.sae import SAEMetadata
from tiny import D_MODEL

from mxd_lens import (
    AffineSkipMxD,
    AffineSkipMxDConfig,
    MxD,
    MxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)


def random_layer(model, block, kind, dtype=torch.float64, k=4, **settings):
    configs = {
        "mxd": (MxD, MxDConfig, {"d_hidden": 12, "hidden_activation": "silu"}),
        "gated mxd": (MxD, MxDConfig, {"d_hidden": 12, "hidden_activation": "silu", "gated": True}),
        "affine": (AffineSkipMxD, AffineSkipMxDConfig, {"d_hidden": 12, "hidden_activation": "silu"}),
        "transcoder": (TopKTranscoder, TopKTranscoderConfig, {}),
        "skip": (TopKSkipTranscoder, TopKSkipTranscoderConfig, {}),
    }
    layer_class, config, more = configs[kind]
    layer = layer_class(
        config(
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=20,
            k=k,
            dtype=str(dtype).removeprefix("torch."),
            metadata=SAEMetadata(
                model_name=model.cfg.model_name,
                hook_name=f"blocks.{block}.mlp.hook_in",
                hook_name_out=f"blocks.{block}.hook_mlp_out",
                **settings,
            ),
            **more,
        )
    )
    generator = torch.Generator().manual_seed(block)
    for parameter in layer.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
            dtype
        )
    return layer

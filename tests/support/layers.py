"""A random layer of every kind, and what its experts write by definition."""

import torch
from sae_lens import SkipTranscoder, TopKSAE, TopKSAEConfig, Transcoder
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from tiny import D_MODEL, HOOK_OUT

import mxd_lens
from mxd_lens import (
    MxD,
    MxDConfig,
    SkipMxD,
    SkipMxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)

D_SAE = 40


class CosineMixture(TopKTranscoder):
    """A formula of somebody's own, neither MxD nor transcoder: y = (C^T a) * cos(x) + b."""

    def expert_input(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos()

    def expert_weight(self, n: int) -> torch.Tensor:
        return torch.diag(self.W_dec[self.check_expert(n)])


OURS = {
    "mxd": (MxD, MxDConfig, {"d_hidden": 24}),
    "gated mxd": (MxD, MxDConfig, {"d_hidden": 24, "hidden_activation": "silu", "gated": True}),
    "skip_mxd": (SkipMxD, SkipMxDConfig, {"d_hidden": 24}),
    "topk_transcoder": (TopKTranscoder, TopKTranscoderConfig, {}),
    "topk_skip_transcoder": (TopKSkipTranscoder, TopKSkipTranscoderConfig, {}),
    "own formula": (CosineMixture, TopKTranscoderConfig, {}),
}
SAELENS_TRANSCODERS = {
    "saelens transcoder": (Transcoder, TranscoderConfig),
    "saelens skip_transcoder": (SkipTranscoder, SkipTranscoderConfig),
    "saelens jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
    "skip_transcoder that keeps its skip": (mxd_lens.SkipTranscoder, mxd_lens.SkipTranscoderConfig),
    "jumprelu_skip_transcoder that keeps its skip": (
        mxd_lens.JumpReLUSkipTranscoder,
        mxd_lens.JumpReLUSkipTranscoderConfig,
    ),
}
SAELENS = [*SAELENS_TRANSCODERS, "saelens topk", "saelens topk rescaled"]
LAYERS = [f"{name}, {k}" for name in OURS for k in ("k", "relu")] + SAELENS
NOT_MIXTURES_OF_ROWS = {
    "affine_mxd": (mxd_lens.AffineMxD, mxd_lens.AffineMxDConfig, {"d_hidden": 24}),
    "affine_skip_mxd": (mxd_lens.AffineSkipMxD, mxd_lens.AffineSkipMxDConfig, {"d_hidden": 24}),
    "molt": (mxd_lens.MOLT, mxd_lens.MOLTConfig, {"rank": 3}),
}
ALL_LAYERS = [*LAYERS, "affine_mxd, k", "affine_skip_mxd, relu", "molt, k", "molt, relu"]
"""Those, too, whose experts are not one row of W_dec each."""


def make_layer(kind: str, dtype: str = "float64", d_model: int = D_MODEL, layer: int = 1):
    """A random layer of any kind, in the place of the tiny model's second MLP."""
    settings = {"d_in": d_model, "d_sae": D_SAE, "dtype": dtype}
    hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    metadata = SAEMetadata(**hooks, exclude_special_tokens=True)
    if kind in SAELENS_TRANSCODERS:
        made, config = SAELENS_TRANSCODERS[kind]
        sae = made(config(d_out=d_model, metadata=metadata, apply_b_dec_to_input=False, **settings))
    elif kind.startswith("saelens"):
        metadata = SAEMetadata(hook_name=HOOK_OUT, exclude_special_tokens=True)
        rescaled = kind.endswith("rescaled")
        sae = TopKSAE(
            TopKSAEConfig(k=4, metadata=metadata, rescale_acts_by_decoder_norm=rescaled, **settings)
        )
    else:
        name, sparsity = kind.split(", ")
        made, config, extra = (OURS | NOT_MIXTURES_OF_ROWS)[name]
        k = 4 if sparsity == "k" else None
        sae = made(config(d_out=d_model, k=k, metadata=metadata, **settings, **extra))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in sae.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return sae.requires_grad_(False)


def written_by(sae, x: torch.Tensor, n: int) -> torch.Tensor:
    """What expert n writes, from the definition: a_n W_n^T z, or a_n c_n."""
    a = sae.encode(x)[..., n, None]
    if isinstance(sae, mxd_lens.AffineMxD):
        return a * (sae.hidden(x) @ (sae.W_out * sae.W_dec[n]) + sae.b_expert[n])
    if isinstance(sae, mxd_lens.MOLT):
        rows = slice(3 * n, 3 * n + 3)
        return a * ((x @ sae.W_read[:, rows] + sae.b_read[rows]) @ sae.W_dec[rows])
    if isinstance(sae, MxD):
        return a * (sae.hidden(x) @ sae.expert_weight(n))
    row = sae.W_dec[n]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        row = row / row.norm()
    if isinstance(sae, CosineMixture):
        row = row * x.cos()
    return a * row


def skip_of(sae, x: torch.Tensor) -> torch.Tensor:
    return x @ sae.W_skip.T if "skip" in type(sae).__name__.lower() else torch.zeros_like(x)


def close(actual, expected, tolerance: float = 1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def true_input(model, sae, tokens) -> torch.Tensor:
    cache = model.run_with_cache(tokens)[1]
    name = sae.cfg.metadata.hook_name
    return cache[name if name in cache else name.replace("hook_mlp_out", "mlp.hook_out")].to(sae.dtype)

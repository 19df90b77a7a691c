"""A language model whose one MLP is a sum of known experts, and layers that are just these experts."""

from types import SimpleNamespace

import torch
from sae_lens.saes.sae import SAEMetadata
from torch import nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from mxd_lens import MxD, MxDConfig, TopKTranscoder, TopKTranscoderConfig

BOS = 1
FIRST, N_WORDS, N_CONTEXTS, N_DEAD = 3, 12, 4, 2
VOCABULARY = FIRST + N_WORDS
D_IN = VOCABULARY + N_CONTEXTS
D_OUT = N_WORDS + N_CONTEXTS
D_SAE = D_OUT + N_DEAD
WORD, CONTEXT = 2.0, 1.0
"""What the expert of a word, and that of a context, is active by."""
HOOK_IN, HOOK_OUT = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"


class PlantedTokenizer:
    bos_token_id = eos_token_id = pad_token_id = BOS
    sep_token_id = cls_token_id = mask_token_id = unk_token_id = None
    all_special_ids = (BOS,)

    def decode(self, ids, **_) -> str:
        return "".join(f" w{int(i)}" for i in ids)


class PlantedModel(HookedRootModule):
    """x says which word a token is, and the class (id modulo 4) of the word before it; y is an MLP's.

    The MLP is a layer, given; logits are a linear map of y, and of the word.
    """

    def __init__(self, layer) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(model_name="planted", device="cpu", n_layers=1)
        self.tokenizer = PlantedTokenizer()
        self.layer = [layer]  # no submodule: its hook points are not the model's
        block = nn.Module()
        block.mlp = nn.Module()
        block.mlp.hook_in, block.hook_mlp_out = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList([block])
        generator = torch.Generator().manual_seed(1)
        self.unembed = torch.randn(D_OUT, VOCABULARY, generator=generator)
        self.setup()

    def input(self, tokens: torch.Tensor) -> torch.Tensor:
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1) % N_CONTEXTS
        words = nn.functional.one_hot(tokens, VOCABULARY)
        return torch.cat([words, nn.functional.one_hot(before, N_CONTEXTS)], dim=-1).float()

    def forward(self, tokens: torch.Tensor, stop_at_layer: int | None = None, **_) -> torch.Tensor:
        x = self.blocks[0].mlp.hook_in(self.input(tokens))
        y = self.blocks[0].hook_mlp_out(self.layer[0](x))
        return y if stop_at_layer is not None else y @ self.unembed


def plant(layer) -> None:
    """Expert w fires on word FIRST + w, expert N_WORDS + c after a word of class c; both at most once."""
    layer.W_enc.zero_()
    for w in range(N_WORDS):
        layer.W_enc[FIRST + w, w] = WORD
    for c in range(N_CONTEXTS):
        layer.W_enc[VOCABULARY + c, N_WORDS + c] = CONTEXT
    layer.b_enc.zero_()
    layer.b_enc[D_OUT:] = -1.0


def metadata() -> SAEMetadata:
    return SAEMetadata(
        model_name="planted", hook_name=HOOK_IN, hook_name_out=HOOK_OUT, exclude_special_tokens=[BOS]
    )


@torch.no_grad()
def planted_transcoder(k: int = 2) -> TopKTranscoder:
    """Every expert writes along an axis of its own; no bias."""
    cfg = TopKTranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=k, metadata=metadata())
    layer = TopKTranscoder(cfg).requires_grad_(False)
    plant(layer)
    layer.W_dec.zero_()
    layer.W_dec[:D_OUT] = torch.eye(D_OUT)
    layer.b_dec.zero_()
    return layer


@torch.no_grad()
def planted_mxd() -> MxD:
    """The same experts, of an MxD: what they write is scaled, for each word in its own way."""
    cfg = MxDConfig(
        d_in=D_IN,
        d_out=D_OUT,
        d_sae=D_SAE,
        d_hidden=D_IN,
        k=2,
        hidden_activation="relu",
        metadata=metadata(),
    )
    layer = MxD(cfg).requires_grad_(False)
    plant(layer)
    generator = torch.Generator().manual_seed(2)
    layer.W_dec.copy_(torch.randn(D_SAE, D_OUT, generator=generator))
    layer.W_dec[:D_OUT] += 4 * torch.eye(D_OUT)
    layer.W_hidden.copy_(torch.eye(D_IN))
    layer.b_hidden.zero_()
    layer.W_out.copy_(1 + 0.3 * torch.randn(D_IN, D_OUT, generator=generator))
    layer.b_dec.copy_(torch.randn(D_OUT, generator=generator))
    return layer


@torch.no_grad()
def without_experts() -> MxD:
    """An MxD that is as good, and whose experts mean nothing: the first two are always on, and equal."""
    layer = planted_mxd()
    layer.W_enc.zero_()
    layer.b_enc.zero_()
    layer.b_enc[:2] = 1.0
    layer.W_dec[:2] = 0.5
    return layer


def planted_tokens(n_sequences: int = 40, length: int = 50, seed: int = 0) -> torch.Tensor:
    """Words drawn evenly, BOS first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST, VOCABULARY, (n_sequences, length), generator=generator)
    tokens[:, 0] = BOS
    return tokens

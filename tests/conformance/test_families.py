"""Every verb on every family of models and both classes of hooked models: exact, or refused with a sentence.

"Exact" is what PyTorch's forward hooks on transformers' own modules give. docs/conformance.md is what these
tests found; `pytest tests/conformance --write-conformance` writes it anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import BLOCK, D_MODEL, FAMILIES, VOCABULARY, Family, Reference, save_family
from page import CLASSES, EXACT, VERBS, Cell, Outcomes
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from torch.nn import functional as F

from mxd_lens import (
    MxD,
    MxDConfig,
    PairedActivationsStore,
    TranscoderRunnerConfig,
    ablate,
    evaluate,
    expert_statistics,
    load_model,
    replacement_hooks,
    steer,
    top_experts,
)
from mxd_lens.analysis.attribution import direct_effects
from mxd_lens.architectures import TrainingMxDConfig
from mxd_lens.dashboards.collect.collection import CollectionConfig, collect_dashboard

HOOK_IN, HOOK_OUT = f"blocks.{BLOCK}.mlp.hook_in", f"blocks.{BLOCK}.hook_mlp_out"
TOKENS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
EXPERT = 5
MODEL_CLASSES = dict(zip(CLASSES, (HookedSAETransformer, SAETransformerBridge), strict=True))
REFUSALS = (ValueError, NotImplementedError)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.to(expected), expected, rtol=1e-4, atol=2e-4)


def layer() -> MxD:
    """A random MxD at the MLP of `BLOCK`, whose output is about as large as the MLP's."""
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    cfg = MxDConfig(
        d_in=D_MODEL, d_out=D_MODEL, d_sae=20, d_hidden=8, k=3, hidden_activation="gelu", metadata=metadata
    )
    mxd = MxD(cfg)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in mxd.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
    return mxd.requires_grad_(False)


def moved(
    mxd: MxD, coefficient: float, mode: str, expert: int = EXPERT
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The layer with an expert's coefficient moved, written out."""

    def replacement(x: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        a = mxd.encode(x).clone()
        a[..., expert] = coefficient + (a[..., expert] if mode == "add" else 0)
        return mxd.decode(a, x)

    return replacement


def train_on_pairs(model: Any, mxd: MxD, reference: Reference) -> None:
    cfg = TranscoderRunnerConfig(
        sae=TrainingMxDConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=20, d_hidden=8, k=3),
        model_name="model",
        hook_name=HOOK_IN,
        hook_name_out=HOOK_OUT,
        dataset_path="tokens",
        context_size=TOKENS.shape[1],
        prepend_bos=False,
        training_tokens=TOKENS.numel(),
        train_batch_size_tokens=TOKENS.numel(),
        store_batch_size_prompts=len(TOKENS),
        n_batches_in_buffer=len(TOKENS),
        activations_mixing_fraction=0.0,
        exclude_special_tokens=False,
    )
    store = PairedActivationsStore.from_config(model, cfg, Dataset.from_dict({"tokens": TOKENS.tolist()}))
    pairs = store.select(next(store), cfg)
    x, y = reference.pairs(TOKENS)
    close(pairs, torch.cat([x, y], dim=-1).flatten(0, 1))


def attach_by_saelens(model: Any, mxd: MxD, reference: Reference) -> None:
    expected = reference.logits(TOKENS, lambda x, _y: mxd(x))
    with model.saes(saes=[mxd]):
        close(model(TOKENS), expected)


def use_replacement_hooks(model: Any, mxd: MxD, reference: Reference) -> None:
    expected = reference.logits(TOKENS, lambda x, _y: mxd(x))
    close(model.run_with_hooks(TOKENS, fwd_hooks=replacement_hooks(mxd)), expected)


def use_evaluate(model: Any, mxd: MxD, reference: Reference) -> None:
    report = evaluate(model, mxd, TOKENS, progress=False)
    x, y = reference.pairs(TOKENS)
    for got, replacement in (
        (report.ce_loss, lambda _x, y: y),
        (report.ce_loss_replaced, lambda x, _y: mxd(x)),
        (report.ce_loss_zero_ablated, lambda _x, y: 0 * y),
    ):
        logits = reference.logits(TOKENS, replacement)
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        close(torch.tensor(got), ce)
    error = (mxd(x) - y).pow(2).sum(-1) / y.pow(2).sum(-1)
    close(torch.tensor(report.normalized_mse), error.mean())


def use_steer(model: Any, mxd: MxD, reference: Reference) -> None:
    expected = reference.logits(TOKENS, moved(mxd, 2.0, "add"))
    with steer(model, mxd, {EXPERT: 2.0}):
        close(model(TOKENS), expected)


def use_ablate(model: Any, mxd: MxD, reference: Reference) -> None:
    expected = reference.logits(TOKENS, moved(mxd, 0.0, "set"))
    with ablate(model, mxd, EXPERT):
        close(model(TOKENS), expected)


def use_top_experts(model: Any, mxd: MxD, reference: Reference) -> None:
    reading = top_experts(model, mxd, TOKENS[0], k=3)
    a = mxd.encode(reference.pairs(TOKENS[:1])[0][0])
    got = torch.zeros_like(a).scatter(1, reading.experts, reading.coefficients)
    close(got, a)


def use_statistics(model: Any, mxd: MxD, reference: Reference) -> None:
    statistics = expert_statistics(model, mxd, TOKENS, progress=False)
    a = mxd.encode(reference.pairs(TOKENS)[0]).flatten(0, 1)
    assert statistics.fired.tolist() == (a > 0).sum(0).tolist()
    close(statistics.coefficient_sum, a.sum(0).double())


def use_direct_effects(model: Any, mxd: MxD, reference: Reference) -> None:
    effects = direct_effects(model, mxd, EXPERT, TOKENS[0])
    x = reference.pairs(TOKENS[:1])[0][0, -1]
    expected = x @ mxd.W_enc[:, EXPERT] + mxd.b_enc[EXPERT]
    close(torch.tensor(effects.pre_activation), expected)
    close(torch.tensor(sum(e.effect for e in effects.effects)), expected)
    assert {e.part for e in effects.effects} >= {"embedding", "head", "mlp", "gate bias"}


def use_dashboard(model: Any, mxd: MxD, reference: Reference) -> None:
    cfg = CollectionConfig(loss_effects=True)
    a = mxd.encode(reference.pairs(TOKENS)[0])
    expert = int(a.sum((0, 1)).argmax())
    data = collect_dashboard(model, mxd, TOKENS, experts=[expert], cfg=cfg, progress=False)
    a = a[..., expert]
    (shown,) = data.experts.values() if isinstance(data.experts, dict) else data.experts
    assert shown.n_firings == (a > 0).sum() > 0
    close(torch.tensor(shown.maximum), a.max())
    top = shown.bands[0].excerpts[0]
    row = TOKENS[top.sequence : top.sequence + 1]
    close(torch.tensor(top.values), a[top.sequence, top.start : top.start + len(top.values)])
    losses = [
        F.cross_entropy(reference.logits(row, replacement)[0, :-1], row[0, 1:], reduction="none")
        for replacement in (moved(mxd, 0.0, "set", expert), lambda x, _y: mxd(x))
    ]
    effects = torch.tensor(top.loss_effects)
    known = effects.isfinite()
    close(effects[known], (losses[0] - losses[1])[top.start :][: int(known.sum())])


RUN = dict(
    zip(
        VERBS,
        (
            train_on_pairs,
            attach_by_saelens,
            use_replacement_hooks,
            use_evaluate,
            use_steer,
            use_ablate,
            use_top_experts,
            use_statistics,
            use_direct_effects,
            use_dashboard,
        ),
        strict=True,
    )
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Reference]]:
    """A family's folder and reference, made once."""
    known: dict[str, tuple[Path, Reference]] = {}

    def make(name: str) -> tuple[Path, Reference]:
        if name not in known:
            family: Family = FAMILIES[name]
            folder = save_family(family, tmp_path_factory.mktemp("family") / name.replace(" ", "-"))
            known[name] = folder, Reference(family, folder)
        return known[name]

    return make


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return request.config.stash.setdefault(Outcomes.KEY, Outcomes())


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, class_name: str, made, outcomes: Outcomes) -> None:
    """Each verb, one after the other on one model, so that the next one sees what one leaves behind."""
    folder, reference = made(name)
    try:
        model = load_model(folder, model_class=MODEL_CLASSES[class_name])
    except REFUSALS as e:
        outcomes.add(Cell(name, class_name, None), str(e))
        return
    close(model(TOKENS), reference.logits(TOKENS))
    for verb, run in RUN.items():
        try:
            run(model, layer(), reference)
        except REFUSALS as e:
            outcomes.add(Cell(name, class_name, verb), str(e))
        else:
            outcomes.add(Cell(name, class_name, verb), EXACT)
        close(model(TOKENS), reference.logits(TOKENS))


def test_the_page_says_what_was_found(outcomes: Outcomes, request: pytest.FixtureRequest) -> None:
    outcomes.check_page(request.config)

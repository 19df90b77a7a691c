"""What is tried on every model: each function, and what transformers' modules say it must give."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from families import BLOCK, D_MODEL, VOCABULARY, Reference
from page import VERBS
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.nn import functional as F

from mxd_lens import (
    MxD,
    MxDConfig,
    PairedActivationsStore,
    TranscoderRunnerConfig,
    ablate,
    evaluate,
    expert_statistics,
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


@dataclass(frozen=True)
class Case:
    """A model, a layer, and the same model in transformers."""

    model: Any
    mxd: MxD
    reference: Reference
    tolerance: float | None = None
    """None: to float32 rounding. Else the error's norm over that of what is expected."""
    keeps_error: bool = False
    """Whether the layer is attached with its error term, so that steering adds to the MLP's own output."""

    def close(self, actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        if self.tolerance is None:
            torch.testing.assert_close(actual.to(expected), expected, rtol=1e-4, atol=2e-4)
        else:
            error = (actual.double() - expected.double()).norm() / expected.double().norm()
            assert error < self.tolerance, error.item()


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


def layer_output(mxd: MxD) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer in the MLP's place, in the model's dtype."""
    return lambda x, y: mxd(x).to(y)


def moved(
    case: Case, coefficient: float, mode: str, expert: int = EXPERT
) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer with an expert's coefficient moved, written out."""
    mxd = case.mxd

    def replacement(x: Tensor, y: Tensor) -> Tensor:
        a = mxd.encode(x).clone()
        a[..., expert] = coefficient + (a[..., expert] if mode == "add" else 0)
        error = y - mxd(x) if case.keeps_error else 0
        return (mxd.decode(a, x) + error).to(y)

    return replacement


def train_on_pairs(case: Case) -> None:
    model, reference = case.model, case.reference
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
    case.close(pairs, torch.cat([x, y], dim=-1).flatten(0, 1))


def attach_by_saelens(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    expected = reference.logits(TOKENS, layer_output(mxd))
    with model.saes(saes=[mxd]):
        case.close(model(TOKENS), expected)


def use_replacement_hooks(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    expected = reference.logits(TOKENS, layer_output(mxd))
    case.close(model.run_with_hooks(TOKENS, fwd_hooks=replacement_hooks(mxd)), expected)


def use_evaluate(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    report = evaluate(model, mxd, TOKENS, progress=False)
    x, y = reference.pairs(TOKENS)
    for got, replacement in (
        (report.ce_loss, lambda _x, y: y),
        (report.ce_loss_replaced, layer_output(mxd)),
        (report.ce_loss_zero_ablated, lambda _x, y: 0 * y),
    ):
        logits = reference.logits(TOKENS, replacement)
        ce = F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        case.close(torch.tensor(got), ce)
    x, y = x.float(), y.float()
    error = (mxd(x) - y).pow(2).sum(-1) / y.pow(2).sum(-1)
    case.close(torch.tensor(report.normalized_mse), error.mean())


def use_steer(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    expected = reference.logits(TOKENS, moved(case, 2.0, "add"))
    with steer(model, mxd, {EXPERT: 2.0}):
        case.close(model(TOKENS), expected)


def use_ablate(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    expected = reference.logits(TOKENS, moved(case, 0.0, "set"))
    with ablate(model, mxd, EXPERT):
        case.close(model(TOKENS), expected)


def use_top_experts(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    reading = top_experts(model, mxd, TOKENS[0], k=3)
    a = mxd.encode(reference.pairs(TOKENS[:1])[0][0])
    got = torch.zeros_like(a).scatter(1, reading.experts, reading.coefficients.to(a))
    case.close(got, a)


def use_statistics(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    statistics = expert_statistics(model, mxd, TOKENS, progress=False)
    a = mxd.encode(reference.pairs(TOKENS)[0]).flatten(0, 1)
    assert statistics.fired.tolist() == (a > 0).sum(0).tolist()
    case.close(statistics.coefficient_sum, a.sum(0).double())


def use_direct_effects(case: Case) -> None:
    """The sum, and what each block's attention and MLP adds, with the norm's scale held fixed."""
    mxd, reference = case.mxd, case.reference
    effects = direct_effects(case.model, mxd, EXPERT, TOKENS[0])
    x = reference.pairs(TOKENS[:1])[0][0, -1].double()
    gate = mxd.W_enc[:, EXPERT].double()
    expected = gate @ x + mxd.b_enc[EXPERT].double()
    case.close(torch.tensor(effects.pre_activation), expected)
    case.close(torch.tensor(sum(e.effect for e in effects.effects)), expected)
    assert {e.part for e in effects.effects} >= {"embedding", "head", "mlp", "gate bias"}
    first_mlp = sum(e.effect for e in effects.effects if (e.part, e.layer) == ("mlp", 0))
    case.close(torch.tensor(first_mlp), reference.effect_of_first_mlp(TOKENS[:1], gate))


def use_dashboard(case: Case) -> None:
    model, mxd, reference = case.model, case.mxd, case.reference
    cfg = CollectionConfig(loss_effects=True)
    a = mxd.encode(reference.pairs(TOKENS)[0])
    expert = int(a.sum((0, 1)).argmax())
    data = collect_dashboard(model=model, sae=mxd, tokens=TOKENS, experts=[expert], cfg=cfg, progress=False)
    a = a[..., expert]
    (shown,) = data.experts.values() if isinstance(data.experts, dict) else data.experts
    assert shown.n_firings == (a > 0).sum() > 0
    case.close(torch.tensor(shown.maximum), a.max())
    top = shown.bands[0].excerpts[0]
    row = TOKENS[top.sequence : top.sequence + 1]
    case.close(torch.tensor(top.values), a[top.sequence, top.start : top.start + len(top.values)])
    losses = [
        F.cross_entropy(reference.logits(row, replacement).float()[0, :-1], row[0, 1:], reduction="none")
        for replacement in (moved(case, 0.0, "set", expert), layer_output(mxd))
    ]
    effects = torch.tensor(top.loss_effects)
    known = effects.isfinite()
    case.close(effects[known], (losses[0] - losses[1])[top.start :][: int(known.sum())])


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

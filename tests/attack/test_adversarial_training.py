"""Twenty hostile streams of activations for each architecture: none ends in a bad layer without a word.

Each training converges, is stopped with a sentence, or is reported: by `diverged` in the layer's metadata, or
by an error that an output of zero would undercut.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from small_layers import sizes_of
from torch import Tensor

from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.training.standardizer import Standardizer
from mxd_lens.training.trainer import TranscoderTrainer

D, TOKENS, STEPS = 8, 32, 60
Spoil = Callable[[int, Tensor, Tensor], Any]


def shift(step: int, x: Tensor, y: Tensor) -> None:
    if step > STEPS // 2:
        x.mul_(-30).add_(5)
        y.mul_(30)


def massive_dimension(_: int, x: Tensor, y: Tensor) -> None:
    x[:, 0] += 1e3
    y[:, 1] -= 1e3


def cauchy(_: int, x: Tensor, y: Tensor) -> None:
    heavy = torch.distributions.Cauchy(0.0, 1.0).sample((TOKENS, 1)).clamp(-1e6, 1e6)
    x.mul_(heavy)
    y.mul_(heavy)


STREAMS: dict[str, tuple[Spoil, float]] = {
    "as it should be": (lambda s, x, y: None, 1e-2),
    "one target of zero": (lambda s, x, y: y[0].zero_(), 1e-2),
    "all targets zero": (lambda s, x, y: y.zero_(), 1e-2),
    "all inputs zero": (lambda s, x, y: x.zero_(), 1e-2),
    "the same token": (lambda s, x, y: (x.copy_(x[:1].clone().expand_as(x)), y.copy_(y[:1].clone())), 1e-2),
    "targets of noise": (lambda s, x, y: y.normal_(), 1e-2),
    "tiny": (lambda s, x, y: (x.mul_(1e-20), y.mul_(1e-20)), 1e-2),
    "large": (lambda s, x, y: (x.mul_(1e6), y.mul_(1e6)), 1e-2),
    "too large": (lambda s, x, y: (x.mul_(1e19), y.mul_(1e19)), 1e-2),
    "too large once": (lambda s, x, y: x[3].mul_(1e19) if s == 30 else None, 1e-2),
    "NaN once": (lambda s, x, y: x[3].fill_(torch.nan) if s == 30 else None, 1e-2),
    "infinite once": (lambda s, x, y: y[3].fill_(torch.inf) if s == 30 else None, 1e-2),
    "one massive token": (lambda s, x, y: (x[0].mul_(1e4), y[0].mul_(1e4)), 1e-2),
    "one massive dimension": (massive_dimension, 1e-2),
    "heavy tails": (cauchy, 1e-2),
    "another distribution half way": (shift, 1e-2),
    "sparse inputs": (lambda s, x, y: x.mul_(torch.rand_like(x) < 0.05), 1e-2),
    "learning rate 1": (lambda s, x, y: None, 1.0),
    "learning rate 100": (lambda s, x, y: None, 100.0),
    "learning rate 0": (lambda s, x, y: None, 0.0),
}


def stream(spoil: Spoil) -> Iterator[Tensor]:
    torch.manual_seed(0)
    weights = torch.randn(D, D)
    step = 0
    while True:
        x = torch.randn(TOKENS, D)
        y = torch.relu(x) @ weights
        spoil(step, x, y)
        step += 1
        yield torch.cat([x, y], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_training_ends_in_a_bad_layer_without_a_word(name: str, standardized: bool) -> None:
    assert len(STREAMS) == 20
    _, _, training, config = ARCHITECTURES[name]
    sizes = {"d_in": D, "d_out": D, "d_sae": 32, "k": 4} | sizes_of(config)
    outcomes: dict[str, str] = {}
    for what, (spoil, lr) in STREAMS.items():
        torch.manual_seed(1)
        sae = training(config(**sizes))
        settings = SAETrainerConfig(
            total_training_samples=STEPS * TOKENS, train_batch_size_samples=TOKENS, lr=lr, lr_end=lr
        )
        batches = stream(spoil)
        trainer = TranscoderTrainer(cfg=settings, sae=sae, data_provider=batches)
        if standardized:
            trainer.activation_scaler = Standardizer(sae)
        try:
            trainer.fit()
        except FloatingPointError as e:
            outcomes[what] = f"stopped: {e}"
            continue
        if not all(weight.isfinite().all() for weight in sae.parameters()):
            outcomes[what] = "refused when it is saved"
            continue
        # What the layer does, without anything of the trainer's.
        errors = []
        for _ in range(21):
            x, y = next(batches).split(D, dim=1)
            with torch.no_grad():
                squared_error = (sae(x).double() - y.double()).pow(2).sum()
            errors.append(float(squared_error / y.double().pow(2).sum().clamp_min(1e-60)))
        error = median(errors)
        metadata = sae.cfg.metadata
        if metadata.diverged or not metadata.worst_error < 1:
            outcomes[what] = f"reported: {metadata.last_error:.3g}, up to {metadata.worst_error:.3g}"
        elif error < 1.1 or not y.any():
            outcomes[what] = f"converged: {error:.3g}"
        else:
            outcomes[what] = f"SILENT: {error:.3g}, and the layer says {metadata.last_error:.3g}"
    for what, outcome in outcomes.items():
        print(f"{name:28} {'standardized' if standardized else '':14} {what:32} {outcome[:100]}")  # noqa: T201
    assert not [what for what, outcome in outcomes.items() if outcome.startswith("SILENT")]
    assert outcomes["as it should be"].startswith("converged")

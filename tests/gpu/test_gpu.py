"""What runs on a GPU gives what the CPU gives: kernels at real sizes, training steps, runners, evaluation.

`make test-gpu` runs these and the kernels' own tests on the device.
"""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import TrainStepInput
from small_layers import sizes_of
from torch import Tensor

from mxd_lens import TranscoderRunnerConfig, TranscoderTrainingRunner, evaluate, frontier, load_model, sparse
from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.evals.frontier import CONTENDERS
from mxd_lens.sparse import first_use, reference, sparse_decode, topk_gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D_MODEL = 16
HOOK_IN, HOOK_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
TRAINING = [training for *_, training, _ in ARCHITECTURES.values()]

# From the mean of d random signs: the sums' own rounding, relative to the largest entry.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    """float32 products in float32: TF32's error would hide that of the kernels."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """A fallback to the reference is a failure of these tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The triton kernels failed", RuntimeWarning)
        yield


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
def test_the_first_use_check_passes(dtype: torch.dtype) -> None:
    first_use.agrees_with_reference.cache_clear()
    assert first_use.agrees_with_reference("triton", CUDA, dtype)
    assert sparse._by_device(CUDA, dtype) == "triton"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "d_sae", "k"),
    [
        (4096, 576, 576, 18_432, 32),
        (2048, 768, 768, 24_576, 8),
        (2048, 2048, 2048, 16_384, 128),
        (999, 577, 1153, 5_001, 33),
    ],
)
def test_values_and_gradients_at_real_sizes(
    tokens: int, d_in: int, d_out: int, d_sae: int, k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA, dtype=torch.float64).to(dtype)

    inputs = [
        normal(tokens, d_in),
        normal(d_sae, d_in).T / d_in**0.5,
        normal(d_sae) / 10,
        torch.nn.functional.normalize(normal(d_sae, d_out), dim=-1),
    ]
    weight = normal(tokens, d_out)

    x, W_enc, b_enc, W_dec = leaves = [t.clone().requires_grad_() for t in inputs]
    values, indices = topk_gate(x, W_enc, b_enc, k)
    mixture = sparse_decode(values, indices, W_dec, unit_rows=True)
    gradients = torch.autograd.grad(mixture, leaves, weight)

    x, W_enc, b_enc, W_dec = exact_leaves = [t.double().requires_grad_() for t in inputs]
    pre = (x @ W_enc + b_enc).relu()
    exact_values = pre.gather(-1, indices)
    exact = reference.sparse_decode(exact_values, indices, W_dec, unit_rows=True)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, weight.double())

    assert_near(values.sort(descending=True).values, pre.topk(k).values, dtype)
    assert_near(mixture, exact, dtype)
    for ours, expected in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, expected, dtype)


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = (ours.double() - exact).norm() / exact.norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2g}"


@pytest.mark.parametrize("training", TRAINING, ids=lambda c: c.__name__)
@pytest.mark.parametrize("k", [4, None])
def test_a_training_step_is_the_cpus(training: Any, k: int | None) -> None:
    config = next(config for *_, made, config in ARCHITECTURES.values() if made is training)
    l1 = 0.0 if k else 1e-3
    sizes = {"d_in": 12, "d_out": 20, "d_sae": 60, "k": k, "l1_coefficient": l1} | sizes_of(config)
    cfg = config(**sizes)
    torch.manual_seed(0)
    on_cpu = training(cfg)
    with torch.no_grad():
        for parameter in on_cpu.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    on_gpu = copy.deepcopy(on_cpu).to(CUDA)
    pairs = torch.randn(50, 32)
    losses = []
    for layer in (on_cpu, on_gpu):
        step = layer.training_forward_pass(
            TrainStepInput(
                sae_in=pairs.to(layer.device),
                coefficients={"l1": l1},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        step.loss.backward()
        losses.append(step.loss.detach().cpu())
    torch.testing.assert_close(*losses)
    for a, b in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-3, atol=1e-6)


@pytest.fixture
def gpu_model(tiny_folder: Path) -> HookedSAETransformer:
    return load_model(tiny_folder, "cuda")


def runner_config(training: Any, **settings: Any) -> TranscoderRunnerConfig:
    config = next(config for *_, made, config in ARCHITECTURES.values() if made is training)
    return TranscoderRunnerConfig(
        sae=config(**{"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 40, "k": 4} | sizes_of(config)),
        model_name="llama-of-words",
        hook_name=HOOK_IN,
        hook_name_out=HOOK_OUT,
        dataset_path="words",
        training_tokens=2_048,
        train_batch_size_tokens=256,
        context_size=16,
        n_batches_in_buffer=32,
        lr=1e-3,
        lr_warm_up_steps=1,
        n_checkpoints=0,
        **settings,
    )


@pytest.mark.parametrize("training", TRAINING, ids=lambda c: c.__name__)
def test_a_run_on_the_gpu_ends_where_the_cpus_ends(
    training: Any, tiny_folder: Path, words: list[str], tmp_path: Path
) -> None:
    layers = []
    for device in ("cpu", "cuda"):
        cfg = runner_config(
            training,
            device=device,
            act_store_device=device,
            llm_device=device,
            output_path=str(tmp_path / str(len(layers))),
        )
        model = load_model(tiny_folder, device)
        layers.append(TranscoderTrainingRunner(cfg, Dataset.from_dict({"text": words}), model).run())
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=1e-3)


def test_a_layer_on_the_gpu_is_attached_and_evaluated(
    gpu_model: HookedSAETransformer, tiny_folder: Path
) -> None:
    cfg = runner_config(TRAINING[0])
    torch.manual_seed(0)
    sae = TRAINING[0](cfg.sae).to(CUDA)
    for name in ("model_name", "hook_name", "hook_name_out"):
        sae.cfg.metadata[name] = getattr(cfg, name)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(3, 18, (4, 16), device=CUDA)
    seen = {}
    gpu_model.run_with_hooks_with_saes(
        tokens,
        saes=[sae],
        fwd_hooks=[
            (HOOK_IN, lambda x, hook: seen.update(x=x)),
            (f"{HOOK_OUT}.hook_sae_output", lambda y, hook: seen.update(y=y)),
        ],
    )
    torch.testing.assert_close(seen["y"], sae(seen["x"]))
    report = evaluate(gpu_model, sae, tokens, progress=False)
    on_cpu = evaluate(sae.to("cpu"), load_model(tiny_folder), tokens.cpu(), progress=False)
    assert report.normalized_mse == pytest.approx(on_cpu.normalized_mse, rel=1e-4)
    assert report.ce_loss_replaced == pytest.approx(on_cpu.ce_loss_replaced, rel=1e-4)


def test_a_frontier_on_the_gpu(gpu_model: HookedSAETransformer, words: list[str], tmp_path: Path) -> None:
    result = frontier(
        gpu_model,
        Dataset.from_dict({"text": words}),
        {"random": torch.randint(3, 18, (4, 16))},
        tmp_path,
        layers=[1],
        ks=[4],
        contenders={name: made for name, made in CONTENDERS.items() if made.reads == "input"},
        training_tokens=1_024,
        batch=128,
        run_settings={"device": "cuda", "context_size": 16, "n_batches_in_buffer": 32},
    )
    assert not result.failures
    assert all("random" in point.reports for point in result.points)


def test_equal_runs_give_equal_bits() -> None:
    def gradients() -> tuple[Tensor, ...]:
        generator = torch.Generator(CUDA).manual_seed(0)
        leaves = [
            torch.randn(*shape, generator=generator, device=CUDA).requires_grad_()
            for shape in ((512, 64), (64, 2048), (2048,), (2048, 64))
        ]
        values, indices = topk_gate(*leaves[:3], 16)
        return torch.autograd.grad(sparse_decode(values, indices, leaves[3]).pow(2).sum(), leaves)

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)

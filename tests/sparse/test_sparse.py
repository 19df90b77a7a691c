"""Every implementation against the formula, in float64, through torch's own autograd.

Triton's kernels run on the GPU where there is one, in Triton's interpreter elsewhere.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mxd_lens import sparse
from mxd_lens.sparse import cpu, pre_activations, sparse_decode, sparse_encode, topk_gate

IMPLEMENTATIONS = [
    "reference",
    "cpu",
    pytest.param(
        "triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
    ),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(params=IMPLEMENTATIONS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forces one implementation, with blocks small enough for several; where it runs."""
    if request.param != "reference":
        module = cpu
        if request.param == "triton":
            from mxd_lens.sparse import triton as module
        monkeypatch.setattr(module, "_BLOCK", 1)
    monkeypatch.setattr(cpu, "_ROWS", 16)
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with sparse.implementation(request.param):
        yield "cuda" if on_gpu else "cpu"


class Layer(NamedTuple):
    """x, W_enc, b_enc and unit-norm W_dec, each a leaf that wants its gradient."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


def make(
    batch: tuple[int, ...],
    d_in: int,
    d_out: int,
    d_sae: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    bias: float = 0.0,
    transposed: bool = True,
) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, b_enc = normal(*batch, d_in), normal(d_sae) * 0.1 + bias
    W_enc = normal(d_sae, d_in).T / d_in**0.5
    W_dec = F.normalize(normal(d_sae, d_out), dim=-1)
    if not transposed:
        W_enc = W_enc.contiguous()
    return Layer(*(t.to(device, dtype).requires_grad_() for t in (x, W_enc, b_enc, W_dec)))


def formula(layer: Layer, indices: Tensor, unit_rows: bool) -> tuple[Tensor, Tensor]:
    """relu(x W_enc + b_enc) at these indices, and C^T a: dense, from the paper's formula."""
    pre = layer.x @ layer.W_enc + layer.b_enc
    a = torch.zeros_like(pre).scatter(-1, indices, pre.relu().gather(-1, indices))
    W_dec = layer.W_dec
    if unit_rows:
        along = W_dec.detach()
        W_dec.register_hook(lambda grad: grad - (grad * along).sum(-1, keepdim=True) * along)
    return pre.relu(), a @ W_dec


def backward(outputs: tuple[Tensor, ...]) -> None:
    """One backward pass with fixed, unequal gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True)).backward()


def doubled(layer: Layer) -> Layer:
    return Layer(*(t.detach().double().requires_grad_() for t in layer))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    tolerance = TOLERANCE[dtype] * scale
    torch.testing.assert_close(actual.to(expected), expected, atol=tolerance, rtol=0)


CASES = {
    "one token": ((), 3, 5, 7, 2),
    "k = 1, groups of groups": ((3,), 8, 1, 300, 1),
    "k = N": ((2, 3), 16, 9, 9, 9),
    "no tokens": ((0,), 4, 3, 10, 2),
    "no tokens in a batch": ((2, 0), 4, 3, 10, 2),
    "wider than a block": ((2, 3), 300, 270, 40, 2),
    "more tokens than a block, many candidates": ((70,), 6, 7, 133, 2),
}


VARIANTS = [("random", dtype, unit_rows) for dtype in TOLERANCE for unit_rows in (False, True)]
VARIANTS += [(name, torch.float64, True) for name in ("equal tokens", "ties", "few positive")]


@pytest.mark.parametrize(("inputs", "dtype", "unit_rows"), VARIANTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_the_formulas(
    device: str, case: tuple, dtype: torch.dtype, unit_rows: bool, inputs: str
) -> None:
    batch, d_in, d_out, d_sae, k = case
    bias = -2.0 if inputs == "few positive" else 0.0
    layer = make(batch, d_in, d_out, d_sae, dtype, device, bias)
    with torch.no_grad():
        if inputs == "equal tokens":
            layer.x.copy_(layer.x.mean(tuple(range(layer.x.ndim - 1)), keepdim=True))
        if inputs == "ties":
            layer.W_enc.copy_(layer.W_enc[:, :1].clone())
            layer.b_enc.zero_()

    values, indices = topk_gate(layer.x, layer.W_enc, layer.b_enc, k)
    mixture = sparse_decode(values, indices, layer.W_dec, unit_rows=unit_rows)
    backward((values, mixture))

    assert indices.dtype == torch.int64
    assert (values.dtype, mixture.dtype) == (dtype, dtype)
    exact = doubled(layer)
    post, expected_mixture = formula(exact, indices, unit_rows)
    expected_values = post.gather(-1, indices)
    backward((expected_values, expected_mixture))
    assert all(len(set(row)) == k for row in indices.reshape(-1, k).tolist())
    assert_close(values.sort().values, post.topk(k).values.flip(-1), dtype)
    assert_close(values, expected_values, dtype)
    assert_close(mixture, expected_mixture, dtype)
    for actual, expected in zip(layer, exact, strict=True):
        assert actual.grad is not None
        assert_close(actual.grad, expected.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_chosen_pre_activations_are_the_formulas(device: str, case: tuple, dtype: torch.dtype) -> None:
    batch, d_in, d_out, d_sae, k = case
    layer = make(batch, d_in, d_out, d_sae, dtype, device)
    generator = torch.Generator().manual_seed(5)
    indices = torch.randint(0, d_sae, (*batch, k), generator=generator).to(device)
    values = sparse_encode(layer.x, layer.W_enc, layer.b_enc, indices)
    backward((values,))
    assert values.dtype == dtype
    exact = doubled(layer)
    expected = (exact.x @ exact.W_enc + exact.b_enc).relu().gather(-1, indices)
    backward((expected,))
    assert_close(values, expected, dtype)
    for actual, expected_of in zip(layer[:3], exact[:3], strict=True):
        assert_close(actual.grad, expected_of.grad, dtype)


def test_blocks_of_pre_activations_are_the_formulas(device: str) -> None:
    layer = make((150,), 6, 5, 20, device=device)
    blocks = [block.clone() for block in pre_activations(layer.x, layer.W_enc, layer.b_enc)]
    torch.testing.assert_close(torch.cat(blocks), (layer.x @ layer.W_enc + layer.b_enc).detach())


def test_products_of_rows_without_torchs_private_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    left, right = torch.randn(2, 9, 7, generator=generator)
    left_rows, right_rows = torch.randint(0, 9, (2, 5_000), generator=generator)
    fast = cpu.dot_products(left, left_rows, right, right_rows)
    monkeypatch.setattr(cpu, "_embedding_bag_product", lambda: None)
    torch.testing.assert_close(cpu.dot_products(left, left_rows, right, right_rows), fast)
    torch.testing.assert_close(fast, (left[left_rows] * right[right_rows]).sum(-1))
    assert len(cpu.dot_products(left, left_rows[:0], right, right_rows[:0])) == 0


def test_gradcheck(device: str) -> None:
    layer = make((2,), 3, 2, 6, device=device)

    def mixture(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = topk_gate(x, W_enc, b_enc, 2)
        return values, sparse_decode(values, indices, W_dec)

    assert torch.autograd.gradcheck(mixture, tuple(layer))


def test_an_index_may_occur_twice(device: str) -> None:
    _, _, _, W_dec = make((), 1, 4, 6, device=device)
    values = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64, device=device)
    indices = torch.tensor([[5, 2, 5]], device=device)
    mixture = sparse_decode(values.requires_grad_(), indices, W_dec)
    torch.testing.assert_close(mixture, 5 * W_dec[5:] + 2 * W_dec[2:3])
    mixture.sum().backward()
    expected = torch.zeros_like(W_dec).index_fill(0, indices[0, :1], 5.0)
    torch.testing.assert_close(W_dec.grad, expected.index_fill(0, indices[0, 1:2], 2.0))
    torch.testing.assert_close(values.grad, W_dec.detach().sum(-1)[indices])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(device: str, dtype: torch.dtype) -> None:
    """Adding ones one by one in half precision stops at 256 (bfloat16) or 2048 (float16)."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device, requires_grad=True)

    W_enc, b_enc, W_dec = ones(1, 1), ones(1), ones(1, 1)
    topk_gate(ones(3000, 1).detach(), W_enc, b_enc, 1)[0].sum().backward()
    indices = torch.zeros(150, 20, dtype=torch.int64, device=device)
    sparse_decode(ones(150, 20).detach(), indices, W_dec).sum().backward()
    for weight in (W_enc, b_enc, W_dec):
        assert weight.grad is not None
        assert weight.grad.item() == pytest.approx(3000, rel=0.01)


@pytest.mark.parametrize("wanted", range(4), ids=Layer._fields)
def test_only_wanted_gradients_arise(device: str, wanted: int) -> None:
    layer = make((4,), 3, 5, 9, device=device)
    for position, tensor in enumerate(layer):
        tensor.requires_grad_(position == wanted)
    values, indices = topk_gate(layer.x, layer.W_enc, layer.b_enc, 2)
    backward((sparse_decode(values, indices, layer.W_dec),))
    assert [t.grad is not None for t in layer] == [p == wanted for p in range(4)]


@pytest.mark.parametrize("transposed", [True, False])
def test_either_layout_of_the_encoder(device: str, transposed: bool) -> None:
    layer, usual = (make((70,), 6, 5, 40, transposed=t, device=device) for t in (transposed, True))
    for one in (layer, usual):
        values, indices = topk_gate(one.x, one.W_enc, one.b_enc, 2)
        backward((sparse_decode(values, indices, one.W_dec),))
    assert layer.W_enc.grad.stride() == layer.W_enc.stride()
    for actual, expected in zip(layer, usual, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_equal_runs_give_equal_bits(device: str) -> None:
    def gradients() -> list[Tensor]:
        layer = make((64,), 6, 5, 40, torch.float32, device)
        values, indices = topk_gate(layer.x, layer.W_enc, layer.b_enc, 4)
        backward((sparse_decode(values, indices, layer.W_dec, unit_rows=True),))
        return [t.grad for t in layer]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_nothing_of_batch_times_experts_exists(device: str, request: pytest.FixtureRequest) -> None:
    tokens, d_sae = 160, 60
    layer = make((tokens,), 6, 5, d_sae, device=device)
    with _Largest() as forward:
        values, indices = topk_gate(layer.x, layer.W_enc, layer.b_enc, 2)
        mixture = sparse_decode(values, indices, layer.W_dec, unit_rows=True)
    with _Largest() as backwards:
        mixture.sum().backward()
    dense = "reference" in request.node.name
    assert (forward.elements >= tokens * d_sae) == dense
    assert (backwards.elements >= tokens * d_sae) == dense


def test_no_second_derivative(device: str, request: pytest.FixtureRequest) -> None:
    if "reference" in request.node.name:
        pytest.skip("the reference is plain torch")
    layer = make((2,), 3, 5, 9, device=device)
    values, _ = topk_gate(layer.x, layer.W_enc, layer.b_enc, 2)
    (grad,) = torch.autograd.grad((values**2).sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_sets_the_dtype(device: str) -> None:
    layer = make((4,), 3, 5, 9, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        values, indices = topk_gate(layer.x, layer.W_enc, layer.b_enc, 2)
        mixture = sparse_decode(values, indices, layer.W_dec)
    assert (values.dtype, mixture.dtype) == (torch.bfloat16, torch.bfloat16)
    mixture.sum().backward()
    assert layer.W_enc.grad.dtype == torch.float32


def test_a_compiled_step_has_the_same_gradients() -> None:
    def loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        values, indices = topk_gate(x * 2, W_enc, b_enc, 2)
        return (sparse_decode(values, indices, W_dec, unit_rows=True) ** 2).mean()

    compiled, plain = (make((4,), 3, 5, 9) for _ in range(2))
    torch.compile(loss, backend="eager")(*compiled).backward()
    loss(*plain).backward()
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_errors_name_what_was_given() -> None:
    x, W_enc, b_enc, W_dec = make((4,), 3, 5, 9)
    values, indices = topk_gate(x, W_enc, b_enc, 2)
    with pytest.raises(ValueError, match=r"\[4, 2\]"):
        topk_gate(x[:, :2], W_enc, b_enc, 2)
    with pytest.raises(ValueError, match="between 1 and d_sae = 9, not 10"):
        topk_gate(x, W_enc, b_enc, 10)
    with pytest.raises(ValueError, match=r"x torch.float32, W_enc torch.float64"):
        topk_gate(x.float(), W_enc, b_enc, 2)
    with pytest.raises(ValueError, match=r"\[4, 2\], \[4, 1\] and \[9, 5\]"):
        sparse_decode(values, indices[:, :1], W_dec)
    with pytest.raises(ValueError, match="sparse_encode takes indices"):
        sparse_encode(x, W_enc, b_enc, indices[:1])
    with pytest.raises(ValueError, match="'fast'"), sparse.implementation("fast"):  # type: ignore[arg-type]
        pass

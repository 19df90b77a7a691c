"""Kernels are compared with the formulas before they are used, and left out where they fail."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from mxd_lens import sparse
from mxd_lens.sparse import cpu, first_use

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No answer of one test is remembered in another."""
    first_use.agrees_with_reference.cache_clear()
    yield
    first_use.agrees_with_reference.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_working_kernels_pass(name: str, dtype: torch.dtype) -> None:
    if find_spec(name) is None and name == "triton":
        pytest.skip("triton is not installed")
    device = torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings(), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        warnings.simplefilter("error", RuntimeWarning)
        assert first_use.agrees_with_reference(name, device, dtype)


@pytest.mark.parametrize("kernel", ["weighted_sums", "dot_products"])
@pytest.mark.parametrize("wrong", ["one entry", "nan", "raises"])
def test_kernels_that_differ_or_fail_are_left_out(
    monkeypatch: pytest.MonkeyPatch, kernel: str, wrong: str
) -> None:
    original = getattr(cpu, kernel)

    def broken(*args: Any) -> torch.Tensor:
        if wrong == "raises":
            raise OSError("no C compiler")
        result = original(*args)
        result.view(-1)[-1] += 1 if wrong == "one entry" else torch.nan
        return result

    monkeypatch.setattr(cpu, kernel, broken)
    with pytest.warns(RuntimeWarning, match="no C compiler" if wrong == "raises" else "relative error"):
        assert not first_use.agrees_with_reference("cpu", CPU, torch.float32)
    with warnings.catch_warnings():  # asked once
        warnings.simplefilter("error")
        assert not first_use.agrees_with_reference("cpu", CPU, torch.float32)


@pytest.mark.parametrize("agrees", [True, False])
def test_a_gpu_gets_triton_only_after_the_check(monkeypatch: pytest.MonkeyPatch, agrees: bool) -> None:
    asked = []
    monkeypatch.setattr(sparse, "find_spec", lambda name: name)
    monkeypatch.setattr(
        first_use, "agrees_with_reference", lambda *args: asked.append(args) or agrees, raising=True
    )
    gpu = torch.device("cuda", 1)
    assert sparse._by_device(gpu, torch.bfloat16) == ("triton" if agrees else "reference")
    assert asked == [("triton", gpu, torch.bfloat16)]
    assert sparse._by_device(CPU, torch.float32) == "cpu"
    monkeypatch.setattr(sparse, "find_spec", lambda name: None)
    assert sparse._by_device(gpu, torch.float32) == "reference"

"""Tests that need a CUDA device; `make test-gpu` runs them and the kernels' own tests there."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    """float32 products in float32: TF32's error would hide that of the kernels."""
    torch.set_float32_matmul_precision("highest")

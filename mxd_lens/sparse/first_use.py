"""Whether kernels compute what the formulas say, tried once per device and dtype, before they are used."""

import warnings
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mxd_lens.sparse import autograd, reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}
"""Largest error over the largest entry. float32 products may run in TF32, whose error is about 1e-3."""
HALF_PRECISION_TOLERANCE = 5e-2

_TOKENS, _D_IN, _D_OUT, _D_SAE, _K = 40, 48, 272, 640, 3
"""Small, but more than a block of the kernels in each direction."""


@cache
def agrees_with_reference(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an implementation compiles here and agrees with the formulas, values and gradients.

    The comparison is made in float64 on the CPU, once for each device and dtype. A warning says why
    where the answer is no.

    Args:
        implementation: a module of this package with the three functions of `autograd.Kernels`.
        device: where its kernels would run.
        dtype: in which.
    """
    try:
        error = largest_error(implementation, device, dtype)
    # Whatever a compiler or a driver may raise: the reference still works.
    except Exception as e:
        reason = f"{type(e).__name__}: {e}"
    else:
        tolerance = TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE)
        if error <= tolerance:
            return True
        reason = f"relative error {error:.2g}, expected at most {tolerance:.2g}"
    warnings.warn(
        f"The {implementation} kernels failed their check on {device} in {dtype} ({reason}). "
        "The dense reference is used instead: results are right, training is slower and takes more memory.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@torch.enable_grad()
def largest_error(implementation: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a gate, a decode and their gradients, relative to the largest exact entry.

    NaN counts as an infinite error.
    """
    kernels = import_module(f"mxd_lens.sparse.{implementation}")
    generator = torch.Generator().manual_seed(0)
    # A layer may be used for the first time under autocast or in inference mode.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        inputs = [
            normal(_TOKENS, _D_IN),
            normal(_D_SAE, _D_IN).T / _D_IN**0.5,
            normal(_D_SAE) / 10,
            torch.nn.functional.normalize(normal(_D_SAE, _D_OUT), dim=-1),
        ]
        x, W_enc, b_enc, W_dec = here = [t.to(device).requires_grad_() for t in inputs]
        values, indices = autograd.topk_gate(kernels, x, W_enc, b_enc, _K)
        mixture = autograd.sparse_decode(kernels, values, indices, W_dec, unit_rows=True)
        weights = [normal(_TOKENS, _K), normal(_TOKENS, _D_OUT)]
        gradients = torch.autograd.grad([values, mixture], here, [w.to(device) for w in weights])

        # The same entries: which of two nearly equal ones is chosen depends on rounding.
        chosen = indices.cpu()
        x, W_enc, b_enc, W_dec = there = [t.double().requires_grad_() for t in inputs]
        pre = (x @ W_enc + b_enc).relu()
        expected_values = pre.gather(-1, chosen)
        expected_mixture = reference.sparse_decode(expected_values, chosen, W_dec, unit_rows=True)
        expected = torch.autograd.grad(
            [expected_values, expected_mixture], there, [w.double() for w in weights]
        )
    largest = pre.topk(_K).values
    pairs = [
        (values.sort(descending=True).values, largest),
        (values, expected_values),
        (mixture, expected_mixture),
        *zip(gradients, expected, strict=True),
    ]
    errors = torch.stack(
        [(ours.cpu().double() - exact).abs().max() / exact.abs().max() for ours, exact in pairs]
    )
    return errors.nan_to_num(float("inf")).max().item()

"""The benchmarks compare layers that do the same work, and keep and show what they measured."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import train_step
from benchmarks.contestants import CONTESTANTS, MxD, ReferenceMxD, Size, missing_package
from benchmarks.growth_page import growing, write_growth_page
from benchmarks.train_step import Report, Result, Setting, Timing

SIZE = Size(d=12, n_experts=40, d_hidden=16, k=4, batch=30)


def result(name: str, size: Size) -> Result:
    return Result(name, size, 1000, Timing(0.2, 0.1, 0.4), Timing(0.1, 0.1, 0.1), 2_000_000)


def test_the_mxd_and_the_reference_have_equal_losses_and_gradients():
    """But for the component of W_dec's gradient along its unit rows, which the MxD's training removes."""
    torch.manual_seed(0)
    reference = ReferenceMxD(SIZE).double()
    reference.W_dec.data /= reference.W_dec.data.norm(dim=-1, keepdim=True)
    ours = MxD(SIZE).to(dtype=torch.float64)
    ours.sae.load_state_dict(reference.state_dict())
    x, y = torch.randn(2, SIZE.batch, SIZE.d, dtype=torch.float64)

    def gradients(layer: ReferenceMxD | MxD) -> tuple[Tensor, dict[str, Tensor]]:
        loss = layer(*layer.inputs(x, y))
        loss.backward()
        return loss, {name.removeprefix("sae."): p.grad for name, p in layer.named_parameters()}

    (expected_loss, expected), (loss, actual) = gradients(reference), gradients(ours)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    rows = reference.W_dec.detach()
    along = (expected["W_dec"] * rows).sum(-1, keepdim=True) * rows
    assert along.abs().max() > 0.01 * expected["W_dec"].abs().max()
    expected["W_dec"] -= along
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_has_as_many_parameters_and_gradients_everywhere(name):
    if package := missing_package(name):
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    layer, reference = CONTESTANTS[name](SIZE), ReferenceMxD(SIZE)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in reference.parameters())
    layer(*layer.inputs(*torch.randn(2, SIZE.batch, SIZE.d))).backward()
    without = {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == ({"W_enc", "b_enc", "W_dec"} if name == "floor" else set())


def test_an_interrupted_sweep_leaves_what_it_has(tmp_path, monkeypatch):
    def measure(names, size, setting, rounds, advance):
        if size.n_experts > train_step.SWEEP_N[0]:
            raise KeyboardInterrupt
        return [result(name, size) for name in names]

    file = tmp_path / "sweep.json"
    monkeypatch.setattr(train_step, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["train_step", "--sweep", "--only", "MxD", "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        train_step.main()
    size = replace(train_step.SIZES["gpt2"], n_experts=train_step.SWEEP_N[0])
    assert Report.load(file).results == [result("MxD", size)]


def test_the_page_shows_each_sweep_and_every_number(tmp_path):
    """The size that both sweeps share is a point of each."""
    sizes = [replace(SIZE, n_experts=n) for n in (10, 80)] + [replace(SIZE, k=k) for k in (2, 4, 8)]
    results = [result(name, size) for size in sizes for name in ("reference MxD", "MxD")]
    sweep = Report(train_step.machine(Setting("cpu", torch.float32)), 3, results)
    assert [r.size.n_experts for r in growing(sweep, "n_experts")[::2]] == [10, 40, 80]
    assert [r.size.k for r in growing(sweep, "k")[::2]] == [2, 4, 8]
    alone = replace(sweep, results=results[:2])
    assert growing(alone, "n_experts") == growing(alone, "k") == []

    page = write_growth_page(tmp_path / "page.html", [alone, sweep]).read_text(encoding="utf-8")
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert markup.count("<td>MxD</td>") == 6
    assert "d 12, N 80, H 16, K 4, batch 30" in markup
    assert "experts N" in page
    assert "active experts K" in page
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<script[^>]*src=", page)

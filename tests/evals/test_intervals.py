"""Bootstrap intervals against what is known of the mean."""

import pytest
import torch

from mxd_lens.evals.intervals import difference, mean_interval, ratio


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 5
    found = mean_interval(values)
    error = 1.96 * (values.std() / 400**0.5).item()
    assert found.mean == pytest.approx(values.mean().item())
    assert found.low == pytest.approx(found.mean - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + error, abs=0.1 * error)


def test_it_covers_the_true_mean_in_19_of_20_texts() -> None:
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        values = torch.rand(60, generator=generator)
        found = mean_interval(values)
        covered += found.low <= 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_pairs_cancel_what_sequences_have_in_common() -> None:
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(100, generator=generator) * 10 + 50
    ours, theirs = common, common + 1 + 0.1 * torch.randn(100, generator=generator)
    found = difference(ours, theirs)
    assert -1.03 < found.low < found.mean < found.high < -0.97
    assert mean_interval(ours).high - mean_interval(ours).low > 3
    assert ratio(2 * common, common).high == pytest.approx(2)


def test_one_sequence_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two sequences or more"):
        mean_interval(torch.ones(1))

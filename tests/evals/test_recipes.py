"""Recipes and presets, and the plan of a sweep."""

import pytest

from mxd_lens.evals.frontier import CONTENDERS, Size, plan
from mxd_lens.evals.recipes import PRESETS, RECIPES


def test_learning_rates_follow_the_width() -> None:
    tuned, paper = RECIPES["tuned"], RECIPES["paper"]
    assert tuned.learning_rate(128) == tuned.learning_rate(4_608) == 4e-3
    assert tuned.learning_rate(4 * 4_608) == pytest.approx(2e-3)
    assert paper.learning_rate(98_304) == 4e-4
    assert paper.settings(100_000, 24_576) == {
        "lr": 4e-4,
        "lr_warm_up_steps": 5_000,
        "lr_decay_steps": 0,
        "standardize_activations": False,
    }
    assert tuned.settings(1_000, 4_608)["lr_warm_up_steps"] == 50


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_the_papers_sizes(name: str) -> None:
    preset = PRESETS[name]
    size = Size(preset.d_model, preset.d_model, preset.d_hidden, preset.transcoder_width)
    budget = preset.transcoder_width * (2 * preset.d_model + 1) + preset.d_model
    planned = plan(size, [preset.layer], preset.ks, [0], preset.tokens, preset.batch, RECIPES[preset.recipe])
    assert [a["label"] for a in planned.architectures] == [c.label for c in CONTENDERS.values()]
    for architecture in planned.architectures:
        assert 0.98 * budget < architecture["n_parameters"] <= budget
        assert architecture["n_layers"] == len(preset.ks)
    (table,) = planned.tables
    if name == "paper-gpt2":
        assert table.rows[0] == ["MxD", "21,504", "37,774,080", "0.0004", 6]
        assert "117,187 steps" in table.title

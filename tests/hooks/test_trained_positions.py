"""One rule of positions, in a layer's metadata, that every measurement and every way of attaching follows."""

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import (
    TopKTranscoder,
    TopKTranscoderConfig,
    evaluate,
    expert_statistics,
    replacement_hooks,
    steer,
    trained_positions,
)

TOKENS = torch.tensor([[1, 3, 4, 5, 6, 7], [1, 8, 9, 2, 10, 11]])
"""BOS is 1, and 2 is EOS."""


def layer_of(**metadata: Any) -> TopKTranscoder:
    made = TopKTranscoder(
        TopKTranscoderConfig(
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=24,
            k=4,
            metadata=SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT, **metadata),
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return made


RULES = {
    "all": ({}, [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    "special tokens": ({"exclude_special_tokens": True}, [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]),
    "some tokens": ({"exclude_special_tokens": [3, 11]}, [[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
    "all but the first": ({"seqpos_slice": (1, None)}, [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
    "a chat's prefix and special tokens": (
        {"seqpos_slice": [3, None], "exclude_special_tokens": True},
        [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    ),
    "SAELens' default": ({"seqpos_slice": (None,)}, [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("rule", RULES)
def test_everything_follows_the_rule(rule: str, tiny_model: Any) -> None:
    metadata, kept = RULES[rule]
    expected = torch.tensor(kept, dtype=torch.bool)
    sae = layer_of(**metadata)
    covered = trained_positions(tiny_model, sae, TOKENS)
    assert torch.equal(covered, expected)
    assert evaluate(tiny_model, sae, TOKENS, progress=False).n_tokens == expected.sum()
    assert expert_statistics(tiny_model, sae, TOKENS, progress=False).n_tokens == expected.sum()

    # Attached there, the MLP's own output stays elsewhere.
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda y, hook: outputs.__setitem__(name, y)

    tiny_model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK_IN, keep("x")), (HOOK_OUT, keep("y"))])
    hooks = [*replacement_hooks(sae, covered), (HOOK_OUT, keep("replaced"))]
    tiny_model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    y_hat = sae(outputs["x"])
    torch.testing.assert_close(outputs["replaced"], torch.where(expected[..., None], y_hat, outputs["y"]))

    with steer(tiny_model, sae, {0: 3.0}, positions=covered) as _:
        steered = tiny_model(TOKENS)
    if not expected[:, 0].any():
        plain = tiny_model.run_with_hooks(TOKENS, fwd_hooks=replacement_hooks(sae))
        torch.testing.assert_close(steered[:, 0], plain[:, 0])


def test_positions_of_other_tokens_are_refused(tiny_model: Any) -> None:
    sae = layer_of(seqpos_slice=(1, None))
    hooks = replacement_hooks(sae, trained_positions(tiny_model, sae, TOKENS[:, :4]))
    with pytest.raises(ValueError, match=r"the shape \(2, 4\), and the model runs sequences of \(2, 6\)"):
        tiny_model.run_with_hooks(TOKENS, fwd_hooks=hooks)

"""RunIdentity: every weight, token and setting counts; what does not decide a result does not."""

import json
from copy import deepcopy

import pytest
import torch
from planted import PlantedModel, planted_mxd, planted_tokens

from mxd_lens.artifacts.identity import RunIdentity, differences, hash_tensors, hash_weights


def identity(**changes) -> RunIdentity:
    layer = planted_mxd()
    fields = {"model": PlantedModel(layer), "layers": layer, "tokens": planted_tokens(), "batch_size": 8}
    return RunIdentity.of(**fields | changes)


def test_the_same_run_is_the_same_after_json():
    saved = RunIdentity.from_dict(json.loads(json.dumps(identity().to_dict())))
    assert saved.differences(identity()) == []
    assert saved.hash == identity().hash
    saved.require(identity(), "somewhere")


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_hidden", "b_hidden", "W_out"])
def test_one_changed_weight_anywhere_is_another_layer(name):
    layer = planted_mxd()
    weights = getattr(layer, name)
    with torch.no_grad():
        weights[(-1,) * weights.ndim] += 1e-6 + weights.abs().max() * 1e-6
    changed = identity().differences(identity(layers=layer))
    assert len(changed) == 1
    assert changed[0].startswith("layer.weights: ")


def test_each_changed_field_is_one_line():
    tokens = planted_tokens()
    tokens[-1, -1] = 3 + (tokens[-1, -1] - 2) % 12
    changed = identity().differences(identity(tokens=tokens, batch_size=4, seed=1))
    assert [line.split(": ")[0] for line in changed] == ["tokens", "batch_size", "seed"]
    assert changed[1:] == ["batch_size: 8 then, 4 now", "seed: not set then, 1 now"]
    assert identity().differences(identity(batch_size=4), ignore=["batch_size"]) == []


def test_another_run_is_refused_with_the_place_and_the_field():
    with pytest.raises(
        ValueError, match=r"^out holds the results of another run \(batch_size: 8 then, 4 now"
    ):
        identity().require(identity(batch_size=4), "out")


def test_dtype_shape_and_name_count_and_layout_does_not():
    ones = torch.ones(4, 6)
    assert hash_tensors({"a": ones}) != hash_tensors({"b": ones})
    assert hash_tensors({"a": ones}) != hash_tensors({"a": ones.view(6, 4)})
    assert hash_tensors({"a": ones}) != hash_tensors({"a": ones.double()})
    x = torch.randn(4, 6).bfloat16()
    assert hash_tensors({"a": x}) == hash_tensors({"a": x.T.contiguous().T})
    assert hash_tensors({"a": torch.tensor(1.0)}) != hash_tensors({"a": torch.tensor(2.0)})
    assert hash_tensors({"a": torch.empty(0, 3)}) != hash_tensors({"a": torch.empty(0, 4)})


def test_a_layer_attached_to_the_model_does_not_count(tiny_model, tiny_folder):
    from sae_lens.saes.sae import SAEMetadata
    from tiny import HOOK_IN, HOOK_OUT

    from mxd_lens import TopKTranscoder, TopKTranscoderConfig

    before = hash_weights(tiny_model)
    metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT)
    layer = TopKTranscoder(TopKTranscoderConfig(d_in=16, d_out=16, d_sae=8, k=2, metadata=metadata))
    tiny_model.add_sae(layer)
    assert hash_weights(tiny_model) == before
    tiny_model.reset_saes()
    assert hash_weights(tiny_model) == before
    changed = deepcopy(tiny_model)
    with torch.no_grad():
        changed.ln_final.w[0] += 1
    assert hash_weights(changed) != before


def test_nested_settings_are_compared_field_by_field():
    then, now = {"sae": {"k": 2, "d_sae": 8}, "size": (1, 2)}, {"sae": {"k": 4, "d_sae": 8}, "size": [1, 2]}
    assert differences(then, now) == ["sae.k: 2 then, 4 now"]
    assert differences(then, now, ignore=["sae"]) == []

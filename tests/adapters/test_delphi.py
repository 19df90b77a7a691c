"""delphi's cache of latents, read as delphi's loader reads it."""

import json

import numpy as np
import pytest
import torch
from planted import HOOK_OUT, PlantedModel, planted_mxd, planted_tokens
from safetensors.numpy import load_file

from mxd_lens.adapters.delphi import export_latents


def test_latents_as_delphi_keeps_them(tmp_path):
    sae, tokens = planted_mxd(), planted_tokens(7, 20)
    model = PlantedModel(sae)
    where = export_latents(model, sae, tmp_path, tokens, 3, "words", batch_size=2, progress=False)
    assert where == tmp_path / "latents" / HOOK_OUT
    a = sae.encode(model.input(tokens))
    a[:, 0] = 0  # BOS
    got = torch.zeros_like(a)
    files = sorted(where.glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0]))
    assert [f.stem for f in files] == ["0_5", "6_11", "12_17"]
    for file in files:
        # Read as delphi's loader reads: ids start at the number in the file's name.
        data = load_file(file)
        start, end = map(int, file.stem.split("_"))
        locations = data["locations"].astype(np.int64)
        assert data["locations"].dtype == np.uint16
        assert data["activations"].dtype == np.float16
        assert np.array_equal(data["tokens"], tokens.numpy())
        locations[:, 2] += start
        assert locations[:, 2].max() <= end
        assert np.all(np.diff(locations[:, 0] * 20 + locations[:, 1]) >= 0)
        got[tuple(torch.tensor(locations).T)] = torch.tensor(data["activations"]).float()
    torch.testing.assert_close(got, a)
    config = json.loads((where / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"], config["model_name"]) == (20, 140, "planted")
    with pytest.raises(ValueError, match="n_splits must be from 1 to d_sae = 18"):
        export_latents(model, sae, tmp_path, tokens, 19, progress=False)
    sae.W_enc[:, 0] *= 1e6
    with pytest.raises(ValueError, match=r"larger than 65,504"):
        export_latents(model, sae, tmp_path, tokens, progress=False)

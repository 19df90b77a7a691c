"""Which experts fire on a text, in the files that EleutherAI's delphi explains and scores features from.

    latents/HOOKPOINT/START_END.safetensors    locations [n, 3]: sequence, position, expert - START;
                                               activations [n], float16; tokens [sequences, positions]
    latents/HOOKPOINT/config.json              what the text was

delphi's LatentDataset reads them. A dot-separated hook point is a valid HOOKPOINT.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.analysis.firings import firings
from mxd_lens.artifacts.files import atomic_files, write_json
from mxd_lens.hooks.site import hook_names
from mxd_lens.models import check_tokens, model_first


@model_first
def export_latents(
    model: Any,
    sae: SAE[Any],
    folder: str | Path,
    tokens: Int[Tensor, "sequences positions"],
    n_splits: int = 5,
    dataset: str = "",
    batch_size: int = 8,
    progress: bool = True,
) -> Path:
    """Write which experts fire where, as delphi's cache of latents.

    Coefficients are kept in float16, as delphi keeps them: those below 6e-8 vanish there and are left out.
    Tokens that the layer's training excluded have none.

    Args:
        model, sae, batch_size, progress: as for `evaluate`.
        folder: where latents/ goes.
        tokens: token ids, one sequence per row.
        n_splits: files that the experts are spread over; no more than there are experts.
        dataset: what the text is called in config.json.

    Returns:
        The folder of the layer's hook point.

    Raises:
        ValueError: n_splits does not fit, a coefficient is beyond float16, or the layer does not belong to
            the model.
    """
    if not 1 <= n_splits <= sae.cfg.d_sae:
        raise ValueError(f"n_splits must be from 1 to d_sae = {sae.cfg.d_sae}, got {n_splits}.")
    check_tokens(tokens)
    found = firings(model, sae, tokens, batch_size, progress)
    activations = found.coefficient.half()
    if not activations.isfinite().all():
        raise ValueError("A coefficient is larger than 65,504, the largest that delphi's float16 holds.")
    token_of, expert = found.token_of[activations > 0], found.expert[activations > 0]
    order = (token_of * sae.cfg.d_sae + expert).argsort()
    token_of, expert = token_of[order], expert[order]
    locations = torch.stack([found.sequence[token_of], found.position[token_of], expert], dim=1)
    activations = activations[activations > 0][order]
    where = Path(folder) / "latents" / hook_names(sae)[1]
    bounds = torch.linspace(0, sae.cfg.d_sae, n_splits + 1).long().tolist()
    config = {
        "dataset_repo": dataset,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": batch_size,
        "cache_ctx_len": tokens.shape[1],
        "n_tokens": tokens.numel(),
        "n_splits": n_splits,
        "model_name": model.cfg.model_name,
    }
    with atomic_files(where, last="config.json") as partial:
        for start, end in pairwise(bounds):
            inside = (locations[:, 2] >= start) & (locations[:, 2] < end)
            part = locations[inside] - torch.tensor([0, 0, start])
            fits = part.max().item() < 2**16 if len(part) else True
            tensors = {
                "locations": part.to(torch.uint16 if fits else torch.uint32).contiguous(),
                "activations": activations[inside].contiguous(),
                "tokens": tokens.cpu().contiguous(),
            }
            save_file(tensors, partial / f"{start}_{end - 1}.safetensors")
        write_json(partial / "config.json", config)
    return where

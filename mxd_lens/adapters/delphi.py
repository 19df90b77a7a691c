"""What experts do on a text, and their explanations, in the files of EleutherAI's delphi.

    latents/HOOKPOINT/START_END.safetensors    locations [n, 3]: sequence, position, expert - START;
                                               activations [n], float16; tokens [sequences, positions]
    latents/HOOKPOINT/config.json              what the text was
    explanations/HOOKPOINT_latentN.txt         JSON: the explanation
    scores/detection, scores/fuzz              the same names, JSON: a list of what was asked

delphi's LatentDataset reads the first two, its pipeline goes on from the third, and its log analysis reads
the fourth. A dot-separated hook point is a valid HOOKPOINT.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import active_experts, layer_input
from mxd_lens.evals.autointerp import Autointerp, Task, Trial
from mxd_lens.evals.faithfulness import Place
from mxd_lens.hooks.site import hook_names

SCORERS: dict[Task, str] = {"detection": "detection", "fuzzing": "fuzz"}
"""delphi's names."""


@torch.no_grad()
def export_latents(
    folder: str | Path,
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    n_splits: int = 5,
    dataset: str = "",
    batch_size: int = 8,
    progress: bool = True,
) -> Path:
    """Writes which experts fire where, as delphi's cache of latents.

    Coefficients are kept in float16, as delphi keeps them: those below 6e-8 vanish there and are left out.
    Tokens that the layer's training excluded have none.

    Args:
        folder: where latents/ goes.
        sae, model, tokens, batch_size, progress: as for `evaluate`.
        n_splits: files that the experts are spread over; no more than there are experts.
        dataset: what the text is called in config.json.

    Returns:
        The folder of the layer's hook point.

    Raises:
        ValueError: n_splits does not fit, a coefficient is beyond float16, the layer does not belong to the
            model, or there are no tokens.
    """
    if not 1 <= n_splits <= sae.cfg.d_sae:
        raise ValueError(f"n_splits must be from 1 to d_sae = {sae.cfg.d_sae}, got {n_splits}.")
    place = Place.of(sae, model, tokens)
    found: list[tuple[Tensor, Tensor]] = []
    first = 0
    for batch in tqdm(tokens.split(batch_size), desc="Reading experts", disable=not progress):
        a, experts = active_experts(sae, layer_input(sae, model, batch))
        a = (a * place.kept(batch).to(a.device).unsqueeze(-1)).half()
        if not a.isfinite().all():
            raise ValueError("A coefficient is larger than 65,504, the largest that delphi's float16 holds.")
        sequence, position, slot = a.nonzero(as_tuple=True)
        expert = experts[sequence, position, slot]
        locations = torch.stack([sequence + first, position, expert], dim=1)
        order = (position + sequence * batch.shape[1]).mul(sae.cfg.d_sae).add(expert).argsort()
        found.append((locations[order].cpu(), a[sequence, position, slot][order].cpu()))
        first += len(batch)
    locations, activations = (torch.cat(part) for part in zip(*found, strict=True))
    where = Path(folder) / "latents" / hook_names(sae)[1]
    where.mkdir(parents=True, exist_ok=True)
    bounds = torch.linspace(0, sae.cfg.d_sae, n_splits + 1).long().tolist()
    for start, end in pairwise(bounds):
        inside = (locations[:, 2] >= start) & (locations[:, 2] < end)
        part = locations[inside] - torch.tensor([0, 0, start])
        fits = part.max().item() < 2**16 if len(part) else True
        tensors = {
            "locations": part.to(torch.uint16 if fits else torch.uint32).contiguous(),
            "activations": activations[inside].contiguous(),
            "tokens": tokens.cpu().contiguous(),
        }
        save_file(tensors, where / f"{start}_{end - 1}.safetensors")
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
    (where / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return where


def export_interpretations(folder: str | Path, sae: SAE[Any], result: Autointerp) -> None:
    """Writes explanations and scores as delphi does; an expert without one has no file.

    Args:
        folder: where explanations/ and scores/ go.
        sae: the layer that was interpreted.
        result: what `autointerp` found.
    """
    module = hook_names(sae)[1]
    for interpretation in result.interpretations:
        name = f"{module}_latent{interpretation.expert}.txt"
        if interpretation.explanation:
            _write(Path(folder) / "explanations" / name, interpretation.explanation)
        for task, scorer in SCORERS.items():
            if trials := interpretation.trials(task):
                _write(Path(folder) / "scores" / scorer / name, [_as_delphi(trial) for trial in trials])


def _as_delphi(trial: Trial) -> dict[str, Any]:
    return {
        "str_tokens": trial.tokens,
        "activations": trial.coefficients,
        "distance": 0,
        "activating": trial.truth,
        "prediction": trial.answer,
        "probability": None,
        "correct": None if trial.answer is None else trial.answer == trial.truth,
    }


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

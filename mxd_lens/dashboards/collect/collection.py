"""Collecting what a dashboard shows: two passes over a text, and more for the experts looked at closely.

The first pass runs the language model up to the layer and finds every firing. The second reads the layer
again at the firings that were chosen. Effects on the loss take whole runs of the model, in proportion to the
excerpts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from sae_lens import SAE, logger
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.weights import coactive_experts, mean_gate_share, similar_experts
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.files import full_path, locked, remove_stale_partials
from mxd_lens.artifacts.identity import RunIdentity
from mxd_lens.dashboards.collect.data import (
    FILENAMES,
    CollectionConfig,
    DashboardData,
    ExpertData,
    Neighbour,
    is_saved,
)
from mxd_lens.dashboards.collect.effects import add_loss_effects, add_spectra
from mxd_lens.dashboards.collect.excerpts import SecondPass, bands_of, choose
from mxd_lens.dashboards.collect.firings import FirstPass, histogram
from mxd_lens.dashboards.collect.kept import Kept
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import attached_layer, model_first

COLLECTING = "collecting"
"""The folder beside the data in which a collection under way is kept."""
N_BY_DEFAULT = 100
"""Experts shown where none are named."""
N_CANDIDATES = 10
"""Experts tried for each that is drawn: some never fire."""
HOW = ("batch_size", "checkpoint_every")
"""Settings that change no number."""

Experts = int | Iterable[int] | Int[Tensor, " n"] | Literal["live"] | None


@model_first
def collect_dashboard(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: Experts = None,
    folder: str | Path | None = None,
    cfg: CollectionConfig | None = None,
    text_name: str = "",
    layer: str | Sequence[str] = "",
    progress: bool = True,
    deep: Iterable[int] | None = None,
) -> DashboardData:
    """Collect what a dashboard shows about some experts of a layer.

        data = collect_dashboard(model, mxd, tokens, experts=range(200), folder="dashboard")

    For layers of this package, and SAELens' SAEs and transcoders. An SAE is attached at its own hook point.

    Args:
        model: any hooked model.
        sae: the layer; it must not be attached where loss effects are measured.
        tokens: ids, one sequence per row, with BOS where the training had it.
        experts: which are shown. "live": all that fire on the text. None: 100 of these, drawn at random.
        folder: where the data are saved: a new folder, or that of an earlier call. A call that was
            interrupted or killed resumes there if called again, and ends with the same data; one that was
            complete reads them. None: they are not saved.
        cfg: how much is collected. None: the defaults, and `CollectionConfig.light()` for "live".
        text_name: what the text is called, for the reader.
        layer: where the layer was loaded from, a folder or a pair (release, sae_id), for the reader.
        progress: whether to show progress bars.
        deep: which experts get what takes long: effects on the loss and singular values. None: all that are
            named or drawn, none for "live". A call that only asks for more of these adds them to the data.

    Raises:
        FileExistsError: the folder holds something else.
        IndexError: there is no such expert.
        ValueError: the folder holds the data of another call, or the layer does not belong to the model or
            is attached, or `tokens` are not ids, or no expert is named; or as `decompose`.
    """
    if folder is None:
        return gather(model, sae, tokens, experts, None, cfg, text_name, layer, progress, deep)[0]
    folder = full_path(folder)
    check_is_data(folder)
    with locked(folder.with_name(f".{folder.name}.lock"), "dashboard"):
        data, is_new = gather(model, sae, tokens, experts, folder, cfg, text_name, layer, progress, deep)
        if is_new:
            data.save(folder)
        else:
            remove_stale_partials(folder.parent)
            logger.info("%s holds these data already.", folder)
    return data


@torch.no_grad()
def gather(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: Experts,
    folder: Path | None,
    cfg: CollectionConfig | None,
    text_name: str,
    layer: str | Sequence[str],
    progress: bool,
    deep: Iterable[int] | None,
) -> tuple[DashboardData, bool]:
    """The data of `collect_dashboard`, read from the folder or collected; whether anything in them is new."""
    cfg = cfg or (CollectionConfig.light() if isinstance(experts, str) else CollectionConfig())
    check_fits(model, sae)
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be ids [sequences, positions > 1], got {tuple(tokens.shape)}.")
    if cfg.loss_effects and attached_layer(model, hook_names(sae)[1]) is not None:
        raise ValueError(
            "A layer is attached at this hook point, and loss effects are measured by putting this one there "
            "and taking it away: call model.reset_saes() first."
        )
    if isinstance(experts, str) and experts != "live":
        raise ValueError(f'experts are ids, "live" or None, got {experts!r}.')
    shown = experts if experts is None or isinstance(experts, str) else named(sae, experts)
    closely = None if deep is None else named(sae, deep)
    collection = {name: value for name, value in asdict(cfg).items() if name not in HOW}
    identity = RunIdentity.of(
        model=model, layers=sae, tokens=tokens.cpu().long(), experts=shown, collection=collection
    )
    is_known = folder is not None and is_saved(folder)
    if folder is not None and is_known:
        data = DashboardData.load(folder)
        RunIdentity.from_dict(data.settings["identity"]).require(identity, folder)
    kept = Kept(None if folder is None else folder / COLLECTING, identity)
    if not is_known:
        about = {
            "text_name": text_name,
            "layer": layer,
            "collection": asdict(cfg),
            "versions": {
                package: version(package) for package in ("mxd-lens", "torch", "sae-lens", "transformer-lens")
            },
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "identity": identity.to_dict(),
        }
        data = collected(model, sae, tokens, shown, cfg, about, kept, progress)
        if closely is None and shown != "live":
            closely = [e.expert for e in data.experts]
    known = data.settings.setdefault("deep", [])
    missing = [e for e in data.experts if e.expert in (closely or ()) and e.expert not in known]
    if missing:
        known += [e.expert for e in missing]
        add_spectra(sae, missing, progress)
    if missing and cfg.loss_effects:
        add_loss_effects(model, sae, tokens, missing, cfg, kept, progress)
    return data, not is_known or bool(missing)


def named(sae: SAE[Any], experts: Any) -> list[int]:
    """Ids, each once."""
    ids = list(dict.fromkeys(expert_ids(sae, experts).tolist()))
    if not ids:
        raise ValueError("no expert is named: a dashboard shows at least one.")
    return ids


def collected(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    shown: list[int] | str | None,
    cfg: CollectionConfig,
    about: dict[str, Any],
    kept: Kept,
    progress: bool,
) -> DashboardData:
    """What the two passes find."""
    if isinstance(shown, list):
        candidates = shown
    else:
        drawn = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(cfg.seed)).tolist()
        candidates = sorted(drawn) if shown else drawn[: N_CANDIDATES * N_BY_DEFAULT]
    firings = FirstPass(sae, candidates, cfg, kept).read(model, tokens, progress)
    if not isinstance(shown, list):
        live = [slot for slot in range(len(candidates)) if len(firings.of(slot)[0])]
        if not live:
            raise ValueError("No expert fires on this text: give more tokens, or check the layer.")
        chosen_slots = live if shown else sorted(live[:N_BY_DEFAULT], key=lambda slot: candidates[slot])
        firings = firings.select(chosen_slots)
    chosen = [choose(firings, slot, cfg) for slot in range(len(firings.experts))]
    second = SecondPass(model, sae, firings, chosen, cfg)
    second.read(tokens, kept, progress)
    statistics, ids = firings.statistics, firings.experts
    overview = {
        "density": statistics.density,
        "mean": statistics.mean_coefficient,
        "maximum": statistics.coefficient_max,
        "load_share": statistics.load_share,
        "share_of_output": firings.share_of_output,
        "contribution_rms": statistics.contribution_rms,
        "consistency": statistics.consistency,
        "mean_gate_share": mean_gate_share(sae, statistics),
    }
    values = {name: value.tolist() for name, value in overview.items()}
    fires = [ids[slot] for slot in second.fires]
    directions = dict(zip(fires, statistics.mean_direction(fires).tolist(), strict=True)) if fires else {}
    effects = second.token_effects()
    k = min(cfg.n_neighbours, sae.cfg.d_sae - 1)
    similar = neighbours(similar_experts(sae, ids, k=k)) if k else {}
    coactive = neighbours(coactive_experts(statistics, k=k)) if k and len(statistics.watched) else {}
    tokens = tokens.cpu()
    experts = []
    for slot, n in enumerate(tqdm(ids, desc="Writing excerpts", disable=not progress)):
        _, coefficients, _ = firings.of(slot)
        edges, counts = histogram(coefficients)
        promoted, suppressed = effects.get(slot, ([], []))
        experts.append(
            ExpertData(
                expert=n,
                n_firings=len(coefficients),
                edges=edges,
                counts=counts,
                bands=bands_of(firings, slot, chosen[slot], tokens, model.tokenizer, cfg),
                promoted=promoted,
                suppressed=suppressed,
                singular_values=[],
                stable_rank=float("nan"),
                coactive=[pair for pair in coactive.get(n, []) if pair.similarity > 0],
                similar=similar.get(n, []),
                loss_effect=float("nan"),
                coherence=second.coherence(slot),
                mean_direction=directions.get(n, []),
                **{name: v[n] for name, v in values.items() if name != "load_share"},
            )
        )
    settings = {
        "model_name": model.cfg.model_name,
        "hook_name": statistics.hook_name,
        "hook_name_out": statistics.hook_name_out,
        "architecture": statistics.architecture,
        "d_sae": sae.cfg.d_sae,
        "k": getattr(sae.cfg, "k", None),
        "n_tokens": statistics.n_tokens,
        "n_sequences": len(tokens),
        "context_size": tokens.shape[1],
    }
    return DashboardData(settings | about, values, experts)


def check_is_data(folder: Path) -> None:
    """Raises FileExistsError where a folder holds anything but such data."""
    own = {COLLECTING, *FILENAMES}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.is_dir() else []
    if others:
        raise FileExistsError(
            f"{folder} holds {', '.join(others[:3])}, and a dashboard's data take the place of the whole "
            "folder: choose a new one."
        )


def neighbours(found: Any) -> dict[int, list[Neighbour]]:
    """The nearest experts of each, by its id."""
    rows = zip(*(v.tolist() for v in (found.experts, found.neighbours, found.similarities)), strict=True)
    return {n: [Neighbour(*pair) for pair in zip(*nearest, strict=True)] for n, *nearest in rows}

"""Collecting what a dashboard shows: one pass over a text, then one over the excerpts chosen from it.

The first pass runs the language model up to the layer and keeps sums for all experts (`ExpertStatistics`),
and for the experts shown a histogram, the strongest firings and a uniform sample of all; its memory does not
grow with the text. The second runs the whole model on the sequences of the chosen excerpts, once with the
layer and once a (sequence, expert) without the expert: its cost is in proportion to the excerpts.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.logit_lens import extreme_logits, read_norm
from mxd_lens.analysis.statistics import fingerprint
from mxd_lens.analysis.token_text import vocabulary_text
from mxd_lens.analysis.weights import coactive_experts, mean_gate_share, similar_experts, spectrum
from mxd_lens.architectures.base import expert_ids
from mxd_lens.dashboards.collect.data import (
    CollectionConfig,
    DashboardData,
    ExpertData,
    Neighbour,
    TokenEffect,
    is_saved,
    partial,
)
from mxd_lens.dashboards.collect.excerpts import Chosen, loss_effect
from mxd_lens.dashboards.collect.firings import Firings
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import attached_layer
from mxd_lens.training.runner import then_and_now

CHECKPOINT_FILENAME = "collecting.safetensors"
N_BY_DEFAULT = 100
"""Experts shown where none are named."""


@torch.no_grad()
def collect_dashboard(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    experts: int | Iterable[int] | Int[Tensor, " n"] | None = None,
    folder: str | Path | None = None,
    cfg: CollectionConfig | None = None,
    text_name: str = "",
    layer: str | Sequence[str] = "",
    progress: bool = True,
) -> DashboardData:
    """Collects what a dashboard shows about some experts of a layer.

        data = collect_dashboard(mxd, model, tokens, experts=range(200), folder="dashboard")

    For layers of this package, and SAELens' SAEs and transcoders. An SAE stands at its own hook point.

    Args:
        sae: the layer; it must not be attached where loss effects are measured.
        model: any hooked model.
        tokens: ids, one sequence a row, with BOS where the training had it.
        experts: which are shown. None: 100 drawn at random, all if there are fewer.
        folder: where the data are saved. A call that was interrupted or killed goes on there where its last
            checkpoint was, if called again, and ends with the same data; one that was complete just reads
            them. None: they are not saved.
        cfg: how much is collected.
        text_name: what the text is called, for the reader.
        layer: where the layer was loaded from, a folder or a pair (release, sae_id), for the reader.
        progress: whether to show progress bars.

    Raises:
        IndexError: there is no such expert.
        ValueError: the folder holds the data of another call, or the layer does not belong to the model or
            is attached, or `tokens` are no ids, or no expert is named; or as `decompose`.
    """
    cfg = cfg or CollectionConfig()
    check_fits(model, sae)
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be ids [sequences, positions > 1], got {tuple(tokens.shape)}.")
    if cfg.loss_effects and attached_layer(model, hook_names(sae)[1]) is not None:
        raise ValueError(
            "A layer is attached at this hook point, and loss effects are measured by putting this one there "
            "and taking it away: call model.reset_saes() first."
        )
    ids = _shown(sae, experts, cfg.seed)
    settings = _settings(sae, model, tokens, ids, cfg)
    checkpoint = None
    if folder is not None:
        folder = Path(folder)
        if is_saved(folder):
            data = DashboardData.load(folder)
            _refuse_other(folder, data.settings, settings)
            logger.info("%s holds these data already.", folder)
            return data
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(folder / CHECKPOINT_FILENAME, settings)
    firings = Firings(sae, ids, cfg)
    firings.read(model, tokens, checkpoint, progress)
    chosen = Chosen(firings, tokens, cfg)
    chosen.measure(sae, model, checkpoint, progress)
    about = {
        "text_name": text_name,
        "layer": layer,
        "n_tokens": firings.statistics.n_tokens,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    data = assemble(sae, model, firings, chosen, cfg, settings | about, progress)
    if folder is not None:
        data.save(folder)
        (folder / CHECKPOINT_FILENAME).unlink(missing_ok=True)
    return data


def _shown(sae: SAE[Any], experts: Any, seed: int) -> list[int]:
    if experts is None:
        drawn = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(seed))
        return sorted(drawn[:N_BY_DEFAULT].tolist())
    ids = list(dict.fromkeys(expert_ids(sae, experts).tolist()))
    if not ids:
        raise ValueError("no expert is named: a dashboard shows at least one.")
    return ids


def _settings(
    sae: SAE[Any], model: Any, tokens: Tensor, ids: list[int], cfg: CollectionConfig
) -> dict[str, Any]:
    """What decides the data."""
    hook_name, hook_name_out = hook_names(sae)
    return {
        "model_name": model.cfg.model_name,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "architecture": sae.cfg.architecture(),
        "fingerprint": fingerprint(sae),
        "d_sae": sae.cfg.d_sae,
        "k": getattr(sae.cfg, "k", None),
        "n_sequences": len(tokens),
        "context_size": tokens.shape[1],
        "tokens": hashlib.sha256(tokens.cpu().long().numpy().tobytes()).hexdigest()[:16],
        "experts": ids,
        "collection": asdict(cfg),
        "versions": {
            package: version(package) for package in ("mxd-lens", "torch", "sae-lens", "transformer-lens")
        },
    }


def _refuse_other(folder: Path, known: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError where a folder holds what another call has collected."""

    def that_matter(all_settings: dict[str, Any]) -> dict[str, Any]:
        collection = {
            name: value
            for name, value in all_settings["collection"].items()
            if name not in ("batch_size", "checkpoint_every")
        }
        rest = {name: value for name, value in all_settings.items() if name != "collection"}
        return rest | collection

    then, now = that_matter(known), that_matter(settings)
    changed = then_and_now(then, now, [name for name in now if name != "versions"])
    if changed:
        raise ValueError(f"{folder} holds another dashboard. {'; '.join(changed)}. Name another folder.")


class Checkpoint:
    """The file that a collection under way is kept in, replaced as a whole each time."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self._known: dict[str, Tensor] = {}
        if path.is_file():
            with safe_open(path, "pt") as file:
                _refuse_other(path.parent, json.loads(file.metadata()["settings"]), settings)
                self._known = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def load(self, stage: str) -> dict[str, Tensor]:
        """What was kept of a stage; nothing if it has not begun."""
        return {
            name.removeprefix(f"{stage}."): value
            for name, value in self._known.items()
            if name.startswith(f"{stage}.")
        }

    def save(self, stage: str, state: dict[str, Tensor]) -> None:
        """Keeps the state of a stage, beside those of the other stages."""
        self._known = {name: v for name, v in self._known.items() if not name.startswith(f"{stage}.")}
        self._known |= {f"{stage}.{name}": v.detach().cpu().clone() for name, v in state.items()}
        save_file(self._known, partial(self.path), metadata={"settings": json.dumps(self.settings)})
        partial(self.path).replace(self.path)


def assemble(
    sae: SAE[Any],
    model: Any,
    firings: Firings,
    chosen: Chosen,
    cfg: CollectionConfig,
    settings: dict[str, Any],
    progress: bool,
) -> DashboardData:
    """Everything that was collected, and what follows from it and from the weights."""
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
    n_firings = statistics.fired.tolist()
    alive = [n for n in ids if n_firings[n]]
    directions = dict(zip(alive, statistics.mean_direction(alive).tolist(), strict=True)) if alive else {}
    effects = token_effects(sae, model, firings, alive, cfg.n_tokens)
    n_neighbours = min(cfg.n_neighbours, sae.cfg.d_sae - 1)
    coactive: dict[int, list[Neighbour]] = {}
    similar: dict[int, list[Neighbour]] = {}
    if n_neighbours:
        for found, nearest in (
            (coactive, coactive_experts(statistics, k=n_neighbours)),
            (similar, similar_experts(sae, ids, k=n_neighbours)),
        ):
            rows = zip(
                *(v.tolist() for v in (nearest.experts, nearest.neighbours, nearest.similarities)),
                strict=True,
            )
            for n, others, similarities in rows:
                found[n] = [Neighbour(*pair) for pair in zip(others, similarities, strict=True)]
    weights = spectrum(sae, ids, progress=progress)
    squares = weights.singular_values.pow(2)
    stable_rank = (squares.sum(-1) / squares[:, 0]).tolist()
    experts = []
    for slot, n in enumerate(tqdm(ids, desc="Putting together", disable=not progress)):
        edges, counts = firings.histograms.of(slot)
        bands = chosen.bands(slot, model.tokenizer)
        promoted, suppressed = effects.get(n, ([], []))
        experts.append(
            ExpertData(
                expert=n,
                n_firings=n_firings[n],
                edges=edges,
                counts=counts,
                bands=bands,
                promoted=promoted,
                suppressed=suppressed,
                singular_values=weights.singular_values[slot].tolist(),
                stable_rank=stable_rank[slot],
                coactive=[pair for pair in coactive.get(n, []) if pair.similarity > 0],
                similar=similar.get(n, []),
                loss_effect=loss_effect(bands),
                coherence=chosen.coherence(slot),
                mean_direction=directions.get(n, []),
                **{name: v[n] for name, v in values.items() if name != "load_share"},
            )
        )
    return DashboardData(settings, values, experts)


def token_effects(
    sae: SAE[Any], model: Any, firings: Firings, experts: list[int], k: int
) -> dict[int, tuple[list[TokenEffect], list[TokenEffect]]]:
    """The tokens that each expert promotes and suppresses; none for a layer outside the residual stream."""
    W_U = model.W_U
    k = min(k, W_U.shape[1])
    if not experts or not k or len(sae.b_dec) != len(W_U):
        return {}
    norm = read_norm(model.ln_final, W_U)
    mean_W_U = W_U.double().mean(-1, keepdim=True)
    up, down = extreme_logits(model, firings.statistics.mean_direction(experts), k)
    found = {}
    for row, n in enumerate(experts):
        token_ids = torch.cat([up[1][row], down[1][row]])
        written, weights = firings.sampled_directions(n)
        readers = W_U[:, token_ids.to(W_U.device)].double() - mean_W_U
        logits = norm.before_scale(written.to(W_U.device).double()) @ readers
        weights = (weights / weights.sum()).to(logits)
        mean = weights @ logits
        spread = (weights @ (logits - mean) ** 2).sqrt()
        values = torch.cat([up[0][row], down[0][row]]).tolist()
        entries = [
            TokenEffect(vocabulary_text(model.tokenizer, token), value, s)
            for token, value, s in zip(token_ids.tolist(), values, spread.tolist(), strict=True)
        ]
        found[n] = entries[:k], entries[k:]
    return found

"""Steering scores: many experts of several layers, each judged by what the model writes when it is raised.

Two numbers an expert, as in the paper: how clearly its steered texts share a concept, and how fluent they
are. Neither says much without the other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import ENTRIES, decompose
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.files import remove_stale_partials, write_json
from mxd_lens.artifacts.identity import RunIdentity, differences, layer_identity
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.evals.judges import Judge, LocalJudge
from mxd_lens.evals.steering import Sampling, compare, measure, perplexity, written
from mxd_lens.hooks.steer import Mode

SCORES_FILENAME = "steering_scores.json"


@dataclass(frozen=True)
class SteeringScore:
    """One expert's."""

    layer: str
    """The layer's name in the comparison."""
    architecture: str
    """As SAELens registers it."""
    expert: int
    concept: float
    """How clearly the steered texts share a concept, 0 to 100, by the judge."""
    fluency: float
    """How well they are language, 0 to 100, by the judge."""
    perplexity: float
    """Of the steered texts under the model as it is without the layer."""
    perplexity_unsteered: float
    """Of the unsteered ones."""
    repetition: float
    """Share of repeated 3-grams in the steered texts."""
    repetition_unsteered: float
    texts: list[str]
    """The steered continuations."""


@dataclass
class SteeringScores(Tabular):
    """What `steering_scores` measured."""

    settings: dict[str, Any]
    """The model, the judge, how texts were steered and sampled, which layers, and the identity of the run."""
    scores: list[SteeringScore]

    def save(self, path: str | Path) -> None:
        """Writes them as JSON; an older file is exchanged in one step."""
        known = {"settings": self.settings, "scores": [asdict(score) for score in self.scores]}
        write_json(Path(path), known)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringScores":
        """Reads what `save` wrote."""
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(known["settings"], [SteeringScore(**score) for score in known["scores"]])

    @property
    def title(self) -> str:
        return f"Steering {self.settings['model_name']}, scored by {self.settings['judge']}: means"

    @property
    def columns(self) -> list[str]:
        return ["layer", "experts", "concept", "fluency", "perplexity", "not steered", "repetition"]

    @property
    def rows(self) -> list[list[Cell]]:
        rows: list[list[Cell]] = []
        for layer in self.settings["layers"]:
            scores = [score for score in self.scores if score.layer == layer]
            if scores:
                means = [
                    mean(getattr(score, name) for score in scores)
                    for name in ("concept", "fluency", "perplexity", "perplexity_unsteered", "repetition")
                ]
                rows.append([layer, len(scores), *means])
        return rows


def steering_scores(
    model: Any,
    layers: Mapping[str, SAE[Any]],
    output: str | Path,
    experts: int | Mapping[str, Sequence[int]] = 100,
    judge: Judge | None = None,
    coefficient: float | Mapping[str, float] = 100.0,
    mode: Mode = "add",
    sampling: Sampling | None = None,
    progress: bool = True,
) -> SteeringScores:
    """Steers many experts of several layers, one at a time, and has what the model writes judged.

    The defaults are the paper's: 100 experts a layer, 100 added to the coefficient, ten texts of 32 tokens.
    Results are written after every expert; the same call goes on where an earlier one stopped.

    Args:
        model: any hooked model with a tokenizer.
        layers: the layers by name; each is steered alone.
        output: a folder, for steering_scores.json.
        experts: how many of each layer, drawn at random by the sampling's seed; or which, by layer.
        judge: who judges. Default: `LocalJudge(model)`.
        coefficient, mode: as for `steer`; the coefficient may differ by layer. The same one is a stronger
            change where directions are longer: `matched_coefficient` gives those that are alike.
        sampling: how texts are sampled. Default: as in the paper.
        progress: whether to show a progress bar.

    Raises:
        ValueError: `output` holds scores of other settings, or a layer does not fit the model.
        IndexError: there is no such expert.
    """
    judge = judge or LocalJudge(model)
    sampling = sampling or Sampling()
    by_layer = coefficient if isinstance(coefficient, Mapping) else dict.fromkeys(layers, coefficient)
    if missing := layers.keys() - by_layer.keys():
        raise ValueError(f"coefficient names none for {', '.join(sorted(missing))}.")
    chosen = {name: _chosen(name, sae, experts, sampling.seed) for name, sae in layers.items()}
    settings = {
        "model_name": model.cfg.model_name,
        "judge": judge.name,
        "mode": mode,
        "sampling": asdict(sampling),
        "layers": {
            name: f"{sae.cfg.architecture()}, d_sae {sae.cfg.d_sae}, {sae.cfg.metadata.hook_name}, "
            f"coefficient {by_layer[name]:g}"
            for name, sae in layers.items()
        },
        "identity": RunIdentity.of(
            model=model,
            judge=judge.name,
            mode=mode,
            sampling=asdict(sampling),
            steered={
                name: layer_identity(sae) | {"coefficient": by_layer[name]} for name, sae in layers.items()
            },
        ).to_dict(),
    }
    path = Path(output) / SCORES_FILENAME
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(path.parent)
    result = _resumed(path, settings) if path.is_file() else SteeringScores(settings, [])
    done = {(score.layer, score.expert) for score in result.scores}
    todo = {name: [n for n in ids if (name, n) not in done] for name, ids in chosen.items()}
    with tqdm(total=sum(map(len, todo.values())), desc="Steering", disable=not progress) as bar:
        for name, ids in todo.items():
            sae = layers[name]
            unsteered = written(model, sae, {}, mode, sampling) if ids else []
            perplexity_unsteered = perplexity(model, sampling.prompt, unsteered)
            for n in ids:
                samples = compare(model, sae, n, by_layer[name], mode, sampling, unsteered)
                measured = measure(model, samples, perplexity_unsteered)
                result.scores.append(
                    SteeringScore(
                        layer=name,
                        architecture=sae.cfg.architecture(),
                        expert=n,
                        **judge(samples, measured)._asdict(),
                        **measured._asdict(),
                        texts=samples.steered,
                    )
                )
                result.save(path)
                bar.update()
    return result


@torch.no_grad()
def matched_coefficient(
    sae: SAE[Any], x: Float[Tensor, "tokens d_in"], strength: float, experts: Sequence[int] | None = None
) -> float:
    """The coefficient that changes the output of layers that stand for one MLP alike.

        v = strength * median_t |y_t - mean_t y_t| / median_nt |c_n * (D^T z_t)|

    with 1 in the place of D^T z for a transcoder or an SAE.

    Args:
        sae: the layer.
        x: its input at some tokens, special ones left out.
        strength: how far the median expert moves the output, in units of how far the output is from its
            mean.
        experts: whose directions are measured. Default: those active at one of these tokens.

    Raises:
        ValueError: no expert is active at these tokens, or their directions have no length.
        IndexError: there is no such expert.
    """
    parts = decompose(sae, x)
    chosen = parts.fired[1].unique() if experts is None else expert_ids(sae, experts)
    if not len(chosen):
        raise ValueError(f"no expert is active at any of these {len(x)} tokens.")
    pairs = torch.cartesian_prod(torch.arange(len(x), device=chosen.device), chosen)
    length = (
        torch.cat([parts.written_by(*block.unbind(1)).norm(dim=-1) for block in pairs.split(ENTRIES)])
        .median()
        .item()
    )
    if not length:
        raise ValueError("more than half of these directions have no length.")
    output = parts.output
    return strength * (output - output.mean(0)).norm(dim=-1).median().item() / length


def _chosen(name: str, sae: SAE[Any], experts: int | Mapping[str, Sequence[int]], seed: int) -> list[int]:
    if isinstance(experts, Mapping):
        if name not in experts:
            raise ValueError(f"experts names none for {name}; it has {', '.join(experts)}.")
        return list(dict.fromkeys(expert_ids(sae, experts[name]).tolist()))
    if experts < 1:
        raise ValueError(f"experts must be at least 1, or a mapping, got {experts}.")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(sae.cfg.d_sae, generator=generator)[:experts].tolist()


def _resumed(path: Path, settings: Mapping[str, Any]) -> SteeringScores:
    known = SteeringScores.load(path)
    then, now = known.settings.get("identity", {}), settings["identity"]
    # Layers may be added to a file, and others may be left out.
    layers = {name: of for name, of in then.get("steered", {}).items() if name in now["steered"]}
    again = {name: of for name, of in now["steered"].items() if name in layers}
    changed = differences({**then, "steered": layers}, {**now, "steered": again})
    if changed:
        raise ValueError(
            f"{path} holds the scores of another run ({'; '.join(changed)}). Choose another folder."
        )
    known.settings["layers"] = known.settings["layers"] | settings["layers"]
    known.settings["identity"] = {**now, "steered": then["steered"] | now["steered"]}
    return known

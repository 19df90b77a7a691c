"""The sparsity-accuracy frontier: how faithful each architecture is at every K, at one size.

Every layer is trained on the same activations in the same order, for the same steps, with matched
parameter counts, and judged on the same held-out text.
"""

import json
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, TopKTrainingSAEConfig, logger
from sae_lens.config import HfDataset
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from safetensors import SafetensorError
from torch import Tensor

from mxd_lens.architectures import ARCHITECTURES
from mxd_lens.architectures.base import transcoder_parameters
from mxd_lens.artifacts.files import LOCK, locked, remove_stale, write_json
from mxd_lens.artifacts.tables import Cell, Table, Tabular
from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate_all
from mxd_lens.evals.intervals import difference, mean_interval
from mxd_lens.evals.recipes import RECIPES, Recipe
from mxd_lens.training.checkpoints import complete_checkpoints
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner
from mxd_lens.training.runner import TranscoderRunnerConfig, read_json, then_and_now

FRONTIER_FILENAME = "frontier.json"
BASELINE = "topk_skip_transcoder"
"""What the others are compared with, sequence by sequence."""
ORDER_SEED = 0
"""Of the order of tokens, the same for every layer."""


@dataclass(frozen=True)
class Size:
    """What all contenders are matched to."""

    d_in: int
    d_out: int
    d_hidden: int
    """Width of an MxD's decoder branch; half of it where the branch is gated."""
    transcoder_width: int
    """Features of the plain transcoder, whose parameter count no other exceeds."""


@dataclass(frozen=True)
class Contender:
    """An architecture in the comparison."""

    label: str
    """Its name in tables and figures."""
    config: Callable[[Size, int], TrainingSAEConfig]
    """Its configuration, of a matched size, at a given k."""
    lr: float | None = None
    """Its learning rate; None: the recipe's."""
    reads: str = "input"
    """"input": trained from the MLP's input to its output; "output": an SAE on the output."""


def matched(architecture: str, **settings: Callable[[Size], Any]) -> Callable[[Size, int], TrainingSAEConfig]:
    """The configurations of an architecture with at most the plain transcoder's parameters.

    Args:
        architecture: its name.
        settings: the configuration's further fields, from the size.
    """

    def config(size: Size, k: int) -> TrainingSAEConfig:
        widths = {"d_in": size.d_in, "d_out": size.d_out}
        widths |= {name: value(size) for name, value in settings.items()}
        budget = transcoder_parameters(size.d_in, size.d_out, size.transcoder_width)
        n = ARCHITECTURES[architecture].config.matched_size(budget, **widths)
        return ARCHITECTURES[architecture].training_config(d_sae=n, k=k, **widths)

    return config


def _sae(size: Size, k: int) -> TrainingSAEConfig:
    budget = size.transcoder_width * (size.d_in + size.d_out + 1)
    return TopKTrainingSAEConfig(d_in=size.d_out, d_sae=budget // (2 * size.d_out + 1), k=k)


CONTENDERS: Mapping[str, Contender] = {
    "mxd": Contender("MxD", matched("mxd", d_hidden=lambda size: size.d_hidden)),
    "skip_mxd": Contender(
        "MxD with a skip connection",
        matched(
            "skip_mxd",
            d_hidden=lambda size: size.d_hidden // 2,
            hidden_activation=lambda _: "silu",
            gated=lambda _: True,
        ),
    ),
    # An eighth of the transcoder's width, the paper's proportion: a wider branch leaves its experts less.
    "affine_skip_mxd": Contender(
        "MxD with affine experts and a skip connection",
        matched(
            "affine_skip_mxd",
            d_hidden=lambda size: max(1, min(size.d_hidden, size.transcoder_width // 8)),
        ),
    ),
    "molt": Contender("MOLT", matched("molt", rank=lambda size: max(1, size.d_in // 36))),
    "topk_transcoder": Contender("TopK transcoder", matched("topk_transcoder")),
    "topk_skip_transcoder": Contender("TopK skip transcoder", matched("topk_skip_transcoder")),
    "batch_topk_transcoder": Contender("BatchTopK transcoder", matched("batch_topk_transcoder")),
    "topk_sae": Contender("TopK SAE on the output", _sae, reads="output"),
}
"""The architectures that `frontier` compares, by name."""


@dataclass
class Point:
    """One trained layer of the sweep, and what was measured."""

    architecture: str
    layer: int
    k: int
    seed: int
    d_sae: int = 0
    n_parameters: int = 0
    reports: dict[str, FaithfulnessReport] = field(default_factory=dict)
    """By the name of the held-out text."""
    failure: str | None = None
    """Why there are no reports."""

    @property
    def name(self) -> str:
        return f"layer{self.layer}-{self.architecture}-k{self.k}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "Point":
        reports = {text: FaithfulnessReport.from_dict(report) for text, report in known["reports"].items()}
        return cls(**(known | {"reports": reports}))


@dataclass
class Frontier(Tabular):
    """What `frontier` measured."""

    settings: dict[str, Any]
    """Everything that the points share: model, size, tokens, recipe, versions."""
    points: list[Point]

    def save(self, path: str | Path) -> None:
        """Writes everything as JSON."""
        known = {"settings": self.settings, "points": [point.to_dict() for point in self.points]}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)

    @classmethod
    def load(cls, path: str | Path) -> "Frontier":
        """Reads what `save` wrote; of a folder, its frontier.json."""
        path = Path(path)
        known = json.loads((path / FRONTIER_FILENAME if path.is_dir() else path).read_text(encoding="utf-8"))
        return cls(known["settings"], [Point.from_dict(point) for point in known["points"]])

    @property
    def failures(self) -> dict[str, str]:
        """The layers that could not be trained or judged, and why."""
        return {point.name: point.failure for point in self.points if point.failure is not None}

    @property
    def texts(self) -> list[str]:
        """The held-out texts that anything was measured on."""
        return [t for t in self.settings["held_out"] if any(t in point.reports for point in self.points)]

    def select(
        self, text: str, layer: int, architecture: str, k: int | None = None
    ) -> list[FaithfulnessReport]:
        """The reports of one text, layer and architecture; every k in order, every seed."""
        found = [
            point
            for point in self.points
            if (point.layer, point.architecture) == (layer, architecture)
            and text in point.reports
            and k in (None, point.k)
        ]
        return [point.reports[text] for point in sorted(found, key=lambda point: point.k)]

    def _differences(self, text: str) -> list[Table]:
        """Every architecture against the skip transcoder on the same sequences; nothing without sequences."""
        rows: list[list[Cell]] = []
        for layer, k in sorted({(point.layer, point.k) for point in self.points}):
            (baseline, *_) = [*self.select(text, layer, BASELINE, k), None]
            for architecture in self.settings["labels"]:
                for report in self.select(text, layer, architecture, k)[:1]:
                    if baseline is None or len(baseline.normalized_mse_by_sequence) < 2:
                        continue
                    ours, theirs = (
                        (torch.tensor(r.normalized_mse_by_sequence), torch.tensor(r.ce_added_by_sequence))
                        for r in (report, baseline)
                    )
                    rows.append(
                        [
                            layer,
                            k,
                            architecture,
                            str(mean_interval(ours[0])),
                            str(difference(ours[0], theirs[0])),
                            str(difference(ours[1], theirs[1])),
                        ]
                    )
        columns = [
            "block",
            "K",
            "architecture",
            "normalised MSE",
            "minus skip transcoder",
            "added nats, minus",
        ]
        title = (
            f"Against the {BASELINE} on {text}: means and 95 % bootstrap intervals over sequences, first seed"
        )
        return [Table(columns, rows, title)] if rows else []

    @property
    def tables(self) -> list[Table]:
        """Two tables for each held-out text, and one of what failed."""
        points = sorted(self.points, key=lambda point: (point.layer, point.k))
        tables = []
        for text in self.texts:
            rows: list[list[Cell]] = [
                [
                    point.layer,
                    point.k,
                    point.architecture,
                    f"{point.n_parameters:,}",
                    f"{report.normalized_mse:.3f}",
                    f"{report.feature_share:.2f}",
                    f"{report.ce_loss_replaced - report.ce_loss:.4f}",
                    f"{report.silent_fraction:.0%}",
                ]
                for point in points
                if (report := point.reports.get(text))
            ]
            columns = ["block", "K", "architecture", "parameters", "normalised MSE", "feature share"]
            title = f"Sparsity-accuracy frontier of {self.settings['model_name']} on {text}"
            tables.append(Table([*columns, "added nats", "silent"], rows, title))
            tables += self._differences(text)
        failed: list[list[Cell]] = [[p.layer, p.k, p.architecture, p.failure] for p in points if p.failure]
        if failed or not tables:
            tables.append(Table(["block", "K", "architecture", "failure"], failed, "Runs that failed"))
        return tables


@dataclass(frozen=True, repr=False)
class Plan(Tabular):
    """What `frontier` would train."""

    layers: Sequence[int]
    ks: Sequence[int]
    seeds: Sequence[int]
    steps: int
    batch: int
    recipe: str
    architectures: list[dict[str, Any]]
    """Of each: label, d_sae, n_parameters, lr and n_layers, the layers trained."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def tables(self) -> list[Table]:
        """A row for each architecture."""
        title = (
            f"Blocks {', '.join(map(str, self.layers))}; K {', '.join(map(str, self.ks))}; seeds "
            f"{', '.join(map(str, self.seeds))}; {self.steps:,} steps of {self.batch:,} tokens, "
            f"{self.steps * self.batch:,} in all; recipe {self.recipe}"
        )
        rows: list[list[Cell]] = [
            [a["label"], f"{a['d_sae']:,}", f"{a['n_parameters']:,}", f"{a['lr']:.2g}", a["n_layers"]]
            for a in self.architectures
        ]
        return [Table(["", "units", "parameters", "learning rate", "layers"], rows, title)]


def plan(
    size: Size,
    layers: Sequence[int],
    ks: Sequence[int],
    seeds: Sequence[int],
    training_tokens: int,
    batch: int,
    recipe: Recipe,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> Plan:
    """What `frontier` would train; no language model and no weights are made."""
    architectures = []
    for contender in contenders.values():
        config = contender.config(size, min(ks))
        with torch.device("meta"):
            layer = TrainingSAE.from_dict({**config.to_dict(), "device": "meta"})
        architectures.append(
            {
                "label": contender.label,
                "d_sae": config.d_sae,
                "n_parameters": sum(p.numel() for p in layer.parameters()),
                "lr": contender.lr or recipe.learning_rate(size.transcoder_width),
                "n_layers": len(layers) * len(ks) * len(seeds),
            }
        )
    return Plan(layers, ks, seeds, training_tokens // batch, batch, recipe.name, architectures)


def frontier(
    model: Any,
    text: HfDataset,
    held_out: Mapping[str, Int[Tensor, "sequences positions"]],
    output: str | Path,
    *,
    layers: Sequence[int],
    ks: Sequence[int] = (8, 16, 32, 64, 128, 256),
    contenders: Mapping[str, Contender] = CONTENDERS,
    seeds: Sequence[int] = (0,),
    transcoder_width: int | None = None,
    d_hidden: int | None = None,
    training_tokens: int = 1_000_000,
    batch: int = 2048,
    layers_at_once: int = 32,
    text_name: str = "",
    recipe: Recipe = RECIPES["tuned"],
    run_settings: Mapping[str, Any] | None = None,
) -> Frontier:
    """Trains every contender at every K on every layer, and judges them.

    The language model runs once for all of them; the activations are kept in output/activations for
    further epochs and for what does not fit into memory at once. A sweep that was interrupted goes on
    where it was, and one that is called again with more layers, Ks or seeds trains only those.

    Writes into `output` frontier.json with everything measured so far, and trained/NAME, the layers
    themselves, as folders that SAELens reads.

    Args:
        model: any hooked model.
        text: what to train on, with a column "text" or "tokens".
        held_out: token sequences to judge on, by the name of their text.
        output: a folder.
        layers: which MLPs.
        ks: active experts per token.
        contenders: the architectures, by name.
        seeds: of the initial weights; the order of the tokens is the same for all.
        transcoder_width: features of the transcoder that all are matched to. Default: 8 * d_model.
        d_hidden: width of the MxD's decoder branch. Default: 4 * d_model.
        training_tokens: for each layer; a shorter text is repeated.
        batch: tokens in a step.
        layers_at_once: how many are in memory together; each takes four times its weights.
        text_name: what the reports call the training text.
        recipe: learning rate, its schedule, and whether activations are standardised; see `RECIPES`.
        run_settings: further fields of `TranscoderRunnerConfig`, for all.

    Raises:
        ValueError: nothing to compare, or another sweep's settings than those in `output`.
        LockedError: another process is sweeping into `output`.
        TrainingInterrupted: SIGINT or SIGTERM; the same call goes on.
    """
    d_model = model.cfg.d_model
    size = Size(d_model, d_model, d_hidden or 4 * d_model, transcoder_width or 8 * d_model)
    # What is to be compared lies together: it is trained and judged together.
    points = [
        Point(architecture, layer, k, seed)
        for layer, k, seed, architecture in product(layers, ks, seeds, contenders)
    ]
    if not points:
        raise ValueError("There is nothing to compare: no layers, no ks, no contenders or no seeds.")
    output = Path(output)
    steps = training_tokens // batch
    # A sweep of SAEs alone keeps no inputs: another one cannot go on with its activations.
    cached = "-".join(map(str, sorted({point.layer for point in points})))
    if all(contender.reads == "output" for contender in contenders.values()):
        cached += "-outputs"
    shared = {
        "model_name": model.cfg.model_name,
        "dataset_path": text_name or "given as override_dataset",
        "training_tokens": steps * batch,
        "train_batch_size_tokens": batch,
        "n_batches_in_buffer": 512,
        **recipe.settings(steps, size.transcoder_width),
        "use_cached_activations": True,
        "cached_activations_path": str(output / "activations" / cached),
        "n_checkpoints": 4,
        "n_checkpoints_kept": 1,
    } | dict(run_settings or {})
    cfgs = {
        point.name: _run_config(point, contenders[point.architecture], size, shared, output)
        for point in points
    }
    with locked(output / LOCK, "sweep"):
        # A layer that is finished, and activations that are complete, are not written to again.
        for folder in (output / "activations" / cached, *(output / "trained").glob("*")):
            remove_stale(folder)
        result = Frontier(_settings(size, shared, held_out, contenders), points)
        if (output / FRONTIER_FILENAME).is_file():
            _go_on_from(Frontier.load(output), result, output)
        result.save(output / FRONTIER_FILENAME)
        _train_and_judge(result, cfgs, model, text, held_out, output, layers_at_once)
    return result


def _go_on_from(known: Frontier, result: Frontier, output: Path) -> None:
    """Takes over what an earlier call measured, with points that this one does not ask for."""
    _refuse_other_sweep(output, known.settings, result.settings)
    measured = {point.name: point for point in known.points if point.reports}
    asked = {point.name for point in result.points}
    result.points = [measured.get(point.name, point) for point in result.points]
    result.points += [point for point in measured.values() if point.name not in asked]
    result.settings["labels"] = known.settings["labels"] | result.settings["labels"]
    result.settings["lr"] = known.settings["lr"] | result.settings["lr"]


def _train_and_judge(
    result: Frontier,
    cfgs: Mapping[str, TranscoderRunnerConfig],
    model: Any,
    text: HfDataset,
    held_out: Mapping[str, Tensor],
    output: Path,
    layers_at_once: int,
) -> None:
    """Fills in the points that have no reports, and saves the result after each part."""

    def judge(names: Iterable[str]) -> None:
        wanted = set(names)
        together: dict[tuple[int, int], list[Point]] = {}
        for point in result.points:
            if point.name in wanted:
                together.setdefault((point.layer, point.k), []).append(point)
        for points in together.values():
            _judge(points, model, held_out, output)
            result.save(output / FRONTIER_FILENAME)

    todo = {point.name: cfgs[point.name] for point in result.points if not point.reports}
    judge(name for name in todo if _is_trained(output, name))
    todo = {name: cfg for name, cfg in todo.items() if not _is_trained(output, name)}
    for names in _groups(output / "checkpoints", todo, layers_at_once):
        runner = MultiTranscoderTrainingRunner(
            {name: todo[name] for name in names},
            output / "checkpoints",
            resume=True,
            override_dataset=text,
            override_model=model,
            beside=cfgs.values(),
            order_seed=ORDER_SEED,
        )
        try:
            runner.run()
        except RuntimeError as e:
            if not runner.failures:
                raise
            logger.error("%s", e)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        for point in result.points:
            point.failure = runner.failures.get(point.name, point.failure)
        result.save(output / FRONTIER_FILENAME)
        judge(name for name in names if name not in runner.failures)
    # Those of a group that was killed between its end and their removal.
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def _run_config(
    point: Point, contender: Contender, size: Size, shared: Mapping[str, Any], output: Path
) -> TranscoderRunnerConfig:
    hook_out = f"blocks.{point.layer}.hook_mlp_out"
    return TranscoderRunnerConfig(
        sae=contender.config(size, point.k),
        hook_name=f"blocks.{point.layer}.mlp.hook_in" if contender.reads == "input" else hook_out,
        hook_name_out=hook_out,
        output_path=str(output / "trained" / point.name),
        seed=point.seed,
        **{**shared, "lr": contender.lr or shared["lr"]},
    )


def _settings(
    size: Size,
    shared: Mapping[str, Any],
    held_out: Mapping[str, Tensor],
    contenders: Mapping[str, Contender],
) -> dict[str, Any]:
    return {
        **{name: value for name, value in shared.items() if "path" not in name},
        "text": shared["dataset_path"],
        **asdict(size),
        "held_out": {name: list(tokens.shape) for name, tokens in held_out.items()},
        "lr": {name: contender.lr or shared["lr"] for name, contender in contenders.items()},
        "labels": {name: contender.label for name, contender in contenders.items()},
        "versions": {
            package: version(package)
            for package in ("mxd-lens", "torch", "sae-lens", "transformer-lens", "transformers")
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _refuse_other_sweep(output: Path, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(settings))
    changed = then_and_now(known, ours, sorted(ours.keys() - {"versions", "machine", "lr", "labels"}))
    changed += [
        f"lr of {name}: {known['lr'][name]} then, {lr} now"
        for name, lr in ours["lr"].items()
        if known["lr"].get(name, lr) != lr
    ]
    if changed:
        raise ValueError(f"{output} holds another sweep. {'; '.join(changed)}. Name another folder.")


def _groups(checkpoints: Path, todo: Iterable[str], layers_at_once: int) -> list[tuple[str, ...]]:
    """What is trained together: first what an interrupted sweep was at, if all of it is still wanted."""
    todo = list(todo)
    found = complete_checkpoints(checkpoints)
    interrupted = tuple(read_json(found[-1] / RUNNER_CFG_FILENAME)["cfgs"]) if found else ()
    if not set(interrupted) <= set(todo):
        shutil.rmtree(checkpoints)
        interrupted = ()
    rest = [name for name in todo if name not in interrupted]
    groups = [tuple(rest[i : i + layers_at_once]) for i in range(0, len(rest), layers_at_once)]
    return [group for group in (interrupted, *groups) if group]


def _judge(
    points: Sequence[Point],
    model: Any,
    held_out: Mapping[str, Int[Tensor, "sequences positions"]],
    output: Path,
) -> None:
    """Fills in the reports of points that are trained, on shared passes of the language model."""
    saes = {}
    for point in points:
        try:
            sae = SAE.load_from_disk(output / "trained" / point.name, device=str(model.cfg.device))
        except (OSError, ValueError, SafetensorError) as e:
            point.failure = f"{type(e).__name__}: {e}"
            logger.error("%s cannot be read. %s", point.name, e)
            continue
        point.d_sae, point.n_parameters = sae.cfg.d_sae, sum(p.numel() for p in sae.parameters())
        saes[point.name] = sae
    if not saes:
        return
    reports = {text: evaluate_all(model, saes, tokens) for text, tokens in held_out.items()}
    for point in points:
        if point.name in saes:
            point.failure = None
            point.reports = {text: judged[point.name] for text, judged in reports.items()}


def _is_trained(output: Path, name: str) -> bool:
    return (output / "trained" / name / SAE_CFG_FILENAME).is_file()

"""Jobs that write to a folder and, started again, resume; small enough to be killed hundreds of times."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attached import random_mxd
from datasets import Dataset
from runs import CONTEXT, run_config
from tiny import D_MODEL, WORDS

from mxd_lens import (
    TrainingTopKTranscoderConfig,
    TranscoderTrainingRunner,
    build_dashboard,
    expert_statistics,
    frontier,
    sparse_probing,
)
from mxd_lens.adapters.delphi import export_latents
from mxd_lens.analysis.graph import attribution_graph
from mxd_lens.cli.application import show
from mxd_lens.dashboards.collect.collection import collect_dashboard
from mxd_lens.dashboards.collect.data import CollectionConfig
from mxd_lens.evals.frontier import CONTENDERS
from mxd_lens.evals.probing.tasks import LabelledTexts
from mxd_lens.evals.steering import Sampling
from mxd_lens.evals.steering_scores import steering_scores
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner

STEPS, BATCH = 12, 16
Job = Callable[..., Any]


def digest(folder: Path, *skip: str) -> dict[str, str]:
    """What a job wrote: a hash of every file, by its name; folders of checkpoints do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(content_of(path, folder)).hexdigest()
        for path in files
        if not {"checkpoints", *skip} & set(path.relative_to(folder).parts)
    }


def content_of(path: Path, folder: Path) -> bytes:
    """A file's bytes, without the place where it lies."""
    return path.read_bytes().replace(str(folder).encode(), b"")


def training_jobs(model: Any, words: list[str]) -> dict[str, Job]:
    """Every job of training, as a function of the folder it writes to; started again, it resumes."""
    text = Dataset.from_dict({"text": words[:20]})
    settings = {"training_tokens": STEPS * BATCH, "lr": 1e-2, "lr_warm_up_steps": 2, "n_checkpoints": 4}

    def single(folder: Path, **changes: Any) -> None:
        cfg = run_config(
            output_path=str(folder / "run"), resume_from_checkpoint="latest", **settings | changes
        )
        TranscoderTrainingRunner(cfg, text, model).run()

    def cached(folder: Path, cached_activations_path: str = "") -> None:
        path = cached_activations_path or str(folder / "cache")
        single(folder, use_cached_activations=True, cached_activations_path=path)

    def standardized(folder: Path) -> None:
        single(folder, standardize_activations=True)

    def several(folder: Path) -> None:
        widths = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 24, "k": 3}
        cfgs = {"mxd": run_config(output_path=str(folder / "mxd"), **settings)}
        cfgs["transcoder"] = run_config(output_path=str(folder / "transcoder"), **settings)
        cfgs["transcoder"].sae = TrainingTopKTranscoderConfig(**widths)
        MultiTranscoderTrainingRunner(cfgs, folder / "checkpoints", True, text, model).run()

    return {"single": single, "cached": cached, "standardized": standardized, "several": several}


def measuring_jobs(model: Any, words: list[str]) -> dict[str, tuple[Job, ...]]:
    """Every job that resumes and trains no layer of its own, as `training_jobs`.

    Jobs of one name write to one folder, each over the result of the one before.
    """
    text = Dataset.from_dict({"text": words[:20]})
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 3 + len(WORDS), (4, CONTEXT), generator=generator)
    mxd = random_mxd(D_MODEL)
    later = random_mxd(D_MODEL, "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", k=7)
    names = ("mxd", "topk_skip_transcoder", "topk_sae")
    run_settings = {"context_size": CONTEXT, "store_batch_size_prompts": 4, "n_batches_in_buffer": 8}
    sweep = {
        "contenders": {name: CONTENDERS[name] for name in names},
        "layers_at_once": 2,
        "training_tokens": STEPS * BATCH,
        "batch": BATCH,
        "transcoder_width": 60,
        "d_hidden": 16,
        "run_settings": run_settings | {"n_checkpoints": 2},
    }
    sampling = Sampling(prompt="the big cat", n_samples=2, max_new_tokens=3, top_p=0.9)
    steered = {"coefficient": 20.0, "sampling": sampling, "progress": False}
    cfg = CollectionConfig(
        batch_size=2, checkpoint_every=1, n_per_band=1, n_top=2, n_bands=2, before=2, after=1
    )
    collected = {"experts": [3, 8, 11], "cfg": cfg, "progress": False}

    def swept(ks: list[int], folder: Path) -> None:
        frontier(model, text, {"held out": tokens}, folder / "sweep", layers=[1], ks=ks, **sweep)

    def scored(layers: dict[str, Any], folder: Path) -> None:
        steering_scores(model, layers, folder / "scores", 3, **steered)

    def data(deep: list[int], folder: Path) -> None:
        collect_dashboard(model, mxd, tokens, folder=folder / "data", deep=deep, **collected)

    def pages(deep: list[int], folder: Path) -> None:
        build_dashboard(model, mxd, tokens, output=folder / "pages", deep=deep, **collected)

    return {
        "frontier": (partial(swept, [2]),),
        "frontier, more": (partial(swept, [2]), partial(swept, [2, 4])),
        "scores": (partial(scored, {"one": mxd, "two": later}),),
        "scores, more": (partial(scored, {"one": mxd}), partial(scored, {"one": mxd, "two": later})),
        "data": (partial(data, [3, 8]),),
        "data, deeper": (partial(data, [3]), partial(data, [3, 8])),
        "dashboard": (partial(pages, [3, 8]),),
        "dashboard, deeper": (partial(pages, [3]), partial(pages, [3, 8])),
    }


def overwriting_jobs(model: Any, words: list[str]) -> dict[str, tuple[Job, Job]]:
    """Pairs of jobs that write two results to one place; neither resumes."""
    mxd = random_mxd(D_MODEL)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 3 + len(WORDS), (5, CONTEXT), generator=generator)
    texts = (tokens[:3], tokens[3:])
    task = LabelledTexts.of("pets", [("cat" if "cat" in text else "no cat", text) for text in words[:60]])
    counted, graphs, probed = [], [], []
    for seed, (tokens, prompt) in enumerate(zip(texts, ("the cat sat", "a dog ran"), strict=True)):
        counted.append(expert_statistics(model, mxd, tokens, progress=False))
        graphs.append(attribution_graph(model, {1: mxd}, prompt, max_experts=5, progress=False))
        settings = {"seeds": (seed,), "ks": (1,), "n_candidates": 2, "progress": False}
        probed.append(sparse_probing(model, mxd, task, **settings))

    def exported(tokens: torch.Tensor, folder: Path) -> None:
        export_latents(model, mxd, folder, tokens, n_splits=2, progress=False)

    def written(text: str, folder: Path) -> None:
        show({"text": text}, folder / "result.json")

    one, other = (
        {
            "statistics": counted[i].save,
            "graph": graphs[i].save,
            "probing": lambda folder, i=i: probed[i].save(folder / "probing.json"),
            "delphi": partial(exported, texts[i]),
            "command": partial(written, words[i]),
        }
        for i in range(2)
    )
    return {name: (one[name], other[name]) for name in one}

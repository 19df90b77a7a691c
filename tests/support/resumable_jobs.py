"""Jobs that write to a folder and, started again, resume; small enough to be killed hundreds of times."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import D_MODEL
from datasets import Dataset
from runs import run_config

from mxd_lens import TrainingTopKTranscoderConfig, TranscoderTrainingRunner
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

"""Layers trained together end as they would have alone, and one that fails leaves the others alone."""

import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import run_config
from sae_lens import (
    SAE,
    HookedSAETransformer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from tiny import D_MODEL, HOOK_IN, HOOK_OUT

from mxd_lens import (
    TrainingSkipMxDConfig,
    TrainingTopKTranscoderConfig,
    TranscoderRunnerConfig,
    TranscoderTrainingRunner,
)
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner
from mxd_lens.training.trainer import TrainingInterrupted, TranscoderTrainer

LATER = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
STEPS, BATCH = 30, 16
NAMES = ["mxd", "skip_mxd", "transcoder", "sae"]


def cfgs(folder: Path | None, **changes: Any) -> dict[str, TranscoderRunnerConfig]:
    """Four layers at two MLPs, each with settings of its own; `changes` are for all."""

    def cfg(name: str, sae: Any = None, **own: Any) -> TranscoderRunnerConfig:
        path = None if folder is None else str(folder / name)
        config = run_config(training_tokens=STEPS * BATCH, **(own | changes), output_path=path)
        if sae is not None:
            config.sae = sae
        return config

    widths = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": 24, "k": 3}
    sae = TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=24, k=3)
    return {
        "mxd": cfg("mxd", lr=1e-2),
        "skip_mxd": cfg("skip_mxd", TrainingSkipMxDConfig(**widths, d_hidden=8), **LATER),
        "transcoder": cfg("transcoder", TrainingTopKTranscoderConfig(**widths), lr_warm_up_steps=3, lr=3e-3),
        "sae": TranscoderRunnerConfig(
            **{f: getattr(run_config(), f) for f in SHARED},
            sae=sae,
            training_tokens=STEPS * BATCH,
            hook_name=HOOK_OUT,
            hook_name_out=HOOK_OUT,
            output_path=None if folder is None else str(folder / "sae"),
            **changes,
        ),
    }


SHARED = ("context_size", "store_batch_size_prompts", "n_batches_in_buffer", "train_batch_size_tokens")


@pytest.fixture
def text(words: list[str]) -> Dataset:
    return Dataset.from_dict({"text": words[:40]})


@pytest.fixture
def runner(tiny_model: HookedSAETransformer, text: Dataset, tmp_path: Path) -> Callable[..., Any]:
    def make(resume: bool = False, **changes: Any) -> MultiTranscoderTrainingRunner:
        return MultiTranscoderTrainingRunner(
            cfgs(tmp_path, **changes),
            checkpoint_path=tmp_path / "checkpoints",
            resume=resume,
            override_dataset=text,
            override_model=tiny_model,
        )

    return make


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same layers, each trained alone."""
    from tiny import WORDS

    from mxd_lens import load_model

    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (200, 12), generator=generator)
    words = [" ".join(WORDS[i] for i in row) for row in picks.tolist()]
    folder = tmp_path_factory.mktemp("alone")
    for cfg in cfgs(folder).values():
        text = Dataset.from_dict({"text": words[:40]})
        TranscoderTrainingRunner(cfg, text, load_model(tiny_folder)).run()
    return folder


def assert_as_alone(folder: Path, alone: Path, names: list[str]) -> None:
    """Weights and statistics bit for bit, and the training curve."""
    for name in names:
        for file in ("sae_weights.safetensors", "sparsity.safetensors"):
            together, by_itself = load_file(folder / name / file), load_file(alone / name / file)
            assert together.keys() == by_itself.keys()
            assert all(torch.equal(together[key], by_itself[key]) for key in together), (name, file)
        assert (folder / name / "history.json").read_text() == (alone / name / "history.json").read_text()


def fail_at(runner: MultiTranscoderTrainingRunner, name: str, step: int, error: Exception) -> None:
    trainer = runner.members[name].trainer
    train = trainer.step

    def failing(batch: torch.Tensor) -> Any:
        if trainer.n_training_steps == step:
            raise error
        return train(batch)

    trainer.step = failing


def test_together_as_alone(runner, alone: Path, tmp_path: Path) -> None:
    layers = runner().run()
    assert list(layers) == NAMES
    assert_as_alone(tmp_path, alone, NAMES)
    assert [type(SAE.load_from_disk(tmp_path / name)).__name__ for name in NAMES] == [
        "MxD",
        "SkipMxD",
        "TopKTranscoder",
        "TopKSAE",
    ]


def test_one_forward_pass_feeds_them_all(runner, tiny_model: HookedSAETransformer, text: Dataset) -> None:
    passes = []
    tiny_model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for of_all in (runner(), TranscoderTrainingRunner(cfgs(None)["mxd"], text, tiny_model)):
        passes.clear()
        of_all.run()
        counts.append(len(passes))
    assert counts[0] == counts[1] > 10


def test_the_sae_is_the_one_saelens_trains(
    runner, tiny_model: HookedSAETransformer, text: Dataset, tmp_path: Path
) -> None:
    """The same weights as SAELens' own trainer on the MLP's outputs."""
    runner().run()
    cfg = cfgs(None)["sae"]
    store = TranscoderTrainingRunner(cfg, text, tiny_model).activations_store
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    assert isinstance(sae, TopKTrainingSAE)
    SAETrainer(cfg.to_sae_trainer_config(), sae, store).fit()
    sae.save_inference_model(tmp_path / "theirs")
    theirs, ours = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("theirs", "sae"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("error", [FloatingPointError("the loss is nan"), RuntimeError("out of memory")])
def test_one_that_fails_leaves_the_others_alone(runner, alone: Path, tmp_path: Path, error) -> None:
    run = runner()
    fail_at(run, "transcoder", 7, error)
    layers = run.run()
    rest = [name for name in NAMES if name != "transcoder"]
    assert list(layers) == rest
    assert run.failures == {"transcoder": f"{type(error).__name__}: {error}"}
    assert not (tmp_path / "transcoder" / "cfg.json").exists()
    assert_as_alone(tmp_path, alone, rest)


def test_a_learning_rate_that_diverges(runner) -> None:
    run = runner()
    run.members["mxd"].trainer.optimizer.param_groups[0]["lr"] = 1e30
    layers = run.run()
    assert "mxd" not in layers
    assert "Training stopped at step" in run.failures["mxd"]
    assert len(layers) == 3


def test_all_fail(runner) -> None:
    run = runner()
    for name in NAMES:
        fail_at(run, name, 3, ValueError(f"no {name}"))
    with pytest.raises(RuntimeError, match=r"Every layer failed.*no mxd.*no sae"):
        run.run()


@pytest.mark.parametrize("step", [3, 17])
def test_stopped_and_resumed(runner, alone: Path, tmp_path: Path, step: int) -> None:
    run = runner(n_checkpoints=5)
    fail_at(run, "transcoder", 1, ValueError("no"))
    trainer = run.members["sae"].trainer
    train = trainer.step

    def stopping(batch: torch.Tensor) -> Any:
        if trainer.n_training_steps == step:
            signal.raise_signal(signal.SIGINT)
        return train(batch)

    trainer.step = stopping
    with pytest.raises(TrainingInterrupted, match=f"{(step + 1) * BATCH}"):
        run.run()
    shutil.rmtree(tmp_path / "sae")  # nothing but the checkpoint is needed
    resumed = runner(resume=True, n_checkpoints=5)
    assert resumed.trainer.n_training_steps == step + 1
    resumed.run()
    assert_as_alone(tmp_path, alone, ["mxd", "skip_mxd", "sae"])
    assert resumed.failures == {"transcoder": "ValueError: no"}


def test_checkpoints_are_kept_within_bounds(runner, tmp_path: Path) -> None:
    runner(n_checkpoints=6).run()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(kept) == 2
    assert all((tmp_path / "checkpoints" / name / "mxd" / "trainer_state.pt").is_file() for name in kept)


def test_a_checkpoint_without_room(
    runner,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TranscoderTrainer, "save_trainer_state", full)
    monkeypatch.setattr(logging.getLogger("sae_lens"), "propagate", True)
    runner(n_checkpoints=3).run()
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert_as_alone(tmp_path, alone, NAMES)


def test_a_layer_without_room(runner, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run.members["mxd"].sae, "save_inference_model", full)
    assert list(run.run()) == NAMES[1:]
    assert "No space left on device" in run.failures["mxd"]
    assert_as_alone(tmp_path, alone, NAMES[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_size": 4}, r"mxd and sae cannot be trained together.*context_size \(8 and 4\)"),
        ({"training_tokens": 32}, "training_tokens"),
        ({"exclude_special_tokens": False}, "exclude_special_tokens"),
        ({"hook_name": "blocks.9.hook_mlp_out", "hook_name_out": "blocks.9.hook_mlp_out"}, "blocks.9"),
    ],
)
def test_what_cannot_be_trained_together(tiny_model, text: Dataset, change, message: str) -> None:
    members = cfgs(None)
    for name, value in change.items():
        setattr(members["sae"], name, value)
    with pytest.raises(ValueError, match=message):
        MultiTranscoderTrainingRunner(members, override_dataset=text, override_model=tiny_model)


def test_nothing_to_train_and_one_folder_twice(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer"):
        MultiTranscoderTrainingRunner({}, override_model=tiny_model)
    members = cfgs(tmp_path)
    members["sae"].output_path = members["mxd"].output_path
    with pytest.raises(ValueError, match="the same output_path"):
        MultiTranscoderTrainingRunner(members, override_model=tiny_model)


def test_what_cannot_be_resumed(runner, tiny_model, text: Dataset, tmp_path: Path) -> None:
    run = runner(n_checkpoints=2)
    run.run()
    with pytest.raises(FileExistsError, match="mxd holds another run"):
        runner()
    for name in NAMES:
        shutil.rmtree(tmp_path / name)
    with pytest.raises(FileExistsError, match="checkpoints holds another run"):
        runner()
    with pytest.raises(ValueError, match="seed: 42 then, 1 now"):
        runner(resume=True, seed=1)
    members = cfgs(tmp_path)
    del members["sae"]
    with pytest.raises(ValueError, match="of other layers"):
        MultiTranscoderTrainingRunner(members, tmp_path / "checkpoints", True, text, tiny_model)


def test_a_transcoder_and_an_sae_want_their_hooks() -> None:
    with pytest.raises(ValueError, match="must be the config of one"):
        run_config(hook_name_out=HOOK_IN)
    with pytest.raises(ValueError, match=r"a TopKTrainingSAEConfig, an SAE.*must be the same"):
        TranscoderRunnerConfig(sae=TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=24, k=3))

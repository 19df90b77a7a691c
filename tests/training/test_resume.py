"""A run that was stopped, however it was stopped, ends with the weights of one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_config
from safetensors.torch import load_file
from tiny import WORDS
from torch import Tensor

from mxd_lens import TranscoderTrainingRunner
from mxd_lens.training.checkpoints import complete_checkpoints
from mxd_lens.training.trainer import TrainingInterrupted

STEPS, BATCH = 120, 16
WEIGHTS = "sae_weights.safetensors"


def settings_of(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run over several epochs of folder / "words.txt", with many checkpoints, into folder / "run"."""
    return {
        "model_name": str(model),
        "dataset_path": str(folder / "words.txt"),
        "output_path": str(folder / "run"),
        "training_tokens": STEPS * BATCH,
        "lr_warm_up_steps": 20,
        "lr": 1e-2,
        "n_checkpoints": 12,
    } | changes


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped, beside its text."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rng = random.Random(0)
    (folder / "words.txt").write_text("\n\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(30)))
    TranscoderTrainingRunner(run_config(**settings_of(folder, tiny_folder))).run()
    return folder


@pytest.fixture
def folder(uninterrupted: Path, tmp_path: Path) -> Path:
    """A new folder with the same text."""
    shutil.copy(uninterrupted / "words.txt", tmp_path)
    return tmp_path


@pytest.fixture
def make(tiny_folder: Path, folder: Path) -> Callable[..., TranscoderTrainingRunner]:
    def make(**changes: Any) -> TranscoderTrainingRunner:
        return TranscoderTrainingRunner(run_config(**settings_of(folder, tiny_folder, **changes)))

    return make


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    """The weights bit for bit, the training curve, and the statistics of the experts."""
    for name in (WEIGHTS, "sparsity.safetensors"):
        one, other = load_file(folder / "run" / name), load_file(uninterrupted / "run" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    histories = [json.loads((f / "run" / "history.json").read_text()) for f in (folder, uninterrupted)]
    assert histories[0] == histories[1]


# SIGKILL

TRAIN = """
import json, os, signal, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/support"]
from runs import run_config
from mxd_lens import TranscoderTrainingRunner

runner = TranscoderTrainingRunner(run_config(**json.loads(sys.argv[2])))
trainer, how = runner.trainer, sys.argv[3]
step, save = trainer.step, trainer.save_trainer_state

def slow_step(batch):
    time.sleep(0.01)
    return step(batch)

def deadly_save(folder):
    if trainer.last_checkpoint is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder)

if how == "slowly":
    trainer.step = slow_step
else:
    trainer.save_trainer_state = deadly_save
runner.run()
"""


def train_and_kill(folder: Path, model: Path, after: float | None) -> None:
    """Trains in another process, and kills it `after` seconds after its first checkpoint.

    after=None: it kills itself in the middle of writing the second one.
    """
    settings = json.dumps(settings_of(folder, model))
    how = "to death" if after is None else "slowly"
    command = [sys.executable, "-c", TRAIN, str(Path(__file__).parents[1]), settings, how]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while after is not None and not complete_checkpoints(folder / "run" / "checkpoints"):
            assert process.poll() is None, "it ended before its first checkpoint"
            assert time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.005)
        if after is not None:
            time.sleep(after)
            process.kill()
        process.wait(timeout=120)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("after", [0.0, 0.4217, None])
def test_killed(
    folder: Path, tiny_folder: Path, uninterrupted: Path, make: Callable[..., Any], after: float | None
) -> None:
    train_and_kill(folder, tiny_folder, after)
    assert not (folder / "run" / WEIGHTS).exists()
    resumed = make(resume_from_checkpoint="latest")
    assert 0 < resumed.trainer.n_training_steps < STEPS
    resumed.run()
    assert_same_run(folder, uninterrupted)


# SIGINT, SIGTERM


def signal_at(runner: TranscoderTrainingRunner, step: int, *signals: int) -> Iterator[Tensor]:
    """The runner's batches; before that of `step` this process gets the signals."""
    for n, batch in enumerate(runner.activations_store):
        if n == step:
            for number in signals:
                os.kill(os.getpid(), number)
        yield batch


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 0), (signal.SIGINT, 37), (signal.SIGTERM, 51), (signal.SIGINT, STEPS - 1)],
)
def test_interrupted(
    folder: Path, uninterrupted: Path, make: Callable[..., Any], number: int, step: int
) -> None:
    before = signal.getsignal(number)
    run = make()
    run.trainer.data_provider = signal_at(run, step, number)
    with pytest.raises(TrainingInterrupted) as e:
        run.run()
    saved = folder / "run" / "checkpoints" / str((step + 1) * BATCH)
    assert e.value.checkpoint == saved
    assert f"Saved in {saved}: resume_from_checkpoint" in str(e.value)
    assert signal.getsignal(number) is before
    make(resume_from_checkpoint=str(saved)).run()
    assert_same_run(folder, uninterrupted)


def test_interrupted_twice_stops_at_once(folder: Path, make: Callable[..., Any]) -> None:
    run = make(n_checkpoints=0)
    run.trainer.data_provider = signal_at(run, 10, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as e:
        run.run()
    assert not isinstance(e.value, TrainingInterrupted)
    assert run.trainer.n_training_steps == 10
    assert list((folder / "run").rglob("*.*")) == []


def test_interrupted_with_nowhere_to_save(make: Callable[..., Any]) -> None:
    run = make(output_path=None)
    run.trainer.data_provider = signal_at(run, 3, signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="Nothing was saved"):
        run.run()


# Where to go on


@pytest.fixture
def stopped(folder: Path, make: Callable[..., Any]) -> Path:
    """The checkpoints of a run that stopped after 57 steps: "896" and "912"."""
    run = make()
    run.trainer.data_provider = signal_at(run, 56, signal.SIGINT)
    with pytest.raises(TrainingInterrupted):
        run.run()
    checkpoints = folder / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["896", "912"]
    return checkpoints


def test_from_an_older_checkpoint(
    folder: Path, stopped: Path, uninterrupted: Path, make: Callable[..., Any]
) -> None:
    make(resume_from_checkpoint=str(stopped / "896")).run()
    assert_same_run(folder, uninterrupted)


def test_stopped_again_and_again(folder: Path, uninterrupted: Path, make: Callable[..., Any]) -> None:
    for _ in range(3):
        run = make(resume_from_checkpoint="latest")
        run.trainer.data_provider = signal_at(run, 29, signal.SIGINT)
        with pytest.raises(TrainingInterrupted):
            run.run()
    make(resume_from_checkpoint="latest").run()
    assert_same_run(folder, uninterrupted)


def test_latest_without_a_checkpoint_starts_from_the_beginning(
    folder: Path, uninterrupted: Path, make: Callable[..., Any]
) -> None:
    make(resume_from_checkpoint="latest").run()
    assert_same_run(folder, uninterrupted)


def test_half_a_checkpoint_is_ignored(folder: Path, stopped: Path, make: Callable[..., Any]) -> None:
    """It is newer, and as far as it goes it looks like one."""
    shutil.copytree(stopped / "912", stopped / ".partial-960")
    (stopped / ".partial-960" / WEIGHTS).write_bytes(b"half")
    run = make(resume_from_checkpoint="latest")
    assert run.trainer.n_training_samples == 912
    assert run.trainer.last_checkpoint == stopped / "912"


@pytest.mark.parametrize(
    "resume_from_checkpoint",
    [
        None,
        "latest",
    ],
)
def test_half_a_checkpoint_is_cleaned_up(
    stopped: Path, make: Callable[..., Any], resume_from_checkpoint: str | None
) -> None:
    (stopped / ".partial-959").mkdir()
    if resume_from_checkpoint is None:
        for name in ("896", "912"):
            shutil.rmtree(stopped / name)
    make(resume_from_checkpoint=resume_from_checkpoint).run()
    assert not (stopped / ".partial-959").exists()


def test_the_checkpoint_stays_until_there_is_a_newer_one(stopped: Path, make: Callable[..., Any]) -> None:
    make(resume_from_checkpoint="latest")
    assert sorted(path.name for path in stopped.iterdir()) == ["896", "912"]


def test_folders_that_are_no_checkpoints_stay(folder: Path, stopped: Path, make: Callable[..., Any]) -> None:
    for name in ("notes_1", "2"):
        (folder / "mine" / name).mkdir(parents=True)
        (folder / "mine" / name / "precious.txt").write_text("years of work")
    make(resume_from_checkpoint=str(stopped / "912"), checkpoint_path=str(folder / "mine")).run()
    assert (folder / "mine" / "notes_1" / "precious.txt").exists()
    assert (folder / "mine" / "2" / "precious.txt").exists()


# What is not the same run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 3e-3}, "lr: 0.01 then, 0.003 now"),
        ({"seed": 1}, "seed: 42 then, 1 now"),
        ({"training_tokens": 1600}, "training_tokens: 1920 then, 1600 now"),
        ({"sae": {"k": 2}}, "sae.k: 3 then, 2 now"),
        ({"sae": {"gated": True}}, "sae.gated: False then, True now"),
        ({"hook_name": "blocks.0.mlp.hook_in"}, "hook_name: 'blocks.1.mlp.hook_in' then"),
        ({"exclude_special_tokens": False}, "exclude_special_tokens: True then, False now"),
    ],
)
def test_another_runs_checkpoint(
    stopped: Path, make: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(
        ValueError, match=f"912 is of another run, and cannot be resumed as this one.*{message}"
    ):
        make(resume_from_checkpoint="latest", **changes)


def test_going_on_elsewhere(
    folder: Path, stopped: Path, uninterrupted: Path, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Where a run writes is not what it is."""
    make(resume_from_checkpoint=str(stopped / "912"), output_path=str(tmp_path / "other" / "run")).run()
    assert_same_run(tmp_path / "other", uninterrupted)


@pytest.mark.parametrize("name", ["nothing", "."])
def test_what_is_no_checkpoint(folder: Path, stopped: Path, make: Callable[..., Any], name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is not a checkpoint of a training run"):
        make(resume_from_checkpoint=str(stopped / name))


@pytest.mark.parametrize(
    "name",
    [WEIGHTS, "trainer_state.pt", "activations_store_state.safetensors", "identity.json", "history.json"],
)
def test_a_damaged_checkpoint(stopped: Path, make: Callable[..., Any], name: str) -> None:
    damaged = (stopped / "912" / name).read_bytes()[:-20]
    (stopped / "912" / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"912.*{name}"):
        make(resume_from_checkpoint="latest")

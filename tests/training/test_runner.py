"""A run from config to folder, and everything that must not cost the user one."""

import json
import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from runs import run_config
from sae_lens import SAE, HookedSAETransformer, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from torch import Tensor

from mxd_lens import MxD, TrainingMxD, TrainingMxDConfig, TranscoderRunnerConfig, TranscoderTrainingRunner
from mxd_lens.training.trainer import TranscoderTrainer

STEPS, BATCH = 40, 16


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        pytest.fail("W&B was used without being asked for")

    for name in ("init", "log", "finish", "login"):
        monkeypatch.setattr(wandb, name, forbidden)


@pytest.fixture
def runner(
    tiny_model: HookedSAETransformer, words: list[str], tmp_path: Path
) -> Callable[..., TranscoderTrainingRunner]:
    """Makes runners of 40 steps on the tiny model, which write to tmp_path / "run"."""

    def make(**changes: Any) -> TranscoderTrainingRunner:
        settings = {
            "model_name": "words",
            "output_path": str(tmp_path / "run"),
            "training_tokens": STEPS * BATCH,
            "lr": 1e-2,
            "lr_warm_up_steps": 5,
            "n_checkpoints": 3,
        } | changes
        return TranscoderTrainingRunner(
            run_config(**settings),
            override_dataset=Dataset.from_dict({"text": words[:20]}),
            override_model=tiny_model,
        )

    return make


def weights(sae: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in sae.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What a run leaves


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("load", [SAE.load_from_disk, MxD.from_pretrained])
def test_the_folder_holds_the_trained_layer(runner, tmp_path: Path, dtype: str, load: Any) -> None:
    trained = runner(dtype=dtype, sae={"dtype": dtype}).run()
    loaded = load(tmp_path / "run")
    assert type(loaded) is MxD
    assert loaded.dtype == getattr(torch, dtype)
    assert_same(weights(loaded), weights(trained))
    x = torch.randn(9, D_MODEL, dtype=loaded.dtype)
    assert torch.equal(loaded(x), trained(x))


def test_training_in_float16_works_or_is_refused(runner) -> None:
    try:
        run = runner(dtype="float16", sae={"dtype": "float16"})
    except ValueError:
        return
    assert all(weight.isfinite().all() for weight in run.run().state_dict().values())


@pytest.mark.parametrize("changes", [{}, {"k": None, "l1_coefficient": 1e-3}, {"gated": True}])
def test_the_error_falls(runner, changes: dict[str, Any]) -> None:
    run = runner(training_tokens=100 * BATCH, sae=changes)
    run.run()
    errors = [entry["normalized_mse"] for entry in run.trainer.history]
    assert errors[0] == pytest.approx(1)  # y = b = 0 at the start
    assert sum(errors[-10:]) / 10 < 0.7


def test_what_is_written(runner, tmp_path: Path) -> None:
    run = runner()
    run.run()
    assert files(tmp_path / "run") == [
        "cfg.json",
        "checkpoints",
        "history.json",
        "identity.json",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    assert [entry["tokens"] for entry in history] == list(range(BATCH, (STEPS + 1) * BATCH, BATCH))
    assert history[0].keys() == {
        "step",
        "tokens",
        "loss",
        "normalized_mse",
        "relative_error",
        "l0",
        "dead",
        "left_out",
        "lr",
    }
    assert all(0 < entry["l0"] <= 3 for entry in history)
    assert history == run.trainer.history
    assert json.loads((tmp_path / "run" / "runner_cfg.json").read_text())["lr"] == 1e-2


def test_the_metadata_tell_where_the_layer_belongs(runner, tmp_path: Path) -> None:
    run = runner(dataset_path="words", exclude_special_tokens=[1], seqpos_slice=(0, None))
    run.run()
    metadata = SAE.load_from_disk(tmp_path / "run").cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (HOOK_IN, HOOK_OUT)
    for name in ("model_name", "dataset_path", "context_size", "prepend_bos", "training_tokens"):
        assert metadata[name] == getattr(run.cfg, name), name
    assert metadata.exclude_special_tokens == [1]
    assert metadata.seqpos_slice == [0, None]
    assert metadata.disable_concat_sequences is False
    assert metadata.sequence_separator_token == "bos"
    assert metadata.l0 == pytest.approx(3, abs=0.1)


def test_only_the_last_checkpoints_are_kept(runner, tmp_path: Path) -> None:
    runner(n_checkpoints=5, n_checkpoints_kept=2).run()
    # SAELens cuts 640 tokens in 6: a checkpoint after the first batch beyond 107, 214, 321, 428, 535.
    assert files(tmp_path / "run" / "checkpoints") == ["432", "544"]


def test_no_checkpoints_are_kept_or_it_is_refused(runner, tmp_path: Path) -> None:
    try:
        runner(n_checkpoints_kept=0).run()
    except ValueError:
        return
    assert files(tmp_path / "run" / "checkpoints") == []


def test_a_run_that_writes_nothing(runner, tmp_path: Path) -> None:
    runner(output_path=None).run()
    assert list(tmp_path.iterdir()) == []


def test_the_run_depends_on_the_seed_alone(runner) -> None:
    with torch.random.fork_rng():
        one = runner(output_path=None).run()
        torch.manual_seed(99)
        other = runner(output_path=None).run()
    assert_same(weights(one), weights(other))
    assert not torch.equal(one.W_enc, runner(output_path=None, seed=1).run().W_enc)


# The recipe


def test_the_defaults_are_the_papers() -> None:
    cfg = TranscoderRunnerConfig(sae=TrainingMxDConfig(d_in=4, d_out=4, d_sae=9, d_hidden=3, k=2))
    assert (cfg.lr, cfg.lr_warm_up_steps, cfg.lr_scheduler_name, cfg.lr_decay_steps) == (
        4e-4,
        5000,
        "constant",
        0,
    )
    assert (cfg.train_batch_size_tokens, cfg.context_size, cfg.prepend_bos) == (4096, 128, True)
    assert (cfg.training_tokens, cfg.model_name) == (480_000_000, "gpt2")
    assert not cfg.logger.log_to_wandb
    assert cfg.checkpoint_path == str(Path("output/checkpoints").resolve())


@pytest.mark.parametrize("warm_up", [0, 5, 30, 5000])
def test_the_learning_rate_warms_up_and_stays(runner, warm_up: int) -> None:
    """What the optimiser uses in each step: linear from lr / steps to lr, then constant."""
    run = runner(lr_warm_up_steps=warm_up, output_path=None)
    used: list[float] = []
    run.trainer.optimizer.register_step_pre_hook(lambda adam, *_: used.append(adam.param_groups[0]["lr"]))
    run.run()
    expected = [1e-2 * min(1, (step + 1) / max(warm_up, 1)) for step in range(STEPS)]
    assert used == pytest.approx(expected)


def test_every_parameter_is_trained_by_plain_adam(runner) -> None:
    run = runner()
    (group,) = run.trainer.optimizer.param_groups
    assert len(group["params"]) == len(list(run.sae.parameters()))
    assert group["betas"] == (0.9, 0.999)
    assert group["weight_decay"] == 0


def test_wandb_when_asked_for(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **settings: logged.append(settings))
    monkeypatch.setattr(wandb, "log", lambda entry, **_: logged.append(entry))
    monkeypatch.setattr(wandb, "finish", lambda: logged.append({"finished": True}))
    logger = LoggingConfig(log_to_wandb=True, wandb_project="words", wandb_log_frequency=1)
    runner(logger=logger, n_checkpoints=0).run()
    assert logged[0]["project"] == "words"
    assert "metrics/explained_variance" in logged[1]
    assert "metrics/normalized_mse" in logged[1]
    assert logged[-1] == {"finished": True}


def test_saelens_own_trainer_trains_on_pairs() -> None:
    """SAELens' `SAETrainer`, unchanged, on any iterator of pairs: here of a planted linear map."""
    sae = TrainingMxD(TrainingMxDConfig(d_in=6, d_out=4, d_sae=16, d_hidden=12, k=4))
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(6, 4, generator=generator)

    def pairs() -> Iterator[Tensor]:
        while True:
            x = torch.randn(64, 6, generator=generator)
            yield torch.cat([x, x @ planted], dim=-1)

    settings = SAETrainerConfig(
        total_training_samples=64 * 300, train_batch_size_samples=64, lr=1e-2, lr_end=1e-3
    )
    SAETrainer(settings, sae, pairs()).fit()
    x = torch.randn(500, 6, generator=generator)
    y = x @ planted
    assert ((sae(x) - y).pow(2).sum(-1) / y.pow(2).sum(-1)).median() < 0.3


# Refused before anything is spent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_name": "blocks.1.mlp.hook_inn"}, f"no hook point 'blocks.1.mlp.hook_inn'.*{HOOK_IN}"),
        ({"hook_name_out": "blocks.7.hook_mlp_out"}, "no hook point 'blocks.7.hook_mlp_out'.*Near: blocks"),
        ({"widths": (8, D_MODEL)}, f"d_in is 8, but {HOOK_IN}.* has width 16"),
        ({"widths": (D_MODEL, 8)}, f"d_out is 8, but {HOOK_OUT}.* has width 16"),
        ({"training_tokens": 15}, "less than one batch of 16"),
        ({"training_tokens": 0}, "training_tokens must be positive"),
        ({"context_size": -1}, "context_size must be positive"),
        ({"n_batches_in_buffer": 1}, "fewer than a batch"),
        ({"prefetch_llm_batches": 2}, "prefetch_llm_batches is not supported"),
        ({"compile_llm": True}, "compile_llm is not supported"),
        ({"compile_sae": True}, "compile_sae is not supported"),
        ({"hook_head_index": 3}, "hook_head_index is not supported"),
        (
            {"model_from_pretrained_kwargs": {"fold_ln": True}},
            "model_from_pretrained_kwargs is not supported",
        ),
        ({"sae": {"normalize_activations": "layer_norm"}}, "normalize_activations must be 'none'"),
        ({"sae": {"reshape_activations": "hook_z"}}, "reshape_activations must be 'none'"),
        ({"sae": {"decoder_init_norm": 0.1}}, "decoder_init_norm must be None"),
        ({"sae": {"k": None}}, "l1_coefficient must be positive where k is None"),
        ({"sae": {"k": 25}}, "k = 25 and d_sae = 24"),
        ({"dtype": "float31"}, "Invalid dtype: float31"),
        ({"lr_scheduler_name": "sometimes"}, "Unsupported scheduler: sometimes"),
        ({"hook_head_index": 0}, "hook_head_index is not supported"),
        ({"hook_name": HOOK_OUT}, "hook_name and hook_name_out are both"),
        ({"model_class_name": "HookedMamba"}, "model_class_name is not supported"),
        ({"n_checkpoints_kept": 0}, "n_checkpoints_kept must be positive"),
    ],
)
def test_what_cannot_work_is_refused(runner, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner(**changes)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_something_else() -> None:
    with pytest.raises(ValueError, match="sae must be the config of a training transcoder, got dict"):
        TranscoderRunnerConfig(sae={})  # type: ignore[arg-type]


def test_a_folder_with_another_run(runner, tmp_path: Path) -> None:
    runner().run()
    before = (tmp_path / "run" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds another run.*resume_from_checkpoint='latest'"):
        runner(seed=7)
    assert (tmp_path / "run" / "sae_weights.safetensors").read_bytes() == before


def test_a_folder_with_another_runs_checkpoints(runner, tmp_path: Path) -> None:
    runner(output_path=None, checkpoint_path=str(tmp_path / "run" / "checkpoints")).run()
    with pytest.raises(FileExistsError, match="checkpoints holds another run"):
        runner()


def test_a_file_where_the_folder_should_be(runner, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(OSError, match="run"):
        runner()


# Activations that are not numbers


class Poisoned:
    """The pairs of a store, until batch `at`, which is spoilt; it keeps the weights of that moment."""

    def __init__(self, run: TranscoderTrainingRunner, at: int, spoil: Callable[[Tensor], None]) -> None:
        self.run, self.at, self.spoil, self.n = run, at, spoil, 0
        self.weights_before: dict[str, Tensor] = {}

    def __next__(self) -> Tensor:
        batch = next(self.run.activations_store)
        if self.n == self.at:
            self.run.sae.normalize_decoder()
            self.weights_before = weights(self.run.sae)
            self.spoil(batch)
        self.n += 1
        return batch


def set_to(value: float, *index: Any) -> Callable[[Tensor], None]:
    return lambda batch: batch.__setitem__(index, value)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(set_to(float("nan"), 3, 0), id="a NaN"),
        pytest.param(set_to(float("inf"), 0, D_MODEL), id="an infinite target"),
        pytest.param(set_to(float("-inf"), ...), id="all infinite"),
        pytest.param(set_to(1e25, slice(None), slice(D_MODEL, None)), id="a loss that overflows"),
    ],
)
def test_bad_activations_stop_the_run_before_they_spoil_it(runner, tmp_path: Path, spoil) -> None:
    run = runner()
    run.trainer.data_provider = bad = Poisoned(run, 15, spoil)
    with pytest.raises(FloatingPointError, match="step 15") as e:
        run.run()
    assert str(tmp_path / "run" / "checkpoints" / "176") in str(e.value)
    assert files(tmp_path / "run" / "checkpoints") == ["176"]
    assert not (tmp_path / "run" / "cfg.json").exists()
    after = weights(run.sae)
    assert all(torch.allclose(after[name], bad.weights_before[name], atol=1e-6) for name in after)


def test_bad_activations_before_the_first_checkpoint(runner) -> None:
    run = runner()
    run.trainer.data_provider = Poisoned(run, 2, set_to(float("nan"), ...))
    with pytest.raises(FloatingPointError, match=r"16 of 16 activation pairs.*There is no checkpoint"):
        run.run()


def test_a_gradient_that_overflows(runner) -> None:
    """At the start y_hat = b whatever x is: the loss is finite and W_out's gradient is not."""
    run = runner()
    run.trainer.data_provider = Poisoned(run, 0, set_to(1e25, slice(None), slice(D_MODEL)))
    with pytest.raises(FloatingPointError, match="step 0"):
        run.run()
    assert all(weight.isfinite().all() for weight in run.sae.parameters())


# A disk that is full


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_checkpoint_that_cannot_be_written(
    runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """The earlier one stays, the run continues and ends as it would have."""
    save = TranscoderTrainer.save_trainer_state

    def save_sometimes(self: TranscoderTrainer, folder: Path) -> None:
        save(self, folder)
        if self.n_training_samples > 200:
            raise error

    monkeypatch.setattr(TranscoderTrainer, "save_trainer_state", save_sometimes)
    monkeypatch.setattr(logging.getLogger("sae_lens"), "propagate", True)
    run = runner()
    run.run()
    assert files(tmp_path / "run" / "checkpoints") == ["176"]
    assert f"{error}" in caplog.text
    assert "Training continues" in caplog.text
    monkeypatch.undo()
    assert_same(weights(runner(output_path=None).run()), weights(run.sae))


def test_no_room_for_large_files(runner, tmp_path: Path) -> None:
    """The operating system refuses to write more than 100 kB to a file; W_enc alone has 190."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = runner(sae={"d_sae": 3000})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"Could not write .*run: "):
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.trainer.n_training_steps == STEPS
    assert files(tmp_path / "run") == ["checkpoints"]
    assert files(tmp_path / "run" / "checkpoints") == []
    run.save_final_sae(output_path=tmp_path / "elsewhere")
    assert_same(weights(MxD.from_pretrained(tmp_path / "elsewhere")), weights(run.sae))


def test_a_result_that_cannot_be_written(runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner()
    save = run.sae.save_inference_model

    def fail(folder: Path) -> None:
        save(folder)
        (folder / "cfg.json").unlink()
        raise OSError("No space left on device")

    monkeypatch.setattr(run.sae, "save_inference_model", fail)
    with pytest.raises(OSError, match=r"No space left on device.*runner\.save_final_sae") as e:
        run.run()
    assert str(tmp_path / "run" / "checkpoints" / "496") in str(e.value)
    assert files(tmp_path / "run") == ["checkpoints"]


# Other starts


@pytest.mark.filterwarnings("error:Getting length of SAE objects")
def test_training_a_layer_that_is_there(tiny_model: HookedSAETransformer, words: list[str]) -> None:
    cfg = run_config(lr=1e-3)
    sae = TrainingMxD(cfg.sae)
    before = weights(sae)
    text = Dataset.from_dict({"text": words[:20]})
    trained = TranscoderTrainingRunner(cfg, text, tiny_model, override_sae=sae).run()
    assert trained is sae
    assert not torch.equal(sae.W_enc, before["W_enc"])


def test_everything_by_name(tiny_folder: Path, words: list[str], tmp_path: Path) -> None:
    """The model from its folder and the text from its file."""
    (tmp_path / "words.txt").write_text("\n\n".join(words[:20]))
    cfg = run_config(
        model_name=str(tiny_folder),
        dataset_path=str(tmp_path / "words.txt"),
        output_path=str(tmp_path / "run"),
    )
    TranscoderTrainingRunner(cfg).run()
    assert SAE.load_from_disk(tmp_path / "run").cfg.metadata.model_name == str(tiny_folder)

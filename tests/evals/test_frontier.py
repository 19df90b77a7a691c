"""The sweep over architectures, K and layers: comparable, complete, and gone on with where it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer
from tiny import D_MODEL

from mxd_lens import evaluate, frontier, matched_n_experts
from mxd_lens.architectures import matched_n_features
from mxd_lens.evals.frontier import CONTENDERS, Frontier
from mxd_lens.training.multi_runner import MultiTranscoderTrainer
from mxd_lens.training.trainer import TrainingInterrupted, TranscoderTrainer

SIZES = {"transcoder_width": 60, "d_hidden": 16, "training_tokens": 320, "batch": 16}
SMALL = {
    "run_settings": {"context_size": 8, "store_batch_size_prompts": 4, "n_batches_in_buffer": 8},
    **SIZES,
}


@pytest.fixture
def text(words: list[str]) -> Dataset:
    return Dataset.from_dict({"text": words[:40]})


@pytest.fixture
def held_out() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    texts = {name: torch.randint(3, 20, (5, 8), generator=generator) for name in ("same", "other")}
    for tokens in texts.values():
        tokens[:, 0] = 1
    return texts


@pytest.fixture
def sweep(tiny_model: HookedSAETransformer, text: Dataset, held_out: dict[str, torch.Tensor], tmp_path: Path):
    def run(folder: str = "sweep", **changes: Any) -> Frontier:
        settings = {"layers": [1, 2], "ks": [2, 4]} | SMALL | changes
        return frontier(tiny_model, text, held_out, tmp_path / folder, **settings)

    return run


def reports(result: Frontier) -> dict[str, Any]:
    return {point.name: point.reports for point in result.points}


def test_every_point_is_there_and_is_what_evaluate_says(sweep, tiny_model, held_out, tmp_path: Path) -> None:
    result = sweep()
    assert len(result.points) == len(CONTENDERS) * 2 * 2
    assert result.failures == {}
    for point in result.points[::3]:
        sae = SAE.load_from_disk(tmp_path / "sweep" / "trained" / point.name)
        assert sae.cfg.k == point.k
        for name, tokens in held_out.items():
            assert point.reports[name] == evaluate(tiny_model, sae, tokens, progress=False)
    (one,) = result.select("other", 2, "skip_mxd", 4)
    assert one.hook_name == "blocks.2.mlp.hook_in"
    assert [r.l0 for r in result.select("same", 1, "topk_transcoder")] == pytest.approx([2, 4], abs=0.5)
    assert reports(Frontier.load(tmp_path / "sweep")) == reports(result)


def test_sizes_are_matched_and_every_error_has_its_interval(sweep) -> None:
    result = sweep(layers=[1], ks=[2])
    for text in result.texts:
        (table,) = (t for t in result.tables if t.title.startswith("Against") and text in t.title)
        assert [row[2] for row in table.rows] == list(result.settings["labels"])
        (baseline,) = (row for row in table.rows if row[2] == "topk_skip_transcoder")
        assert baseline[4] == "0.000 [0.000, 0.000]"
        for row, point in zip(table.rows, result.points, strict=True):
            report = point.reports[text]
            assert str(row[3]).startswith(f"{report.normalized_mse:.3f} [")
            added = report.ce_loss_replaced - report.ce_loss
            assert sum(report.ce_added_by_sequence) / len(report.ce_added_by_sequence) == pytest.approx(added)
    counts = {point.architecture: point.n_parameters for point in result.points}
    transcoder = counts["topk_transcoder"]
    assert transcoder == 60 * (2 * D_MODEL + 1) + D_MODEL
    # An affine expert costs most: 3 * D_MODEL + 1, and MOLT's transform of rank 1 3 * D_MODEL + 2.
    assert all(transcoder - 3 * D_MODEL - 2 < count <= transcoder for count in counts.values()), counts
    assert {point.architecture: point.d_sae for point in result.points} == {
        "mxd": matched_n_experts(D_MODEL, D_MODEL, 16, 60),
        "skip_mxd": matched_n_experts(D_MODEL, D_MODEL, 8, 60, gated=True, skip=True),
        "affine_skip_mxd": (60 * 33 - 7 * 33 - 16 * 16) // 49,
        "molt": 60 * 33 // 50,
        "topk_transcoder": 60,
        "topk_skip_transcoder": matched_n_features(D_MODEL, D_MODEL, 60),
        "batch_topk_transcoder": 60,
        "topk_sae": 60,
    }
    with pytest.raises(ValueError, match="with one expert has"):
        matched_n_features(100, 100, 50)


def test_called_again_it_trains_only_what_is_new(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(ks=[2])
    trained = []
    fit = MultiTranscoderTrainer.fit

    def counting(self: MultiTranscoderTrainer) -> Any:
        trained.extend(self.trainers)
        return fit(self)

    monkeypatch.setattr(MultiTranscoderTrainer, "fit", counting)
    again = sweep(ks=[2, 4])
    assert trained == [point.name for point in again.points if point.k == 4]
    assert {name: r for name, r in reports(again).items() if name in reports(first)} == reports(first)
    assert reports(sweep("at once", ks=[2, 4])) == reports(again)
    assert reports(sweep(ks=[4])) == reports(again)


@pytest.mark.parametrize("first", ["topk_sae", "mxd"])
def test_an_sae_alone_joins_a_sweep(sweep, first: str) -> None:
    """It reads outputs alone, and keeps activations of its own."""
    other = {"topk_sae": "mxd", "mxd": "topk_sae"}[first]
    sweep(ks=[2], contenders={first: CONTENDERS[first]})
    both = reports(sweep(ks=[2], contenders={other: CONTENDERS[other]}))
    assert both == reports(sweep("at once", ks=[2], contenders={n: CONTENDERS[n] for n in (first, other)}))


@pytest.mark.parametrize("layers_at_once", [3, 100])
def test_interrupted_it_goes_on(sweep, monkeypatch: pytest.MonkeyPatch, layers_at_once: int) -> None:
    whole = sweep("whole", ks=[2])
    step, steps = TranscoderTrainer.step, []

    def stopping(self: TranscoderTrainer, batch: torch.Tensor) -> Any:
        steps.append(1)
        if len(steps) == 70:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(TranscoderTrainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(ks=[2], layers_at_once=layers_at_once)
    assert reports(sweep(ks=[2], layers_at_once=layers_at_once)) == reports(whole)


def test_asked_to_stop_it_saves(sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = sweep("whole", ks=[2])
    train_step = MultiTranscoderTrainer.train_step

    def stopping(self: MultiTranscoderTrainer) -> str:
        text = train_step(self)
        self.stop.requested = self.n_training_steps == 13
        return text

    monkeypatch.setattr(MultiTranscoderTrainer, "train_step", stopping)
    with pytest.raises(TrainingInterrupted, match=str(13 * 16)):
        sweep(ks=[2])
    assert [path.name for path in (tmp_path / "sweep" / "checkpoints").iterdir()] == [str(13 * 16)]
    assert reports(sweep(ks=[2])) == reports(whole)
    assert not (tmp_path / "sweep" / "checkpoints").exists()


def test_one_that_fails_is_named_and_tried_again(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sweep("whole", layers=[1], ks=[2])
    step = TranscoderTrainer.step

    def failing(self: TranscoderTrainer, batch: torch.Tensor) -> Any:
        if self.sae.cfg.architecture() == "mxd":
            raise FloatingPointError("the loss is nan")
        return step(self, batch)

    monkeypatch.setattr(TranscoderTrainer, "step", failing)
    result = sweep(layers=[1], ks=[2])
    assert result.failures == {"layer1-mxd-k2-seed0": "FloatingPointError: the loss is nan"}
    assert sum(bool(point.reports) for point in result.points) == len(CONTENDERS) - 1
    monkeypatch.undo()
    again = sweep(layers=[1], ks=[2])
    assert again.failures == {}
    assert reports(again) == reports(whole)


def test_all_that_fail(sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise FloatingPointError("no")

    monkeypatch.setattr(TranscoderTrainer, "step", failing)
    assert len(sweep(layers=[1], ks=[2]).failures) == len(CONTENDERS)


def test_a_layer_that_was_lost(sweep, tmp_path: Path) -> None:
    """Trained, but unreadable when it is to be judged."""
    result = sweep(layers=[1], ks=[2])
    name = result.points[0].name
    result.points[0].reports = {}
    result.save(tmp_path / "sweep" / "frontier.json")
    weights = tmp_path / "sweep" / "trained" / name / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    again = sweep(layers=[1], ks=[2])
    assert list(again.failures) == [name]
    assert "SafetensorError" in again.failures[name]


def test_seeds_differ_in_the_weights_alone(sweep) -> None:
    result = sweep(layers=[1], ks=[2], seeds=[0, 1])
    assert reports(sweep("one", layers=[1], ks=[2])).items() <= reports(result).items()
    one, other = result.select("same", 1, "mxd", 2)
    assert one.normalized_mse != other.normalized_mse


def test_another_sweep_in_the_folder(sweep, tmp_path: Path) -> None:
    sweep(layers=[1], ks=[2])
    with pytest.raises(ValueError, match=r"another sweep\. transcoder_width: 60 then, 50 now"):
        sweep(layers=[1], ks=[2], transcoder_width=50)
    known = json.loads((tmp_path / "sweep" / "frontier.json").read_text())
    assert known["settings"]["training_tokens"] == 320
    assert known["settings"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("nothing", ["layers", "ks", "seeds"])
def test_nothing_to_compare(sweep, nothing: str) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        sweep(**{nothing: []})


def test_a_hook_point_that_is_not_there(sweep) -> None:
    with pytest.raises(ValueError, match=r"no hook point .blocks\.7"):
        sweep(layers=[7])

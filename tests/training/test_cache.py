"""Activations on disk: the language model runs once, and nothing else changes."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import run_config
from sae_lens import HookedSAETransformer, TopKTrainingSAEConfig
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from torch import Tensor

from mxd_lens import PairedActivationsStore
from mxd_lens.artifacts.files import LockedError, WriteError
from mxd_lens.artifacts.identity import RunIdentity
from mxd_lens.training.cache import ActivationCache

WIDTH = 3
IDENTITY = RunIdentity.of(model_name="a model", hooks=["a layer"], text="a text")
SETTINGS = {"width": WIDTH, "dtype": torch.float32, "identity": IDENTITY}


def rows(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, WIDTH, generator=generator) for size in sizes]


def filled(folder: Path, batches: list[Tensor], **changes: Any) -> ActivationCache:
    cache = ActivationCache(folder, **(SETTINGS | changes))
    for batch in batches:
        cache.append(batch)
    cache.close()
    return cache


def contents(cache: ActivationCache) -> list[Tensor]:
    return [cache[i] for i in range(len(cache))]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    batches = rows(2, 5, 0, 1)
    written = []
    for batch in batches:
        cache = ActivationCache(tmp_path, WIDTH, dtype, IDENTITY)
        written.append(cache.append(batch))
        cache.close()
    assert_same(written, [batch.to(dtype) for batch in batches])
    cache = ActivationCache(tmp_path, WIDTH, dtype, IDENTITY)
    assert_same(contents(cache), written)
    assert 3 in cache
    assert 4 not in cache


def test_rows_need_not_be_contiguous(tmp_path: Path) -> None:
    transposed = torch.arange(6.0).view(WIDTH, 2).T
    assert_same(contents(filled(tmp_path, [transposed])), [transposed])


def test_completeness_is_kept(tmp_path: Path) -> None:
    cache = filled(tmp_path, rows(2))
    assert not ActivationCache(tmp_path, **SETTINGS).is_complete
    cache.mark_complete()
    cache.mark_complete()
    assert ActivationCache(tmp_path, **SETTINGS).is_complete
    assert len(ActivationCache(tmp_path, **SETTINGS)) == 1


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            {"identity": RunIdentity(IDENTITY.fields | {"text": "other"})},
            "text: 'a text' then, 'other' now",
        ),
        ({"width": 4}, "width: 3 then, 4 now"),
        ({"dtype": torch.float16}, "dtype: 'torch.float32' then, 'torch.float16' now"),
    ],
)
def test_the_activations_of_something_else(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    filled(tmp_path, rows(2))
    with pytest.raises(ValueError, match=rf"holds the results of another run \({difference}\)"):
        ActivationCache(tmp_path, **(SETTINGS | change))


def test_a_cache_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    header = {"key": "0123", "width": WIDTH, "dtype": "torch.float32"}
    (tmp_path / "batches.jsonl").write_text(json.dumps(header) + '\n{"end": 2}\n')
    with pytest.raises(ValueError, match="holds the results of another run"):
        ActivationCache(tmp_path, **SETTINGS)


@pytest.mark.parametrize("where", [0, 17, -1])
def test_damaged_rows_are_not_trained_on(tmp_path: Path, where: int) -> None:
    filled(tmp_path, rows(2, 4))
    content = bytearray((tmp_path / "activations.bin").read_bytes())
    content[where] ^= 1
    (tmp_path / "activations.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: batch \d of activations.bin is not what was written"):
        contents(ActivationCache(tmp_path, **SETTINGS))


@pytest.mark.parametrize(
    "line", ['{"end": 1, "hash": "0"}', '{"end": "x", "hash": "0"}', '{"end": 9}', "[1]", "nonsense"]
)
def test_a_damaged_index(tmp_path: Path, line: str) -> None:
    filled(tmp_path, rows(2, 4))
    with (tmp_path / "batches.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="damaged"):
        ActivationCache(tmp_path, **SETTINGS)


def test_one_process_at_a_time_adds_and_any_number_reads(tmp_path: Path) -> None:
    one, other = ActivationCache(tmp_path, **SETTINGS), ActivationCache(tmp_path, **SETTINGS)
    one.append(rows(2)[0])
    with pytest.raises(LockedError, match=rf"fills this activation cache \(process {os.getpid()} on"):
        other.append(rows(3)[0])
    one.mark_complete()
    with pytest.raises(ValueError, match="Another process has added"):
        other.append(rows(3)[0])
    assert_same(contents(ActivationCache(tmp_path, **SETTINGS)), rows(2))
    assert not (tmp_path / ".lock").exists()


def test_a_full_disk_ends_in_one_line_and_keeps_the_batches_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(tmp_path, rows(2, 4))

    def full(_: ActivationCache, line: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "_write_line", full)
        with pytest.raises(WriteError, match=r"No space left on device. The activations so far are kept"):
            cache.append(rows(3)[0])
    assert_same([cache.append(rows(1)[0])], rows(1))
    assert_same(contents(ActivationCache(tmp_path, **SETTINGS)), [*rows(2, 4), rows(1)[0]])


def test_rows_without_their_line_are_not_counted(tmp_path: Path) -> None:
    """The run was killed between the rows and the index."""
    batches = rows(2, 4)
    filled(tmp_path, batches)
    with (tmp_path / "activations.bin").open("ab") as file:
        file.write(b"\1" * 17)
    cache = ActivationCache(tmp_path, **SETTINGS)
    assert_same(contents(cache), batches)
    cache.append(rows(3)[0])
    cache.close()
    assert_same(contents(ActivationCache(tmp_path, **SETTINGS)), [*batches, rows(3)[0]])


def test_rows_that_are_missing(tmp_path: Path) -> None:
    filled(tmp_path, rows(2, 4))
    file = tmp_path / "activations.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shorter than batches\.jsonl says\. Delete"):
        ActivationCache(tmp_path, **SETTINGS)


@pytest.mark.parametrize("half", ["", "{", '{"en', '{"end": ', '{"end": 9', '{"end": 9}', '{"complete": tr'])
@pytest.mark.parametrize("n_whole", [0, 1, 2])
def test_half_an_index_line(tmp_path: Path, half: str, n_whole: int) -> None:
    """The run was killed while it wrote a line: the batches before it stay, and more can be added."""
    batches = rows(2, 4)[:n_whole]
    filled(tmp_path, batches)
    with (tmp_path / "activations.bin").open("ab") as file:
        file.write(rows(3)[0].numpy().tobytes())
    with (tmp_path / "batches.jsonl").open("a") as file:
        file.write(half)
    cache = ActivationCache(tmp_path, **SETTINGS)
    assert_same(contents(cache), batches)
    cache.append(rows(1)[0])
    assert_same(contents(ActivationCache(tmp_path, **SETTINGS)), [*batches, rows(1)[0]])


@pytest.mark.parametrize("header", ["", "{"])
def test_half_a_header(tmp_path: Path, header: str) -> None:
    """Nothing was in the cache yet: it starts anew."""
    filled(tmp_path, [])
    (tmp_path / "batches.jsonl").write_text(header)
    assert_same(contents(filled(tmp_path, rows(2))), rows(2))


# With a store


@pytest.fixture
def texts(words: list[str]) -> list[str]:
    return words[:20]


def cached_store(model: Any, texts: list[str], folder: Path, **changes: Any) -> PairedActivationsStore:
    cfg = run_config(**(cache_settings(folder) | changes))
    return PairedActivationsStore.from_config(model, cfg, Dataset.from_dict({"text": texts}))


def cache_settings(folder: Path) -> dict[str, Any]:
    return {
        "use_cached_activations": True,
        "cached_activations_path": str(folder),
        "cached_activations_dtype": "float32",
    }


def take(store: Iterator[Tensor], n: int) -> Tensor:
    return torch.cat(list(islice(store, n)))


BATCHES = 50
"""Of 16 tokens: more than three epochs."""


@pytest.fixture
def uncached(tiny_model: HookedSAETransformer, texts: list[str]) -> Tensor:
    store = PairedActivationsStore.from_config(tiny_model, run_config(), Dataset.from_dict({"text": texts}))
    return take(store, BATCHES)


def forbid_the_model(model: Any, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """The model runs the store's check of the widths, then `after` times, and no more."""
    runs = [model.run_with_cache] * (1 + after)
    monkeypatch.setattr(model, "run_with_cache", lambda *args, **kwargs: runs.pop()(*args, **kwargs))


def n_forward_passes(model: HookedSAETransformer, texts: list[str]) -> int:
    """In an epoch: the text's tokens and separators, 7 to a sequence beside BOS, 4 sequences at a time."""
    n_tokens = sum(len(text.split()) for text in texts) + len(texts) - 1
    return -(-(n_tokens // 7) // 4)


def test_a_cache_changes_nothing(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, uncached: Tensor
) -> None:
    assert torch.equal(take(cached_store(tiny_model, texts, tmp_path), BATCHES), uncached)
    assert torch.equal(take(cached_store(tiny_model, texts, tmp_path), BATCHES), uncached)


def test_the_model_runs_for_one_epoch(
    tiny_model: HookedSAETransformer,
    texts: list[str],
    tmp_path: Path,
    uncached: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_the_model(tiny_model, monkeypatch, after=n_forward_passes(tiny_model, texts))
    assert torch.equal(take(cached_store(tiny_model, texts, tmp_path), BATCHES), uncached)


def test_a_second_store_does_not_run_the_model(
    tiny_model: HookedSAETransformer,
    texts: list[str],
    tmp_path: Path,
    uncached: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take(cached_store(tiny_model, texts, tmp_path), 20)
    second = cached_store(tiny_model, texts, tmp_path)  # checks that model and text are the same
    forbid_the_model(tiny_model, monkeypatch)
    assert torch.equal(take(second, BATCHES), uncached)


@pytest.mark.parametrize("n_taken", [1, 5, 14, 30])
def test_a_resumed_store_with_a_cache(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, uncached: Tensor, n_taken: int
) -> None:
    """With the cache as it was at the checkpoint, and as it was when the run was killed."""
    store = cached_store(tiny_model, texts, tmp_path / "now")
    take(store, n_taken)
    store.save_to_checkpoint(tmp_path)
    shutil.copytree(tmp_path / "now", tmp_path / "then")
    take(store, 9)
    store.close()
    for cache in ("now", "then"):
        resumed = cached_store(tiny_model, texts, tmp_path / cache)
        resumed.load_from_checkpoint(tmp_path)
        assert torch.equal(take(resumed, BATCHES - n_taken), uncached[16 * n_taken :])


def test_a_resumed_store_whose_cache_is_lost(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, uncached: Tensor
) -> None:
    store = cached_store(tiny_model, texts, tmp_path / "lost")
    take(store, 5)
    store.save_to_checkpoint(tmp_path)
    resumed = cached_store(tiny_model, texts, tmp_path / "new")
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(take(resumed, BATCHES - 5), uncached[16 * 5 :])
    assert torch.equal(take(cached_store(tiny_model, texts, tmp_path / "new"), BATCHES), uncached)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounding_cache_gives_every_epoch_the_same(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, uncached: Tensor, dtype: str
) -> None:
    """The first epoch, which runs the model, is rounded as those after it."""
    first = take(cached_store(tiny_model, texts, tmp_path, cached_activations_dtype=dtype), BATCHES)
    again = take(cached_store(tiny_model, texts, tmp_path, cached_activations_dtype=dtype), BATCHES)
    assert torch.equal(first, again)
    assert torch.equal(first, uncached.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize(
    "change",
    [
        {"hook_name": "blocks.0.mlp.hook_in"},
        {"context_size": 9},
        {"exclude_special_tokens": False},
        {"prepend_bos": False},
        {"store_batch_size_prompts": 3},
    ],
)
def test_a_cache_of_another_run_is_refused(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, change: dict[str, Any]
) -> None:
    next(cached_store(tiny_model, texts, tmp_path))
    with pytest.raises(ValueError, match="holds the results of another run"):
        cached_store(tiny_model, texts, tmp_path, **change)


def test_tokenised_text_is_the_same_text_the_second_time(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path
) -> None:
    """SAELens sets a format on a tokenised data set, which counts as a change of it."""
    text = Dataset.from_dict({"tokens": [[1, 3, 4, 5, 6, 7, 8, 9, 10, 11]] * 20})
    cfg = run_config(**cache_settings(tmp_path), context_size=10)
    first = take(PairedActivationsStore.from_config(tiny_model, cfg, text), 3)
    assert torch.equal(take(PairedActivationsStore.from_config(tiny_model, cfg, text), 3), first)


def test_what_is_captured_beside_it_adds_no_order_of_its_own(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path
) -> None:
    """An SAE on a hook that is captured anyway, first, last or not at all."""
    text = Dataset.from_dict({"text": texts})
    cfg = run_config(**cache_settings(tmp_path))
    sae = replace(cfg, sae=TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=24, k=3), hook_name=cfg.hook_name_out)
    next(PairedActivationsStore.from_config(tiny_model, cfg, text))
    for first, beside in [(cfg, [sae]), (sae, [cfg])]:
        store = PairedActivationsStore.from_config(tiny_model, first, text, beside)
        assert store.hook_names == [HOOK_IN, HOOK_OUT]


@pytest.mark.parametrize("what", ["weights", "text"])
def test_a_cache_of_other_weights_or_text_under_the_same_name(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, what: str
) -> None:
    next(cached_store(tiny_model, texts, tmp_path))
    if what == "weights":
        tiny_model.W_E.data.mul_(-1)
    else:
        texts = [*texts[:-1], "red " * 20]
    with pytest.raises(ValueError, match="holds the results of another run"):
        cached_store(tiny_model, texts, tmp_path)


def test_a_short_text_with_a_cache(tiny_model: HookedSAETransformer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too short"):
        next(cached_store(tiny_model, ["the cat"], tmp_path))


@pytest.mark.parametrize("change", [1e-6, 0.5])
def test_any_other_weights_are_refused(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, change: float
) -> None:
    next(cached_store(tiny_model, texts, tmp_path))
    tiny_model.blocks[0].mlp.W_out.data[-1, -1] += change
    with pytest.raises(ValueError, match=r"model\.weights: '[0-9a-f]+' then, '[0-9a-f]+' now"):
        cached_store(tiny_model, texts, tmp_path)


def test_a_later_batch_is_compared_too(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, text and settings, and other activations: another kernel, or a damaged cache."""
    first = cached_store(tiny_model, texts, tmp_path)
    take(first, 20)
    first.close()
    capture, calls = PairedActivationsStore._capture, []

    def wrong_later(self: PairedActivationsStore, tokens: Tensor) -> Tensor:
        calls.append(1)
        return capture(self, tokens) * (1 if len(calls) == 1 else 1.05)

    monkeypatch.setattr(PairedActivationsStore, "_capture", wrong_later)
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(3))
    with pytest.raises(ValueError, match=r"holds other activations than this model gives.*batch 3"):
        cached_store(tiny_model, texts, tmp_path)


@pytest.mark.parametrize(
    "change", [{"sequence_separator_token": None}, {"disable_concat_sequences": True}, {"dtype": "bfloat16"}]
)
def test_every_setting_that_decides_the_activations_is_known(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, change: dict[str, Any]
) -> None:
    next(cached_store(tiny_model, texts, tmp_path))
    with pytest.raises(ValueError, match=f"{next(iter(change))}: "):
        cached_store(tiny_model, texts, tmp_path, **change)

"""The pairs [x | y] that are served are the model's activations, each token's with its own."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import CONTEXT, run_config
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.mixing_buffer import mixing_buffer
from tiny import D_MODEL, HOOK_IN, HOOK_OUT
from torch import Tensor

from mxd_lens import PairedActivationsStore, load_model
from mxd_lens.training.activations import MixingBuffer

BOS, EOS, UNK = 1, 2, 0
IN_ORDER = {"activations_mixing_fraction": 0.0}


def store_of(model: Any, texts: list[str], **changes: Any) -> PairedActivationsStore:
    return PairedActivationsStore.from_config(
        model, run_config(**changes), Dataset.from_dict({"text": texts})
    )


def take(store: Iterator[Tensor], n: int) -> Tensor:
    """The rows of the next n batches."""
    return torch.cat(list(islice(store, n)))


@pytest.fixture
def texts(words: list[str]) -> list[str]:
    return words[:20]


@pytest.fixture
def bridge(tiny_folder: Path) -> SAETransformerBridge:
    return load_model(tiny_folder, model_class=SAETransformerBridge)


def packed(model: HookedSAETransformer, texts: list[str]) -> list[Tensor]:
    """The sequences of a text, by SAELens' own packing."""
    rows = (torch.tensor(model.tokenizer(text)["input_ids"]) for text in texts)
    return list(concat_and_batch_sequences(rows, CONTEXT, BOS, sequence_separator_token_id=BOS))


def captured(
    model: HookedSAETransformer, texts: list[str], excluded: tuple[int, ...], positions: slice
) -> Tensor:
    """All pairs of a text in order, one sequence at a time and one token at a time."""
    rows = []
    for sequence in packed(model, texts):
        _, cache = model.run_with_cache(sequence[None])
        for position in range(CONTEXT)[positions]:
            if sequence[position] not in excluded:
                x = cache[HOOK_IN][0, position]
                y = cache["blocks.1.hook_resid_post"] - cache["blocks.1.hook_resid_mid"]
                rows.append(torch.cat([x, y[0, position]]))
    return torch.stack(rows)


# The mixing buffer


@pytest.mark.parametrize("mix_fraction", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("buffer_size", "batch_size"), [(16, 16), (16, 5), (40, 7), (100, 3)])
def test_mixing_is_that_of_saelens(buffer_size: int, batch_size: int, mix_fraction: float) -> None:
    """Batch for batch, whatever the sizes of what comes in; SAELens draws from the global generator."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 24, (40,), generator=generator).tolist()
    chunks = torch.arange(sum(sizes) * 2.0).view(-1, 2).split(sizes)
    buffer = MixingBuffer(buffer_size, batch_size, mix_fraction, seed=5)
    ours = []
    for chunk in chunks:
        buffer.add(chunk)
        while buffer.is_ready:
            ours.append(buffer.take())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = list(mixing_buffer(buffer_size, batch_size, iter(chunks), mix_fraction))
    assert len(ours) > 3
    # At the end of its input SAELens also serves what is left; here the text starts again.
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs[: len(ours)]), atol=0, rtol=0)
    assert len(theirs) - len(ours) <= buffer_size // batch_size + 1


@pytest.mark.parametrize(
    ("settings", "message"), [((4, 5, 0.5), "fewer than a batch"), ((5, 5, 1.5), "0 to 1")]
)
def test_a_buffer_that_cannot_work(settings: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixingBuffer(*settings, seed=0)


# The pairs


@pytest.mark.parametrize("model_class", [HookedSAETransformer, SAETransformerBridge])
@pytest.mark.parametrize(
    ("exclude", "excluded"), [(True, (BOS, EOS, UNK)), (False, ()), ([3, 7], (3, 7)), ([], ())]
)
@pytest.mark.parametrize("seqpos", [(None,), (2, -1)])
def test_the_pairs_are_the_models_activations(
    tiny_folder: Path, tiny_model: Any, texts: list[str], model_class: type, exclude, excluded, seqpos
) -> None:
    """An epoch in order against run_with_cache, token by token."""
    expected = captured(tiny_model, texts, excluded, slice(*seqpos))
    model = load_model(tiny_folder, model_class=model_class)
    store = store_of(model, texts, exclude_special_tokens=exclude, seqpos_slice=seqpos, **IN_ORDER)
    pairs = take(store, -(-len(expected) // 16))[: len(expected)]
    torch.testing.assert_close(pairs, expected, atol=1e-5, rtol=0)


def test_mixing_keeps_the_pairs_together(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    """Every row served is a row of the independent capture, x and y of one token, and out of order."""
    expected = captured(tiny_model, texts, (BOS, EOS, UNK), slice(None))
    pairs = take(store_of(tiny_model, texts), 20)
    distance, index = (pairs[:, None] - expected).abs().amax(-1).min(dim=1)
    assert distance.max() < 1e-5
    assert (index.diff() != 1).float().mean() > 0.5
    assert len(index.unique()) > len(expected) / 2


def test_the_text_starts_again(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    n = len(captured(tiny_model, texts, (BOS, EOS, UNK), slice(None)))
    rows = take(store_of(tiny_model, texts, **IN_ORDER), 3 * n // 16)
    assert len(rows) > 2 * n
    assert torch.equal(rows[n : 2 * n], rows[:n])


@pytest.mark.parametrize("hook_out", [HOOK_OUT, "blocks.1.mlp.hook_out"])
def test_a_bridge_gives_the_same_pairs(
    tiny_model: HookedSAETransformer, bridge: SAETransformerBridge, texts: list[str], hook_out: str
) -> None:
    one, other = (take(store_of(m, texts, hook_name_out=hook_out), 12) for m in (tiny_model, bridge))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_class", [HookedSAETransformer, SAETransformerBridge])
def test_the_forward_pass_stops_after_the_layer(
    tiny_folder: Path, texts: list[str], model_class: type
) -> None:
    model = load_model(tiny_folder, model_class=model_class)
    fired: list[str] = []
    for layer in (1, 2):
        model.add_hook(f"blocks.{layer}.mlp.hook_in", lambda _, hook: fired.append(hook.name))
    next(store_of(model, texts))
    assert set(fired) == {HOOK_IN}


def test_a_tokenised_data_set(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    rows = [sequence.tolist() for sequence in packed(tiny_model, texts)]
    store = PairedActivationsStore.from_config(
        tiny_model, run_config(), Dataset.from_dict({"input_ids": rows})
    )
    assert torch.equal(take(store, 12), take(store_of(tiny_model, texts), 12))


def test_a_streamed_data_set(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    streamed = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    store = PairedActivationsStore.from_config(tiny_model, run_config(), streamed)
    assert torch.equal(take(store, 40), take(store_of(tiny_model, texts), 40))


@pytest.mark.parametrize(
    "streaming",
    [True, False],
)
def test_a_data_set_from_the_hub(
    tiny_model: HookedSAETransformer, texts: list[str], monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, split: str, streaming: bool) -> Dataset:
        asked.append((name, split, streaming))
        return Dataset.from_dict({"text": texts})

    monkeypatch.setattr("mxd_lens.text.load_dataset", load_dataset)
    PairedActivationsStore.from_config(tiny_model, run_config(dataset_path="a/b", streaming=streaming))
    assert asked == [("a/b", "train", streaming)]


# Refused


@pytest.mark.parametrize(
    ("widths", "message"), [((8, D_MODEL), f"d_in is 8, but {HOOK_IN}"), ((D_MODEL, 9), "d_out is 9")]
)
def test_widths_that_do_not_fit(
    tiny_model: HookedSAETransformer, texts: list[str], widths: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{message}.* has width {D_MODEL}"):
        store_of(tiny_model, texts, widths=widths)


@pytest.mark.parametrize("texts", [["the cat"], [""]])
def test_a_text_that_is_too_short(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="does not fill one sequence of 8 tokens"):
        next(store_of(tiny_model, texts))


def nothing() -> Iterator[dict[str, str]]:
    yield from ()


@pytest.mark.parametrize(
    "empty",
    [
        lambda: Dataset.from_dict({"text": []}),
        pytest.param(lambda: IterableDataset.from_generator(nothing)),
    ],
)
def test_an_empty_data_set(tiny_model: HookedSAETransformer, empty: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="empty"):
        PairedActivationsStore.from_config(tiny_model, run_config(), empty())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_text_of_excluded_tokens_only(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    with time_limit(3), pytest.raises(ValueError, match="excluded"):
        next(store_of(tiny_model, texts, exclude_special_tokens=list(range(30))))


# A store that stops and goes on


@pytest.mark.parametrize("mix_fraction", [0.0, 0.5])
@pytest.mark.parametrize("n_taken", [0, 1, 7, 14, 15, 16, 40])
def test_a_resumed_store_goes_on_exactly(
    tiny_model: HookedSAETransformer, texts: list[str], tmp_path: Path, n_taken: int, mix_fraction: float
) -> None:
    """Bit for bit, wherever in the epoch it stopped (an epoch is 14 to 15 batches), into the next ones."""
    store = store_of(tiny_model, texts, activations_mixing_fraction=mix_fraction)
    list(islice(store, n_taken))
    store.save_to_checkpoint(tmp_path)
    resumed = store_of(tiny_model, texts, activations_mixing_fraction=mix_fraction)
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(take(resumed, 20), take(store, 20))


def test_saving_changes_nothing(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    store, saved = store_of(tiny_model, texts), store_of(tiny_model, texts)
    for _ in range(20):
        saved.state_dict()
        assert torch.equal(next(store), next(saved))


def test_the_global_generator_does_not_matter(tiny_model: HookedSAETransformer, texts: list[str]) -> None:
    with torch.random.fork_rng():
        one = store_of(tiny_model, texts)
        torch.manual_seed(77)
        other = store_of(tiny_model, texts)
        assert torch.equal(take(one, 10), take(other, 10))
    assert not torch.equal(
        take(store_of(tiny_model, texts, seed=43), 10), take(store_of(tiny_model, texts), 10)
    )

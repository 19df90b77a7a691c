"""Passages of a text with what an expert does on them: what an interpreter reads, and is tested on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import active_experts, expert_ids, layer_input
from mxd_lens.evals.faithfulness import Place

MARKS = ("<<", ">>")
"""Around the tokens that are said to make an expert fire."""
THRESHOLD = 0.3
"""Tokens are marked where the coefficient is at least this share of the passage's largest."""


@dataclass(frozen=True)
class Passage:
    """Some tokens in a row, special ones left out, and an expert's coefficients on them."""

    ids: list[int]
    """The tokens' ids."""
    tokens: list[str]
    """Their texts."""
    coefficients: list[float]
    """a_n, 0 where the expert does not fire."""

    @property
    def peak(self) -> float:
        return max(self.coefficients, default=0.0)

    @property
    def fires(self) -> bool:
        return self.peak > 0

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def strong(self) -> list[int]:
        """The places of the tokens on which it fires at least 0.3 times as strongly as at its peak."""
        return [i for i, a in enumerate(self.coefficients) if a > 0 and a >= THRESHOLD * self.peak]

    @property
    def silent(self) -> list[int]:
        """The places of the tokens on which it does not fire."""
        return [i for i, a in enumerate(self.coefficients) if a == 0]

    def marked(self, places: Sequence[int] | None = None) -> str:
        """The text with the tokens at some places between << and >>; by default, the strong ones."""
        chosen = set(self.strong if places is None else places)
        parts = []
        for is_marked, group in groupby(range(len(self.tokens)), key=chosen.__contains__):
            text = "".join(self.tokens[i] for i in group)
            parts.append(text.join(MARKS) if is_marked else text)
        return "".join(parts)


class ExpertPassages(NamedTuple):
    """An expert's passages: some to explain it from, others to test the explanation on."""

    expert: int
    explain: list[Passage]
    """On which it fires most strongly, but for those to test on."""
    test: list[Passage]
    """On which it fires, spread evenly over how strongly."""
    silent: list[Passage]
    """On which it does not fire, drawn at random."""
    n_firing: int
    """Passages of the text on which it fires."""


@torch.no_grad()
def read_passages(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    experts: Sequence[int] | Int[Tensor, " n"],
    length: int = 32,
    n_explain: int = 20,
    n_test: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> list[ExpertPassages]:
    """The passages of a text for some experts.

    Args:
        sae, model, tokens, batch_size, progress: as for `evaluate`. Memory grows with the tokens times the
            experts asked for.
        experts: which.
        length: tokens in a passage; sequences are cut into passages, and a rest is left out.
        n_explain: passages to explain an expert from, at most.
        n_test: passages to test on at most, as many on which it fires and on which it does not. Where an
            expert fires on few passages, half of them are for the test.
        seed: of the draw of silent passages.

    Raises:
        IndexError: there is no such expert.
        ValueError: a number is not positive, sequences are shorter than a passage, the layer does not belong
            to the model, or there are no tokens.
    """
    for name, value in {"length": length, "n_explain": n_explain, "n_test": n_test}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    ids = expert_ids(sae, experts)
    place = Place.of(sae, model, tokens)
    if tokens.shape[1] < length:
        raise ValueError(f"Sequences of {tokens.shape[1]} tokens hold no passage of {length}.")
    batches = tqdm(tokens.split(batch_size), desc="Reading passages", disable=not progress)
    values = torch.cat([_coefficients(sae, model, batch, ids, place) for batch in batches])
    n_passages = tokens.shape[1] // length
    windows = tokens.cpu()[:, : n_passages * length].reshape(-1, length)
    kept = place.kept(windows)
    values = values[:, :, : n_passages * length].transpose(0, 1).reshape(len(ids), -1, length)
    texts: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in texts:
            texts[token] = model.tokenizer.decode([token])
        return texts[token]

    def passage(of: Float[Tensor, "passages length"], row: int) -> Passage:
        here = windows[row][kept[row]].tolist()
        return Passage(here, [text_of(t) for t in here], of[row][kept[row]].tolist())

    return [
        _choose(expert, of, partial(passage, of), n_explain, n_test, seed)
        for expert, of in zip(ids.tolist(), values, strict=True)
    ]


def _coefficients(
    sae: SAE[Any], model: Any, tokens: Tensor, experts: Int[Tensor, " n"], place: Place
) -> Float[Tensor, "sequences n positions"]:
    x = layer_input(sae, model, tokens)
    a, ids = active_experts(sae, x)
    of_each = torch.stack([(a * (ids == n)).sum(-1) for n in experts], dim=1)
    return (of_each * place.kept(tokens).to(of_each.device).unsqueeze(1)).float().cpu()


def _choose(
    expert: int,
    coefficients: Float[Tensor, "passages length"],
    passage: Callable[[int], Passage],
    n_explain: int,
    n_test: int,
    seed: int,
) -> ExpertPassages:
    peaks = coefficients.amax(-1)
    order = peaks.argsort(descending=True, stable=True)
    firing = order[peaks[order] > 0]
    n = min(n_test, len(firing) // 2)
    # Not the very strongest: the middles of n equal parts of the ranking.
    tested = ((torch.arange(n) + 0.5) * len(firing) / max(n, 1)).long()
    rest = torch.ones(len(firing), dtype=torch.bool)
    rest[tested] = False
    silent = (peaks == 0).nonzero()[:, 0]
    drawn = torch.randperm(len(silent), generator=torch.Generator().manual_seed(seed))[:n]
    return ExpertPassages(
        expert=expert,
        explain=[passage(int(i)) for i in firing[rest][:n_explain]],
        test=[passage(int(i)) for i in firing[tested]],
        silent=[passage(int(i)) for i in silent[drawn]],
        n_firing=len(firing),
    )

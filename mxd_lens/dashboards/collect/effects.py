"""What takes long, for a few experts: their effects on the loss, and the spectra of their maps."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.weights import spectrum
from mxd_lens.artifacts.identity import hash_tensors
from mxd_lens.dashboards.collect.data import Band, CollectionConfig, Excerpt, ExpertData
from mxd_lens.dashboards.collect.excerpts import TOP
from mxd_lens.dashboards.collect.kept import Kept
from mxd_lens.evals.expert_effects import losses_with, losses_without


def add_spectra(sae: SAE[Any], experts: Sequence[ExpertData], progress: bool) -> None:
    """Write the singular values and the stable ranks into the experts' data, where experts are maps."""
    try:
        values = spectrum(sae, [e.expert for e in experts], progress=progress).singular_values
    except NotImplementedError:
        return
    squares = values.pow(2)
    stable_rank = squares.sum(-1) / squares[:, 0]
    for e, singular_values, rank in zip(experts, values.tolist(), stable_rank.tolist(), strict=True):
        e.singular_values, e.stable_rank = singular_values, rank


def add_loss_effects(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: Sequence[ExpertData],
    cfg: CollectionConfig,
    kept: Kept,
    progress: bool,
) -> None:
    """Measure what leaving an expert out does to the loss on its excerpts, and write it into its data.

    The whole model runs once on each sequence with the layer, and once for each (expert, sequence) pair
    without the expert; excerpts of one sequence share a run.
    """
    ends: dict[tuple[int, int], int] = {}
    for e in experts:
        for excerpt in excerpts_of(e):
            # One more than is shown: the token that the excerpt's last one predicts.
            end = min(excerpt.start + len(excerpt.tokens) + 1, tokens.shape[1])
            pair = e.expert, excerpt.sequence
            ends[pair] = max(ends.get(pair, 0), end)
    if not ends:
        return
    pairs, lengths = torch.tensor(list(ends)), torch.tensor(list(ends.values()))
    measure = Measurement(model, sae, tokens.cpu(), cfg, kept, progress)
    needed, row_of = pairs[:, 1].unique(return_inverse=True)
    longest = torch.zeros_like(needed).scatter_reduce(0, row_of, lengths, "amax")

    def base(rows: Int[Tensor, " rows"], end: int) -> Tensor:
        return losses_with(model, sae, measure.tokens[needed[rows], :end]).cpu()

    # Another call for other experts must not take these for its own.
    own = hash_tensors({"": pairs})[:8]
    losses = measure.run(f"losses-{own}", "Losses of the excerpts", longest, base)

    def effects(rows: Int[Tensor, " rows"], end: int) -> Tensor:
        of_rows = measure.tokens[pairs[rows, 1], :end]
        without, written = losses_without(model, sae, of_rows, pairs[rows, 0])
        found = without.cpu() - losses[row_of[rows], :end]
        # Before its first firing an expert changes nothing, and the rest is rounding.
        begun = written.coefficients.cpu().ne(0).cumsum(-1) > 0
        return torch.where(begun | found.isnan(), found, 0.0)

    found = measure.run(f"effects-{own}", "Leaving experts out", lengths, effects)
    row = {pair: i for i, pair in enumerate(ends)}
    for e in experts:
        for excerpt in excerpts_of(e):
            here = slice(excerpt.start, excerpt.start + len(excerpt.tokens))
            excerpt.loss_effects = found[row[e.expert, excerpt.sequence], here].tolist()
        e.loss_effect = mean_effect(e.bands)


class Measurement:
    """Something measured at each position of some sequences, the shortest first."""

    def __init__(
        self, model: Any, sae: SAE[Any], tokens: Tensor, cfg: CollectionConfig, kept: Kept, progress: bool
    ) -> None:
        self.model, self.sae, self.tokens, self.cfg = model, sae, tokens, cfg
        self.kept, self.progress = kept, progress

    def run(
        self, stage: str, description: str, lengths: Int[Tensor, " rows"], measure: Any
    ) -> Float[Tensor, "rows positions"]:
        """measure(rows, length) for some rows at a time; nan where nothing was measured."""
        found, done = torch.full((len(lengths), self.tokens.shape[1]), torch.nan), 0
        if state := self.kept.load(stage):
            found, done = state["found"], int(state["done"])
        order = lengths.argsort(stable=True)
        with tqdm(total=len(order), desc=description, disable=not self.progress, unit="seq") as bar:
            bar.update(done)
            for n_batches, rows in enumerate(self._batches(order, lengths, done), start=1):
                end = int(lengths[rows].max())
                found[rows, :end] = measure(rows, end).to(found)
                done += len(rows)
                bar.update(len(rows))
                if n_batches % self.cfg.checkpoint_every == 0 or done == len(order):
                    self.kept.save(stage, {"found": found, "done": torch.tensor(done)})
        return found

    def _batches(
        self, order: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"], done: int
    ) -> Iterator[Int[Tensor, " rows"]]:
        """Rows for one forward pass at a time: as many tokens as a batch of the text."""
        budget = self.cfg.batch_size * self.tokens.shape[1]
        sorted_lengths = lengths[order].tolist()
        while done < len(order):
            size = 1
            while done + size < len(order) and (size + 1) * sorted_lengths[done + size] <= budget:
                size += 1
            yield order[done : done + size]
            done += size


def excerpts_of(e: ExpertData) -> Iterator[Excerpt]:
    for band in e.bands:
        yield from band.excerpts


def mean_effect(bands: Sequence[Band]) -> float:
    """See `ExpertData.loss_effect`."""
    means = []
    for band in bands:
        effects = [excerpt.loss_effects[excerpt.peak] for excerpt in band.excerpts]
        known = [effect for effect in effects if not math.isnan(effect)]
        if band.name != TOP and known:
            means.append(sum(known) / len(known))
    return sum(means) / len(means) if means else math.nan

"""The second pass: the excerpts that are shown, and what the expert does on each of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.token_text import token_texts
from mxd_lens.dashboards.collect.data import Band, CollectionConfig, Excerpt
from mxd_lens.dashboards.collect.firings import Firings, Keeps
from mxd_lens.evals.expert_effects import losses_with, losses_without, written_by

TOP = "top"
BASE_STAGE, PAIRS_STAGE = "losses", "pairs"
MARGIN = 8
"""Tokens before an excerpt that are decoded with it: its first may go on with a character."""


@dataclass(frozen=True)
class Pick:
    """A firing that an excerpt is around."""

    sequence: int
    position: int


@dataclass(frozen=True)
class PickedBand:
    """What will be a `Band`."""

    name: str
    low: float
    high: float
    picks: list[Pick]


class Chosen:
    """The excerpts chosen of every expert's firings, and what is measured on them.

    Measured is on (expert, sequence) pairs: excerpts of one sequence share a pass. What is kept of them is
    four numbers a position of a pair.
    """

    def __init__(
        self, firings: Firings, tokens: Int[Tensor, "sequences positions"], cfg: CollectionConfig
    ) -> None:
        self.firings = firings
        self.tokens = tokens.cpu()
        self.cfg = cfg
        self.picked = [self._pick(slot) for slot in range(len(firings.experts))]
        n_positions = tokens.shape[1]
        ends: dict[tuple[int, int], int] = {}
        peaks: dict[tuple[int, int], int] = {}
        for slot, bands in enumerate(self.picked):
            for band in bands:
                for pick in band.picks:
                    pair = slot, pick.sequence
                    # One more than is shown: the token that the excerpt's last one predicts.
                    end = min(pick.position + cfg.after + 2, n_positions)
                    ends[pair] = max(ends.get(pair, 0), end)
                    if band.name == TOP:
                        peaks[pair] = pick.position
        self.pairs = {pair: i for i, pair in enumerate(ends)}
        self._ends = torch.tensor(list(ends.values()))
        self._peaks = torch.tensor([peaks.get(pair, -1) for pair in ends])
        shape, n, d_in = (len(ends), n_positions), len(self.picked), firings.sae.cfg.d_in
        self.measured = {
            "values": torch.zeros(shape),
            "norms": torch.zeros(shape),
            "effects": torch.full(shape, torch.nan),
            # Of the layer's input at the peaks of the top excerpts, less its mean, at unit length.
            "unit_sums": torch.zeros(n, d_in, dtype=torch.float64),
            "n_peaks": torch.zeros(n, dtype=torch.long),
            "done": torch.tensor(0),
        }

    def _pick(self, slot: int) -> list[PickedBand]:
        top = self.firings.rows["top"].of(slot)
        bands = []
        if top and len(top["score"]):
            values = top["score"].tolist()
            bands.append(PickedBand(TOP, values[-1], values[0], _picks(top)))
        sample = self.firings.rows["sample"].of(slot)
        if not sample:
            return bands
        # Best first is by priority, and stays so among equal values.
        order = sample["value"].argsort(stable=True)
        n_bands = self.cfg.n_bands
        band_of = torch.empty_like(order)
        # A firing's share of weaker firings, its own half among them.
        band_of[order] = (2 * torch.arange(len(order)) + 1) * n_bands // (2 * max(len(order), 1))
        for band in reversed(range(n_bands)):
            rows = {name: values[band_of == band] for name, values in sample.items()}
            if not len(rows["value"]):
                continue
            drawn = rows["value"][: self.cfg.n_per_band].argsort(descending=True, stable=True)
            name = f"{100 * band / n_bands:.3g}-{100 * (band + 1) / n_bands:.3g} %"
            low, high = rows["value"].min().item(), rows["value"].max().item()
            bands.append(PickedBand(name, low, high, _picks(rows, drawn)))
        return bands

    # Measuring

    def measure(self, sae: SAE[Any], model: Any, checkpoint: Keeps | None, progress: bool) -> None:
        """Runs the chosen sequences through the model, those that have not been."""
        if not self.pairs:
            return
        slots, sequences = torch.tensor(list(self.pairs)).T
        base: dict[int, Tensor] = {}
        if self.cfg.loss_effects:
            base = self._losses_with(sae, model, sequences, checkpoint, progress)
        if checkpoint is not None and (state := checkpoint.load(PAIRS_STAGE)):
            self.measured = state
        experts = torch.tensor(self.firings.experts)[slots]
        order = self._ends.argsort(stable=True)
        done = int(self.measured["done"])
        with tqdm(total=len(order), desc="Leaving experts out", disable=not progress, unit="seq") as bar:
            bar.update(done)
            for n_batches, rows in enumerate(self._batches(order, self._ends, done), start=1):
                self._measure(sae, model, rows, slots[rows], experts[rows], sequences[rows], base)
                self.measured["done"] += len(rows)
                bar.update(len(rows))
                if checkpoint is not None and (
                    n_batches % self.cfg.checkpoint_every == 0 or self.measured["done"] == len(order)
                ):
                    checkpoint.save(PAIRS_STAGE, self.measured)

    def _measure(
        self,
        sae: SAE[Any],
        model: Any,
        rows: Int[Tensor, " rows"],
        slots: Int[Tensor, " rows"],
        experts: Int[Tensor, " rows"],
        sequences: Int[Tensor, " rows"],
        base: dict[int, Tensor],
    ) -> None:
        """One forward pass: some of the pairs, each without its expert; `base` are the losses with it."""
        end = int(self._ends[rows].max())
        tokens = self.tokens[sequences, :end]
        if self.cfg.loss_effects:
            losses, written = losses_without(model, sae, tokens, experts)
            effects = losses.cpu() - torch.stack([base[s][:end] for s in sequences.tolist()])
            # Before its first firing an expert changes nothing, and the rest is rounding.
            begun = written.coefficients.cpu().ne(0).cumsum(-1) > 0
            self.measured["effects"][rows, :end] = torch.where(begun | effects.isnan(), effects, 0.0)
        else:
            written = written_by(model, sae, tokens, experts)
        self.measured["values"][rows, :end] = written.coefficients.cpu().float()
        self.measured["norms"][rows, :end] = written.norms.cpu().float()
        peaks = self._peaks[rows]
        is_top = peaks >= 0
        x = written.inputs.cpu()[is_top, peaks[is_top]].double() - self.firings.mean_input.cpu()
        self.measured["unit_sums"].index_add_(0, slots[is_top], F.normalize(x, dim=-1))
        self.measured["n_peaks"].index_add_(0, slots[is_top], torch.ones_like(slots[is_top]))

    def _losses_with(
        self,
        sae: SAE[Any],
        model: Any,
        sequences: Int[Tensor, " pairs"],
        checkpoint: Keeps | None,
        progress: bool,
    ) -> dict[int, Tensor]:
        """The losses of the chosen sequences with the whole layer, by the sequence's number."""
        needed, where = sequences.unique(return_inverse=True)
        ends = torch.zeros_like(needed).scatter_reduce(0, where, self._ends, "amax")
        losses, done = torch.full((len(needed), self.tokens.shape[1]), torch.nan), 0
        if checkpoint is not None and (state := checkpoint.load(BASE_STAGE)):
            losses, done = state["losses"], int(state["done"])
        order = ends.argsort(stable=True)
        with tqdm(total=len(order), desc="Losses of the excerpts", disable=not progress, unit="seq") as bar:
            bar.update(done)
            for n_batches, rows in enumerate(self._batches(order, ends, done), start=1):
                end = int(ends[rows].max())
                losses[rows, :end] = losses_with(model, sae, self.tokens[needed[rows], :end]).cpu()
                done += len(rows)
                if checkpoint is not None and (
                    n_batches % self.cfg.checkpoint_every == 0 or done == len(order)
                ):
                    checkpoint.save(BASE_STAGE, {"done": torch.tensor(done), "losses": losses})
                bar.update(len(rows))
        return dict(zip(needed.tolist(), losses, strict=True))

    def _batches(
        self, order: Int[Tensor, " rows"], ends: Int[Tensor, " rows"], done: int
    ) -> Iterator[Int[Tensor, " rows"]]:
        """Rows for one forward pass at a time, the shortest first: as many tokens as a batch of the text."""
        budget = self.cfg.batch_size * self.tokens.shape[1]
        lengths = ends[order].tolist()
        while done < len(order):
            size = 1
            while done + size < len(order) and (size + 1) * lengths[done + size] <= budget:
                size += 1
            yield order[done : done + size]
            done += size

    # What was measured

    def coherence(self, slot: int) -> float:
        """See `ExpertData.coherence`: of k unit vectors, (||their sum||^2 - k) / (k (k - 1))."""
        k, unit_sum = int(self.measured["n_peaks"][slot]), self.measured["unit_sums"][slot]
        if k < 2:
            return math.nan
        return max((float(unit_sum @ unit_sum) - k) / (k * (k - 1)), 0.0)

    def bands(self, slot: int, tokenizer: Any) -> list[Band]:
        """The excerpts of an expert."""
        return [
            Band(
                band.name, band.low, band.high, [self._excerpt(slot, pick, tokenizer) for pick in band.picks]
            )
            for band in self.picked[slot]
        ]

    def _excerpt(self, slot: int, pick: Pick, tokenizer: Any) -> Excerpt:
        ids = self.tokens[pick.sequence].tolist()
        start = max(pick.position - self.cfg.before, 0)
        end = min(pick.position + self.cfg.after + 1, len(ids))
        margin = max(start - MARGIN, 0)
        texts = token_texts(tokenizer, ids[margin:end])
        while start > margin and not texts[start - margin]:
            start -= 1
        pair = self.pairs[slot, pick.sequence]
        values, norms, effects = (
            self.measured[name][pair, start:end].tolist() for name in ("values", "norms", "effects")
        )
        return Excerpt(
            tokens=texts[start - margin :],
            token_ids=ids[start:end],
            values=values,
            norms=norms,
            loss_effects=effects,
            peak=pick.position - start,
            sequence=pick.sequence,
            start=start,
        )


def loss_effect(bands: list[Band]) -> float:
    """See `ExpertData.loss_effect`."""
    means = []
    for band in bands:
        effects = [excerpt.loss_effects[excerpt.peak] for excerpt in band.excerpts]
        known = [effect for effect in effects if not math.isnan(effect)]
        if band.name != TOP and known:
            means.append(sum(known) / len(known))
    return sum(means) / len(means) if means else math.nan


def _picks(rows: dict[str, Tensor], order: Int[Tensor, " n"] | None = None) -> list[Pick]:
    places = zip(rows["sequence"].tolist(), rows["position"].tolist(), strict=True)
    picks = [Pick(*place) for place in places]
    return picks if order is None else [picks[i] for i in order.tolist()]

"""The first pass over the text: sums for every expert, and each firing of the experts that may be shown."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import Parts
from mxd_lens.analysis.firings import read_batch
from mxd_lens.analysis.sequences import batch_of
from mxd_lens.analysis.statistics import ExpertStatistics
from mxd_lens.dashboards.collect.data import CollectionConfig
from mxd_lens.dashboards.collect.kept import Kept

N_BINS = 64
WATCHED = 2**28
"""Pairs of experts whose firing together is counted, at most: a gigabyte."""
SUMS, FIRINGS = "sums", "firings-{}"


@dataclass(frozen=True)
class Firings:
    """What the first pass found. Memory: 24 bytes for each firing of the experts, and nothing per token.

    The firings lie by expert and, of one expert, in the order of the text.
    """

    experts: list[int]
    """The experts whose firings these are; the i-th has slot i."""
    statistics: ExpertStatistics
    """Sums for every expert of the layer."""
    share_of_output: Float[Tensor, " d_sae"]
    """Mean over tokens of each expert's share of y - b."""
    mean_input: Float[Tensor, " d_in"]
    """Of the layer."""
    n_positions: int
    """In a sequence."""
    place: Int[np.ndarray, " fired"]
    """sequence * n_positions + position."""
    value: Float[np.ndarray, " fired"]
    """a_n."""
    norm: Float[np.ndarray, " fired"]
    """||a_n u_n||."""
    starts: Int[np.ndarray, " experts_and_one"]
    """Where the firings of each expert begin."""

    def of(self, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place, value and norm of each firing of one expert."""
        rows = slice(self.starts[slot], self.starts[slot + 1])
        return self.place[rows], self.value[rows], self.norm[rows]

    def select(self, slots: Sequence[int]) -> "Firings":
        """Only the firings of some of the experts."""
        rows = np.concatenate([np.arange(*self.starts[[s, s + 1]]) for s in slots] or [np.zeros(0, int)])
        counts = np.diff(self.starts)[list(slots)]
        changed = {name: getattr(self, name)[rows] for name in ("place", "value", "norm")}
        return Firings(
            **{f.name: getattr(self, f.name) for f in fields(self)}
            | changed
            | {"experts": [self.experts[s] for s in slots], "starts": np.append(0, counts.cumsum())}
        )


class FirstPass:
    """The pass; `read` goes through the sequences that have not been read.

    Args:
        sae: the layer.
        experts: whose firings are wanted.
        cfg: how the text is read.
        kept: what an interrupted pass has found.
    """

    def __init__(self, sae: SAE[Any], experts: Sequence[int], cfg: CollectionConfig, kept: Kept) -> None:
        self.sae, self.experts, self.cfg, self.kept = sae, list(experts), cfg, kept
        watched = self.experts if len(self.experts) * sae.cfg.d_sae <= WATCHED else []
        self.statistics = ExpertStatistics.of(sae, watched)
        device = sae.W_dec.device
        self.slots = torch.full((sae.cfg.d_sae,), -1, device=device)
        self.slots[torch.tensor(self.experts, device=device)] = torch.arange(len(experts), device=device)
        self.share_sum = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=device)
        self.input_sum = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=device)
        self.n_shares = self.next_sequence = self.n_files = 0
        self.found: list[dict[str, Tensor]] = []
        self._restore()

    def read(self, model: Any, tokens: Int[Tensor, "sequences positions"], progress: bool) -> Firings:
        """Read the text, and return what was found."""
        size = self.cfg.batch_size
        new: list[dict[str, Tensor]] = []
        with tqdm(total=len(tokens), desc="Reading the text", disable=not progress, unit="seq") as bar:
            bar.update(self.next_sequence)
            starts = range(self.next_sequence, len(tokens), size)
            for n_batches, start in enumerate(starts, start=1):
                batch = batch_of(tokens[start : start + size], start)
                reading = read_batch(model, {"": self.sae}, batch)[""]
                self.input_sum += reading.inputs.double().sum(0).to(self.input_sum.device)
                new.append(self._add(reading.parts, reading.sequence * tokens.shape[1] + reading.position))
                self.next_sequence = start + len(batch.tokens)
                bar.update(len(batch.tokens))
                if n_batches % self.cfg.checkpoint_every == 0 or self.next_sequence == len(tokens):
                    self.found.append({name: torch.cat([part[name] for part in new]) for name in new[0]})
                    self._keep()
                    new = []
        return self._sorted(tokens.shape[1])

    def _add(self, parts: Parts, places: Int[Tensor, " tokens"]) -> dict[str, Tensor]:
        """Count one batch in; the firings of the experts wanted."""
        self.statistics.add_parts(parts)
        output = parts.output
        squared = output.pow(2).sum(-1, keepdim=True)
        self.n_shares += int((squared > 0).sum())
        along = torch.where(squared > 0, output / squared, 0)
        shares, norms = [output.new_zeros(0)], [output.new_zeros(0)]
        for t, _, some, u in parts.contributions():
            shares.append(some * (u * along[t]).sum(-1))
            norms.append((some[:, None] * u).norm(dim=-1))
        token_of, expert, a = parts.fired
        self.share_sum.index_add_(0, expert, torch.cat(shares).double())
        slot = self.slots[expert]
        found = {
            "place": places.to(a.device)[token_of],
            "slot": slot.int(),
            "value": a,
            "norm": torch.cat(norms),
        }
        return {name: values[slot >= 0].cpu() for name, values in found.items()}

    def _sorted(self, n_positions: int) -> Firings:
        found = {name: torch.cat([part[name] for part in self.found]).numpy() for name in self.found[0]}
        slot = found.pop("slot")
        order = slot.argsort(kind="stable")
        counts = np.bincount(slot, minlength=len(self.experts))
        return Firings(
            experts=self.experts,
            statistics=self.statistics,
            share_of_output=self.share_sum / self.n_shares,
            mean_input=self.input_sum / self.statistics.n_tokens,
            n_positions=n_positions,
            starts=np.append(0, counts.cumsum()),
            **{name: values[order] for name, values in found.items()},
        )

    # To resume

    @property
    def _sums(self) -> dict[str, Tensor]:
        return {
            f.name: value
            for f in fields(self.statistics)
            if isinstance(value := getattr(self.statistics, f.name), Tensor)
        }

    def _keep(self) -> None:
        """Firings first: sums that were written know of all files whose firings they count."""
        self.kept.save(FIRINGS.format(self.n_files), self.found[-1])
        self.n_files += 1
        counts = [self.next_sequence, self.n_shares, self.statistics.n_tokens, self.n_files]
        own = {"counts": torch.tensor(counts), "share_sum": self.share_sum, "input_sum": self.input_sum}
        self.kept.save(SUMS, own | self._sums)

    def _restore(self) -> None:
        if not (known := self.kept.load(SUMS)):
            return
        self.next_sequence, self.n_shares, self.statistics.n_tokens, self.n_files = known["counts"].tolist()
        device = self.share_sum.device
        self.share_sum, self.input_sum = known["share_sum"].to(device), known["input_sum"].to(device)
        for name in self._sums:
            setattr(self.statistics, name, known[name].to(device))
        self.found = [self.kept.load(FIRINGS.format(i)) for i in range(self.n_files)]


def histogram(values: Float[np.ndarray, " n"]) -> tuple[list[float], list[int]]:
    """The bounds and counts of equal bins from 0 to a power of two, up to the last bin that is not empty."""
    if not len(values):
        return [], []
    top = 2.0 ** int(np.frexp(values.max())[1])
    # Scaling by powers of two is exact.
    counts = np.bincount((values.astype(float) / top * N_BINS).astype(int))
    return [top / N_BINS * i for i in range(len(counts) + 1)], counts.tolist()


def priorities(seed: int, expert: int, places: Int[np.ndarray, " n"], n_positions: int) -> np.ndarray:
    """A pseudo-random number for each firing, always the same one: a hash of where it is.

    The firings with the largest are a uniform sample, whatever the order they come in.
    """
    state = np.zeros(len(places), dtype=np.uint64)
    for part in (seed, expert, places // n_positions, places % n_positions):
        # A round of the splitmix64 generator for each, numbers wrapping around at 2^64.
        state += np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state.view(np.int64)

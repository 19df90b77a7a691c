"""Which texts are shown of an expert, and the second pass over the text, which reads what they need."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import Parts, writes_directions
from mxd_lens.analysis.firings import read_batch
from mxd_lens.analysis.logit_lens import extreme_logits, read_norm
from mxd_lens.analysis.sequences import batch_of
from mxd_lens.analysis.token_text import token_texts, vocabulary_text
from mxd_lens.dashboards.collect.data import Band, CollectionConfig, Excerpt, TokenEffect
from mxd_lens.dashboards.collect.firings import Firings, priorities
from mxd_lens.dashboards.collect.kept import Kept

TOP = "top"
STAGE = "second-pass"
MARGIN = 8
"""Tokens before an excerpt that are decoded with it: its first may complete a character."""
AT_ONCE = 256
"""Firings whose logits are formed at once."""


# The texts


@dataclass(frozen=True)
class Chosen:
    """The firings around which an expert's excerpts are, and those of which its effects are sampled."""

    bands: list[tuple[str, float, float, Int[np.ndarray, " excerpts"]]]
    """Name, smallest and largest coefficient, and the places of the excerpts' peaks."""
    sample: Int[np.ndarray, " n"]
    """Rows of its firings: a uniform sample."""

    @property
    def top(self) -> Int[np.ndarray, " n"]:
        """The places of the top excerpts' peaks."""
        return self.bands[0][-1] if self.bands and self.bands[0][0] == TOP else np.zeros(0, int)


def choose(firings: Firings, slot: int, cfg: CollectionConfig) -> Chosen:
    """The strongest firing of each of the strongest sequences, and firings drawn from quantile bands."""
    place, value, _ = firings.of(slot)
    by_value = np.argsort(-value, kind="stable")
    _, first = np.unique(place[by_value] // firings.n_positions, return_index=True)
    top = by_value[np.sort(first)][: cfg.n_top]
    bands = []
    if len(top):
        bands.append((TOP, float(value[top[-1]]), float(value[top[0]]), place[top]))
    drawn = priorities(cfg.seed, firings.experts[slot], place, firings.n_positions)
    drawn_first = np.argsort(~drawn, kind="stable")  # the largest first
    sample = drawn_first[: cfg.n_sampled]
    order = np.argsort(value[sample], kind="stable")
    band_of = np.empty_like(order)
    # A firing's share of weaker firings, its own half among them.
    band_of[order] = (2 * np.arange(len(order)) + 1) * cfg.n_bands // (2 * max(len(order), 1))
    for band in reversed(range(cfg.n_bands)):
        rows = sample[band_of == band]
        if not len(rows):
            continue
        few = rows[: cfg.n_per_band]
        few = few[np.argsort(-value[few], kind="stable")]
        name = f"{100 * band / cfg.n_bands:.3g}-{100 * (band + 1) / cfg.n_bands:.3g} %"
        bands.append((name, float(value[rows].min()), float(value[rows].max()), place[few]))
    return Chosen(bands, drawn_first[: cfg.n_directions])


def bands_of(
    firings: Firings, slot: int, chosen: Chosen, tokens: Tensor, tokenizer: Any, cfg: CollectionConfig
) -> list[Band]:
    """The excerpts of an expert, without loss effects."""
    place, value, norm = firings.of(slot)

    def excerpt(peak: int) -> Excerpt:
        sequence, position = divmod(int(peak), firings.n_positions)
        ids = tokens[sequence].tolist()
        start = max(position - cfg.before, 0)
        end = min(position + cfg.after + 1, len(ids))
        margin = max(start - MARGIN, 0)
        texts = token_texts(tokenizer, ids[margin:end])
        while start > margin and not texts[start - margin]:
            start -= 1
        first = sequence * firings.n_positions
        rows = slice(*np.searchsorted(place, [first + start, first + end]))
        lists = np.zeros((2, end - start), dtype=np.float32)
        lists[:, place[rows] - first - start] = value[rows], norm[rows]
        return Excerpt(
            tokens=texts[start - margin :],
            token_ids=ids[start:end],
            values=lists[0].tolist(),
            norms=lists[1].tolist(),
            loss_effects=[math.nan] * (end - start),
            peak=position - start,
            sequence=sequence,
            start=start,
        )

    return [Band(name, low, high, [excerpt(p) for p in peaks]) for name, low, high, peaks in chosen.bands]


# The second pass


class SecondPass:
    """Reads the layer again where its inputs and its experts' outputs are needed.

    Args:
        model: the language model.
        sae: the layer.
        firings: what the first pass found.
        chosen: by slot.
        cfg: how much is collected.
    """

    def __init__(
        self, model: Any, sae: SAE[Any], firings: Firings, chosen: list[Chosen], cfg: CollectionConfig
    ) -> None:
        self.model, self.sae, self.firings, self.chosen, self.cfg = model, sae, firings, chosen, cfg
        self.norm = read_norm(model.ln_final, model.W_U)
        self.fires = [slot for slot in range(len(chosen)) if len(firings.of(slot)[0])]
        self.unit_sums = torch.zeros(len(chosen), sae.cfg.d_in, dtype=torch.float64)
        peaks = [(slot, place) for slot in self.fires for place in chosen[slot].top]
        self.peak_slot, self.peak_place = np.array(peaks, dtype=int).reshape(-1, 2).T
        self._find_tokens()
        samples = [(s, r) for s in self.fires for r in chosen[s].sample] if len(self.token_ids) else []
        self.sample_slot, row = np.array(samples, dtype=int).reshape(-1, 2).T
        rows = firings.starts[self.sample_slot] + row
        self.sample_place, self.sample_value = firings.place[rows], firings.value[rows]
        # Of a layer that writes directions a coefficient of 1 writes the same everywhere.
        self.needs_samples = not writes_directions(sae) and bool(len(self.token_ids))
        n_samples = len(rows) if self.needs_samples else 0
        self.logits = torch.zeros(n_samples, self.token_ids.shape[-1], dtype=torch.float64)

    def _find_tokens(self) -> None:
        """The tokens that each expert's mean direction promotes and suppresses most."""
        model, sae, W_U = self.model, self.sae, self.model.W_U
        k = min(self.cfg.n_tokens, W_U.shape[1])
        ids = [self.firings.experts[slot] for slot in self.fires]
        self.token_ids = torch.zeros(0, 0, dtype=torch.long)
        self.mean_logits = torch.zeros(0, 0)
        if ids and k and len(sae.b_dec) == len(W_U):
            up, down = extreme_logits(model, self.firings.statistics.mean_direction(ids), k)
            self.mean_logits, self.token_ids = (torch.cat(pair, dim=1) for pair in zip(up, down, strict=True))
        # What reads the residual stream for each of these tokens, less the mean over the vocabulary.
        found, self.reader_of = self.token_ids.unique(return_inverse=True)
        self.readers = W_U.T[found.to(W_U.device)].double() - W_U.mean(-1, dtype=torch.float64)

    def read(self, tokens: Int[Tensor, "sequences positions"], kept: Kept, progress: bool) -> None:
        """Go through the sequences in which anything is needed."""
        order = [np.argsort(places, kind="stable") for places in (self.peak_place, self.sample_place)]
        if not self.needs_samples:
            order[1] = order[1][:0]
        needed = np.concatenate([self.peak_place[order[0]], self.sample_place[order[1]]])
        sequences = np.unique(needed // self.firings.n_positions)
        next_row = 0
        if state := kept.load(STAGE):
            next_row, self.unit_sums, self.logits = int(state["next"]), state["unit_sums"], state["logits"]
        size, every = self.cfg.batch_size, self.cfg.checkpoint_every
        with tqdm(total=len(sequences), desc="Reading it again", disable=not progress, unit="seq") as bar:
            bar.update(next_row)
            for n_batches, start in enumerate(range(next_row, len(sequences), size), start=1):
                self._read_batch(tokens, torch.from_numpy(sequences[start : start + size]), order)
                next_row = min(start + size, len(sequences))
                bar.update(next_row - start)
                if n_batches % every == 0 or next_row == len(sequences):
                    state = {"unit_sums": self.unit_sums, "logits": self.logits}
                    kept.save(STAGE, state | {"next": torch.tensor(next_row)})

    def _read_batch(
        self, tokens: Tensor, sequences: Int[Tensor, " batch"], order: list[Int[np.ndarray, " n"]]
    ) -> None:
        reading = read_batch(self.model, {"": self.sae}, batch_of(tokens[sequences.to(tokens.device)]))[""]
        places = (sequences[reading.sequence] * self.firings.n_positions + reading.position).numpy()
        n = self.firings.n_positions
        bounds = np.array([int(sequences[0]) * n, (int(sequences[-1]) + 1) * n])

        def here(rows: np.ndarray, all_places: np.ndarray) -> tuple[np.ndarray, Tensor]:
            rows = rows[slice(*np.searchsorted(all_places[rows], bounds))]
            return rows, torch.from_numpy(np.searchsorted(places, all_places[rows]))

        rows, at = here(order[0], self.peak_place)
        x = reading.inputs[at.to(reading.inputs.device)].double() - self.firings.mean_input
        slots = torch.from_numpy(self.peak_slot[rows])
        self.unit_sums.index_add_(0, slots, F.normalize(x, dim=-1).cpu())
        rows, at = here(order[1], self.sample_place)
        for some, token_of in zip(torch.from_numpy(rows).split(AT_ONCE), at.split(AT_ONCE), strict=True):
            self.logits[some] = self._logits(reading.parts, token_of, self.sample_slot[some.numpy()])

    def _logits(
        self, parts: Parts, token_of: Int[Tensor, " n"], slots: Int[np.ndarray, " n"]
    ) -> Float[Tensor, "n tokens"]:
        """What a coefficient of 1 adds, at some firings, to the logits of the expert's own tokens."""
        device, W_U = parts.experts.device, self.model.W_U
        experts = torch.tensor(self.firings.experts, device=device)[torch.from_numpy(slots).to(device)]
        written = parts.written_by(token_of.to(device), experts).to(W_U.device)
        readers = self.readers[self.reader_of[np.searchsorted(self.fires, slots)].to(W_U.device)]
        return torch.einsum("nd,ntd->nt", self.norm.before_scale(written.double()), readers).cpu()

    # What was found

    def coherence(self, slot: int) -> float:
        """See `ExpertData.coherence`: of k unit vectors, (||their sum||^2 - k) / (k (k - 1))."""
        k, unit_sum = len(self.chosen[slot].top), self.unit_sums[slot]
        return max((float(unit_sum @ unit_sum) - k) / (k * (k - 1)), 0.0) if k > 1 else math.nan

    def token_effects(self) -> dict[int, tuple[list[TokenEffect], list[TokenEffect]]]:
        """The tokens that each expert promotes and suppresses, by slot."""
        if not len(self.token_ids):
            return {}
        found = {}
        ends = np.searchsorted(self.sample_slot, [*self.fires, len(self.chosen)])
        for row, slot in enumerate(self.fires):
            spread = torch.zeros(self.token_ids.shape[1], dtype=torch.float64)
            if self.needs_samples:
                rows = slice(ends[row], ends[row + 1])
                weights = torch.from_numpy(self.sample_value[rows]).double()
                weights, logits = weights / weights.sum(), self.logits[rows]
                spread = (weights @ (logits - weights @ logits) ** 2).sqrt()
            entries = [
                TokenEffect(vocabulary_text(self.model.tokenizer, token), value, s)
                for token, value, s in zip(
                    self.token_ids[row].tolist(), self.mean_logits[row].tolist(), spread.tolist(), strict=True
                )
            ]
            k = len(entries) // 2
            found[slot] = entries[:k], entries[k:]
        return found

"""The first pass over the text: what is kept of the firings of the experts shown, and sums for all."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.analysis.decomposition import Parts, decomposable
from mxd_lens.analysis.firings import Reading, read_batch
from mxd_lens.analysis.sequences import batch_of
from mxd_lens.analysis.statistics import ExpertStatistics
from mxd_lens.dashboards.collect.data import CollectionConfig
from mxd_lens.dashboards.collect.streams import BestRows, Histograms, largest_of_each, priorities

STAGE = "firings"


class Keeps(Protocol):
    """Where the state of a stage is kept while it is under way."""

    def load(self, stage: str) -> dict[str, Tensor]: ...

    def save(self, stage: str, state: dict[str, Tensor]) -> None: ...


class Firings:
    """What is kept of a text. Memory: as W_dec, and so much an expert shown; nothing a token."""

    def __init__(self, sae: SAE[Any], experts: Sequence[int], cfg: CollectionConfig) -> None:
        self.sae = sae
        self.experts = list(experts)
        self.cfg = cfg
        self.statistics = ExpertStatistics.of(sae, experts)
        n, device = len(self.experts), sae.W_dec.device
        self.slots = torch.full((sae.cfg.d_sae,), -1)
        self.slots[self.experts] = torch.arange(n)
        self.histograms = Histograms(n)
        self.rows = {
            "top": BestRows(n, cfg.n_top),
            "sample": BestRows(n, cfg.n_sampled),
            "directions": BestRows(n, cfg.n_directions),
        }
        self.share_sum = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=device)
        self.n_shares = 0
        self.input_sum = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=device)
        self.next_sequence = 0

    def read(
        self,
        model: Any,
        tokens: Int[Tensor, "sequences positions"],
        checkpoint: Keeps | None,
        progress: bool,
    ) -> None:
        """Reads the sequences that have not been read."""
        if checkpoint is not None and (state := checkpoint.load(STAGE)):
            self.restore(state)
        size = self.cfg.batch_size
        with tqdm(total=len(tokens), desc="Reading the text", disable=not progress, unit="seq") as bar:
            bar.update(self.next_sequence)
            for n_batches, start in enumerate(range(self.next_sequence, len(tokens), size), start=1):
                batch = batch_of(tokens[start : start + size], start)
                self.add(read_batch(model, {"": self.sae}, batch)[""])
                self.next_sequence = start + len(batch.tokens)
                if checkpoint is not None and (
                    n_batches % self.cfg.checkpoint_every == 0 or self.next_sequence == len(tokens)
                ):
                    checkpoint.save(STAGE, self.state())
                bar.update(len(batch.tokens))

    def add(self, reading: Reading) -> None:
        """Count in what the layer does on a batch; where each token is in the text decides what is drawn."""
        parts, sequence, position = reading.parts, reading.sequence, reading.position
        self.statistics.add_parts(parts)
        self.input_sum += reading.inputs.double().sum(0).to(self.input_sum.device)
        self._add_shares(parts)
        token_of, expert, a = parts.fired
        slot = self.slots[expert.cpu()]
        shown = slot >= 0
        if not shown.any():
            return
        token_of, expert, a = (v.cpu()[shown] for v in (token_of, expert, a))
        slot, sequence, position = slot[shown], sequence[token_of], position[token_of]
        self.histograms.add(slot, a)
        of_sequence = largest_of_each(slot, sequence, a)
        self.rows["top"].add(
            *(v[of_sequence] for v in (slot, a)),
            sequence=sequence[of_sequence],
            position=position[of_sequence],
        )
        priority = priorities(self.cfg.seed, expert, sequence, position)
        self.rows["sample"].add(slot, priority, value=a, sequence=sequence, position=position)
        may_stay = self.rows["directions"].may_stay(slot, priority)
        expert_input = parts.expert_input[token_of[may_stay].to(parts.expert_input.device)].cpu()
        self.rows["directions"].add(
            slot[may_stay], priority[may_stay], value=a[may_stay], expert_input=expert_input
        )

    def _add_shares(self, parts: Parts) -> None:
        """<a_n u_n, y - b> / ||y - b||^2 for every firing."""
        output = parts.output
        squared = output.pow(2).sum(-1, keepdim=True)
        self.n_shares += int((squared > 0).sum())
        shares = parts.dots(torch.where(squared > 0, output / squared, 0))
        self.share_sum.index_add_(0, parts.experts.flatten(), shares.flatten().double())

    @property
    def share_of_output(self) -> Float[Tensor, " d_sae"]:
        """Mean over tokens of each expert's share of y - b."""
        return self.share_sum / self.n_shares

    @property
    def mean_input(self) -> Float[Tensor, " d_in"]:
        return self.input_sum / self.statistics.n_tokens

    def sampled_directions(self, expert: int) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, " n"]]:
        """What a coefficient of 1 writes at a uniform sample of an expert's firings, and the coefficients."""
        rows = self.rows["directions"].of(int(self.slots[expert]))
        layer, device = decomposable(self.sae), self.sae.W_dec.device
        ids = torch.full((len(rows["value"]), 1), expert, device=device)
        return layer.written_by(ids, rows["expert_input"].to(device))[:, 0].cpu(), rows["value"]

    # To go on later

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        statistics = {
            f"statistics.{f.name}": value
            for f in fields(self.statistics)
            if isinstance(value := getattr(self.statistics, f.name), Tensor)
        }
        rows = {
            f"{name}.{column}": values
            for name, best in self.rows.items()
            for column, values in best.rows.items()
        }
        counts = torch.tensor([self.next_sequence, self.n_shares, self.statistics.n_tokens])
        return {
            "counts": counts,
            "histogram_counts": self.histograms.counts,
            "histogram_exponents": self.histograms.exponents,
            "share_sum": self.share_sum,
            "input_sum": self.input_sum,
            **statistics,
            **rows,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to where `state` was called."""
        device = self.share_sum.device
        self.next_sequence, self.n_shares, self.statistics.n_tokens = state["counts"].tolist()
        self.histograms.counts = state["histogram_counts"]
        self.histograms.exponents = state["histogram_exponents"]
        self.share_sum, self.input_sum = state["share_sum"].to(device), state["input_sum"].to(device)
        for f in fields(self.statistics):
            if f"statistics.{f.name}" in state:
                setattr(self.statistics, f.name, state[f"statistics.{f.name}"].to(device))
        for name, best in self.rows.items():
            best.rows = {
                key.removeprefix(f"{name}."): values
                for key, values in state.items()
                if key.startswith(f"{name}.")
            }

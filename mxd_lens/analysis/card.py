"""One expert on a card: its weights, its neighbours and, where a text was read, how it is used."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from mxd_lens.analysis.decomposition import expert_directions
from mxd_lens.analysis.statistics import ExpertStatistics
from mxd_lens.analysis.weights import Neighbours, Spectrum, mean_gate_share, similar_experts, spectrum
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.tables import Cell, Tabular, percent

N_NEIGHBOURS = 5
SHARES = {"density", "load", "along the mean gate"}
"""What of its use is shown in percent."""


@dataclass(frozen=True, repr=False)
class ExpertCard(Tabular):
    """What `sae.expert(n)` shows; c_n is row n of W_dec."""

    expert: int
    """Its id."""
    layer: str
    """The layer's architecture and where it writes."""
    direction_norm: float
    """||c_n||."""
    gate_norm: float
    """The norm of its column of W_enc."""
    gate_bias: float | None
    """Its entry of b_enc; None in a layer without."""
    spectrum: Spectrum
    """The singular values of W_n."""
    writes_like: Neighbours | None
    """The experts with the most similar c_n; None if it is the only expert."""
    fires_like: Neighbours | None
    """Those with the most similar column of W_enc."""
    use: dict[str, float] | None
    """How it is used on a text, by what is counted; None if no statistics were given."""
    n_tokens: int | None
    """Tokens of that text."""

    @property
    def title(self) -> str:
        read = "" if self.n_tokens is None else f", on {self.n_tokens:,} tokens"
        return f"Expert {self.expert} of {self.layer}{read}"

    @property
    def columns(self) -> list[str]:
        return ["", "expert"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        yield ["norm of c_n, its row of W_dec", f"{self.direction_norm:.3g}"]
        bias = "" if self.gate_bias is None else f", bias {self.gate_bias:.3g}"
        yield ["norm of its gate", f"{self.gate_norm:.3g}{bias}"]
        values = self.spectrum.singular_values[0]
        if len(values) > 1:
            largest, median, smallest = (v.item() for v in (values[0], values.median(), values[-1]))
            yield ["singular values of W_n", f"{largest:.3g} to {smallest:.3g}, median {median:.3g}"]
        effective = self.spectrum.effective_rank[0].item()
        yield ["rank of W_n", f"{int(self.spectrum.rank[0])}, effective rank {effective:.3g}"]
        for name, value in (self.use or {}).items():
            yield [name, percent(value) if name in SHARES else f"{value:.3g}"]
        for name, neighbours in (("writes like", self.writes_like), ("gate like", self.fires_like)):
            if neighbours is not None:
                pairs = zip(
                    neighbours.neighbours[0].tolist(), neighbours.similarities[0].tolist(), strict=True
                )
                yield [f"{name} (cosine)", ", ".join(f"{n} ({similarity:.2f})" for n, similarity in pairs)]


@torch.no_grad()
def expert_card(sae: SAE[Any], n: int, statistics: ExpertStatistics | None = None) -> ExpertCard:
    """A short account of one expert, which prints as a table in a terminal and in a notebook.

        rich.print(expert_card(mxd, 17, expert_statistics(model, mxd, tokens)))

    Args:
        sae: the layer, of this package or SAELens'.
        n: the expert's id.
        statistics: how experts are used on a text.

    Raises:
        IndexError, TypeError: there is no such expert.
        ValueError: the statistics are of another layer; or as `expert_directions`.
    """
    (n,) = expert_ids(sae, n).tolist()
    metadata = sae.cfg.metadata
    b_enc = getattr(sae, "b_enc", None)
    k = min(N_NEIGHBOURS, sae.cfg.d_sae - 1)
    hook = metadata.hook_name_out or metadata.hook_name or "an unnamed hook"
    return ExpertCard(
        expert=n,
        layer=f"{sae.cfg.architecture()} at {hook}",
        direction_norm=expert_directions(sae)[n].norm().item(),
        gate_norm=sae.W_enc[:, n].norm().item(),
        gate_bias=None if b_enc is None else b_enc[n].item(),
        spectrum=spectrum(sae, n, progress=False),
        writes_like=similar_experts(sae, n, "decoder", k) if k else None,
        fires_like=similar_experts(sae, n, "gate", k) if k else None,
        use=None if statistics is None else _use(sae, n, statistics),
        n_tokens=None if statistics is None else statistics.n_tokens,
    )


def _use(sae: SAE[Any], n: int, statistics: ExpertStatistics) -> dict[str, float]:
    return {
        "along the mean gate": mean_gate_share(sae, statistics)[n].item(),
        "density": statistics.density[n].item(),
        "load": statistics.load_share[n].item(),
        "mean coefficient": statistics.mean_coefficient[n].item(),
        "largest coefficient": statistics.coefficient_max[n].item(),
        "contribution, root mean square": statistics.contribution_rms[n].item(),
        "consistency": statistics.consistency[n].item(),
    }

"""How experts are used over a corpus, gathered in one pass over its tokens.

Everything here is a sum over tokens, so that statistics of two texts add up to those of both. Sums run over
the active experts' values and ids; the largest things held are as large as W_dec.
"""

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mxd_lens.analysis.decomposition import ENTRIES, Parts, decompose
from mxd_lens.analysis.firings import read
from mxd_lens.analysis.sequences import Text
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.files import atomic_files, write_json
from mxd_lens.artifacts.identity import hash_settings, layer_identity
from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.models import model_first

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

TENSORS_FILENAME, SETTINGS_FILENAME = "statistics.safetensors", "statistics.json"


class Histogram(NamedTuple):
    """How many experts have what firing density."""

    counts: Int[Tensor, " bins"]
    """Experts in each bin; silent ones are in none."""
    edges: Float[Tensor, " bins_and_one"]
    """The bins' bounds, log10 of the share of tokens."""
    n_silent: int
    """Experts that did not fire on this text."""


@dataclass(repr=False)
class ExpertStatistics(Tabular):
    """Sums over the tokens of a corpus, for every expert n of a layer.

        u_n(t)        what a coefficient of 1 writes at token t: c_n * (D^T z) for an MxD, c_n for a
                      transcoder

    Made by `expert_statistics`, or empty by `of`, with activations added by `add`. Statistics of the same
    layer are summed with `+`. Where a mean is asked for of an expert that never fired, it is NaN.
    """

    model_name: str
    """The language model."""
    hook_name: str
    """Where the layer reads."""
    hook_name_out: str
    """Where it writes."""
    architecture: str
    """Of the layer, as SAELens calls it."""
    fingerprint: str
    """A hash of the layer: its architecture, settings and all weights. Statistics of different layers do
    not add up."""
    n_tokens: int
    """Tokens counted; without those that the layer's training excluded."""
    fired: Int[Tensor, " d_sae"]
    """Tokens on which the expert fired."""
    coefficient_sum: Float[Tensor, " d_sae"]
    """sum_t a_n."""
    coefficient_squared_sum: Float[Tensor, " d_sae"]
    """sum_t a_n^2."""
    coefficient_max: Float[Tensor, " d_sae"]
    """The largest a_n; 0 if it never fired."""
    direction_sum: Float[Tensor, "d_sae d_out"]
    """sum_t a_n u_n, the sum of the expert's contributions."""
    weighted_squared_sum: Float[Tensor, " d_sae"]
    """sum_t a_n ||u_n||^2."""
    contribution_squared_sum: Float[Tensor, " d_sae"]
    """sum_t ||a_n u_n||^2."""
    mixture_sum: Float[Tensor, " m"]
    """sum_t of the mixture, C^T a."""
    watched: Int[Tensor, " watched"]
    """The experts of which it is counted with which others they fire; ascending."""
    fired_together: Int[Tensor, "d_sae watched"]
    """Tokens on which the expert and the watched one both fired."""

    @classmethod
    def of(cls, sae: SAE[Any], watched: Iterable[int] | Int[Tensor, " n"] = ()) -> "ExpertStatistics":
        """Statistics of no token yet.

        Raises:
            IndexError: a watched expert does not exist.
        """
        watched_ids = expert_ids(sae, watched).unique()
        device, d_sae, d_out = sae.W_dec.device, sae.cfg.d_sae, len(sae.b_dec)
        metadata = sae.cfg.metadata

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            model_name=metadata.model_name or "",
            hook_name=metadata.hook_name or "",
            hook_name_out=metadata.hook_name_out or metadata.hook_name or "",
            architecture=sae.cfg.architecture(),
            fingerprint=fingerprint(sae),
            n_tokens=0,
            fired=zeros(d_sae, dtype=torch.long),
            coefficient_sum=zeros(d_sae),
            coefficient_squared_sum=zeros(d_sae),
            coefficient_max=zeros(d_sae),
            direction_sum=zeros(d_sae, d_out, dtype=torch.promote_types(sae.W_dec.dtype, torch.float32)),
            weighted_squared_sum=zeros(d_sae),
            contribution_squared_sum=zeros(d_sae),
            mixture_sum=zeros(mixture_width(sae)),
            watched=watched_ids,
            fired_together=zeros(d_sae, len(watched_ids), dtype=torch.int32),
        )

    @torch.no_grad()
    def add(self, sae: SAE[Any], x: Float[Tensor, "*batch d_in"]) -> None:
        """Count in some of the layer's inputs.

        Memory beside the statistics grows with the number of inputs.

        Raises:
            ValueError: these are statistics of another layer; or as `decompose`.
        """
        self.check_is_of(sae)
        self.add_parts(decompose(sae, x.reshape(-1, x.shape[-1])))

    @torch.no_grad()
    def add_parts(self, parts: Parts) -> None:
        """Count in some of the layer's outputs, already decomposed."""
        self.n_tokens += len(parts)
        self.mixture_sum += parts.mixture.double().sum(0)
        token_of, expert, a = parts.fired
        if not len(a):
            return
        self.fired += torch.bincount(expert, minlength=len(self.fired))
        self.coefficient_sum.index_add_(0, expert, a.double())
        self.coefficient_squared_sum.index_add_(0, expert, a.double() ** 2)
        self.coefficient_max.scatter_reduce_(0, expert, a.double(), "amax")
        for _, ids, weights, u in parts.contributions():
            written = u.to(self.direction_sum)
            squares = written.pow(2).sum(-1).double()
            self.direction_sum.index_add_(0, ids, weights.to(written)[:, None] * written)
            self.weighted_squared_sum.index_add_(0, ids, weights.double() * squares)
            self.contribution_squared_sum.index_add_(0, ids, weights.double() ** 2 * squares)
        if len(self.watched):
            slot = torch.searchsorted(self.watched, expert).clamp_max(len(self.watched) - 1)
            hit = self.watched[slot] == expert
            # Every watched firing meets all experts active on its token: entries of [watched, n], in blocks.
            n = max(parts.experts.shape[1], 1)
            for tokens, slots in zip(
                token_of[hit].split(max(ENTRIES // n, 1)), slot[hit].split(max(ENTRIES // n, 1)), strict=True
            ):
                entries = parts.experts[tokens] * len(self.watched) + slots[:, None]
                met = entries[parts.coefficients[tokens] != 0]
                self.fired_together.view(-1).index_add_(0, met, torch.ones_like(met, dtype=torch.int32))

    def __add__(self, other: "ExpertStatistics") -> "ExpertStatistics":
        """The statistics of both texts.

        Raises:
            ValueError: they are of different layers, or watch different experts.
        """
        summed: dict[str, Any] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "n_tokens":
                summed[f.name] = mine + theirs
            elif f.name == "coefficient_max":
                summed[f.name] = torch.maximum(mine, theirs.to(mine))
            elif isinstance(mine, Tensor) and f.name != "watched":
                summed[f.name] = mine + theirs.to(mine)
            else:
                same = torch.equal(mine, theirs.to(mine)) if isinstance(mine, Tensor) else mine == theirs
                if not same:
                    raise ValueError(
                        f"These statistics do not add up: their {f.name} is {mine} and {theirs}. Only "
                        "those of one layer, watching the same experts, do."
                    )
                summed[f.name] = mine
        return ExpertStatistics(**summed)

    def check_is_of(self, sae: SAE[Any]) -> None:
        """Raise ValueError where these are statistics of another layer."""
        if self.fingerprint != fingerprint(sae):
            raise ValueError(
                f"These are statistics of another layer: of one at {self.hook_name} of "
                f"{self.model_name or 'an unnamed model'}, with {len(self.fired)} experts and other weights "
                "than this one."
            )

    def save(self, folder: str | Path) -> None:
        """Writes statistics.safetensors and statistics.json into a folder."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: v.contiguous() for name, v in values.items() if isinstance(v, Tensor)}
        settings = {name: v for name, v in values.items() if name not in tensors}
        with atomic_files(folder, last=SETTINGS_FILENAME) as partial:
            save_file(tensors, partial / TENSORS_FILENAME)
            write_json(partial / SETTINGS_FILENAME, settings)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "ExpertStatistics":
        """Reads statistics that `save` wrote.

        Raises:
            FileNotFoundError: there are none in the folder.
        """
        folder = Path(folder)
        for name in (TENSORS_FILENAME, SETTINGS_FILENAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: ExpertStatistics.save writes it.")
        settings = json.loads((folder / SETTINGS_FILENAME).read_text(encoding="utf-8"))
        return cls(**(settings | load_file(folder / TENSORS_FILENAME, device=device)))

    # What the sums say

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which the expert fires."""
        return self.fired.double() / self.n_tokens

    @property
    def mean_coefficient(self) -> Float[Tensor, " d_sae"]:
        """Mean of a_n over the tokens on which it fires."""
        return self.coefficient_sum / self.fired

    @property
    def load_share(self) -> Float[Tensor, " d_sae"]:
        """The expert's share of all coefficients: sum_t a_n / sum_t sum_m a_m."""
        return self.coefficient_sum / self.coefficient_sum.sum()

    @property
    def l0(self) -> float:
        """Active experts per token."""
        return self.fired.sum().item() / self.n_tokens if self.n_tokens else math.nan

    @property
    def silent(self) -> Int[Tensor, " n"]:
        """The experts that did not fire on this text. A dead expert did not fire in training either."""
        return (self.fired == 0).nonzero()[:, 0]

    @property
    def dead(self) -> Int[Tensor, " n"]:
        """The former name of `silent`."""
        warnings.warn(
            "ExpertStatistics.dead is silent now: an expert that is silent on a text need not be dead. The "
            "old name ends with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.silent

    def always_on(self, at_least: float = 0.9) -> Int[Tensor, " n"]:
        """The experts that fire on at least this share of the tokens."""
        return (self.density >= at_least).nonzero()[:, 0]

    @property
    def effective_number(self) -> float:
        """exp of the entropy of `load_share`: as many equally used experts would be as evenly used."""
        return torch.special.entr(self.load_share).sum().exp().item()

    def mean_direction(
        self, experts: int | Iterable[int] | Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """sum_t a_n u_n / sum_t a_n: what a coefficient of 1 writes, on the tokens where it fires.

        For an MxD c_n * (sum_t a_n D^T z) / sum_t a_n; for a transcoder c_n itself.

        Args:
            experts: a row each; None for all.
        """
        if experts is None:
            rows: Any = slice(None)
        else:
            given = experts if isinstance(experts, (int, Tensor)) else list(experts)
            rows = torch.as_tensor(given, device=self.fired.device).reshape(-1)
        sums = self.direction_sum[rows]
        return sums / self.coefficient_sum[rows].unsqueeze(-1).to(sums)

    @property
    def consistency(self) -> Float[Tensor, " d_sae"]:
        """How much of a direction an expert is: ||mean u_n||^2 / mean ||u_n||^2, means weighted by a_n.

        1 where it writes the same at every token, as a transcoder's feature does; near 0 where what it
        writes has no common direction. It is the part of the squared length that the mean direction
        explains. `share_along` is the part that lies along it, which is larger: there, an expert that writes
        along one line with changing length, or sign, still counts as a direction.
        """
        squared_sum = self.direction_sum.pow(2).sum(-1).double()
        return squared_sum / (self.coefficient_sum * self.weighted_squared_sum)

    @property
    def mean_mixture(self) -> Float[Tensor, " d_out"]:
        """The mean gate: mean over all tokens of C^T a."""
        return self.mixture_sum / self.n_tokens

    @property
    def mean_contribution(self) -> Float[Tensor, "d_sae d_out"]:
        """Mean over all tokens of a_n u_n; over experts these sum to the mean of the experts' output."""
        return self.direction_sum / self.n_tokens

    @property
    def contribution_rms(self) -> Float[Tensor, " d_sae"]:
        """sqrt(mean of ||a_n u_n||^2) over the tokens on which it fires."""
        return (self.contribution_squared_sum / self.fired).sqrt()

    def coactivation(
        self, by: Literal["jaccard", "correlation"] = "jaccard"
    ) -> Float[Tensor, "watched d_sae"]:
        """How much the watched experts fire on the same tokens as each expert.

        With n_i, n_j and n_ij the tokens on which one, the other and both fire, of T:

            jaccard        n_ij / (n_i + n_j - n_ij)
            correlation    (T n_ij - n_i n_j) / sqrt(n_i (T - n_i) n_j (T - n_j))

        NaN where neither fires, and a correlation where one of them never or always does.

        Raises:
            ValueError: no expert is watched, or `by` is neither.
        """
        if not len(self.watched):
            raise ValueError("No expert is watched: name some with expert_statistics(..., watched=[...]).")
        both = self.fired_together.T.double()
        one, other = self.fired[self.watched].double()[:, None], self.fired.double()[None]
        if by == "jaccard":
            return both / (one + other - both)
        if by == "correlation":
            T = self.n_tokens
            variances = one * (T - one) * other * (T - other)
            return (T * both - one * other) / variances.sqrt()
        raise ValueError(f"coactivation is by 'jaccard' or 'correlation', got {by!r}.")

    def density_histogram(self, bins: int = 40) -> Histogram:
        """How many experts fire how often, in bins of log10 of the density, from one token to all."""
        lowest = -math.log10(max(self.n_tokens, 10))
        edges = torch.linspace(lowest, 0, bins + 1, dtype=torch.float64)
        densities = self.density[self.fired > 0].log10().cpu().clamp(lowest, 0)
        counts = torch.histogram(densities, edges).hist.long()
        return Histogram(counts, edges, len(self.silent))

    @property
    def title(self) -> str:
        return (
            f"{self.architecture} at {self.hook_name}: {len(self.fired):,} experts, {self.n_tokens:,} tokens"
        )

    @property
    def columns(self) -> list[str]:
        return ["over the experts", "median", "mean", "largest"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        alive = self.fired > 0
        for name, values in (
            ("density", self.density),
            ("mean coefficient", self.mean_coefficient),
            ("load", self.load_share),
            ("consistency", self.consistency),
            ("contribution, root mean square", self.contribution_rms),
        ):
            v = values[alive]
            yield [
                name,
                *([f(v).item() for f in (torch.median, torch.mean, torch.max)] if len(v) else [math.nan] * 3),
            ]
        for name, value in (
            ("active on a token", self.l0),
            ("silent on this text", len(self.silent)),
            ("on at 90 % of the tokens or more", len(self.always_on())),
            ("effective number by load", self.effective_number),
        ):
            yield [name, "", value, ""]

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for every expert: how often and how strongly it fires, and what it writes.

        Rates that are not defined for an expert that did not fire are NaN.
        """
        import pandas

        frame = pandas.DataFrame(
            {
                "fired": self.fired,
                "density": self.density,
                "mean_coefficient": self.mean_coefficient,
                "coefficient_max": self.coefficient_max,
                "load_share": self.load_share,
                "consistency": self.consistency,
                "contribution_rms": self.contribution_rms,
                "mean_direction_norm": self.mean_direction().norm(dim=-1),
            }
            | {
                f"fired_with_{n}": self.fired_together[:, slot]
                for slot, n in enumerate(self.watched.tolist())
            },
        )
        return frame.rename_axis("expert").reset_index()

    def __repr__(self) -> str:
        return f"ExpertStatistics({self.title})"


def fingerprint(sae: SAE[Any]) -> str:
    """A hash of a layer: its architecture, settings and all weights."""
    return hash_settings(layer_identity(sae))


def mixture_width(sae: SAE[Any]) -> int:
    """The width of the layer's mixture: d_out for an MxD and a transcoder."""
    return decompose(sae, torch.zeros(1, sae.cfg.d_in, device=sae.W_dec.device)).mixture.shape[1]


@model_first
def expert_statistics(
    model: Any,
    sae: SAE[Any],
    tokens: Text,
    batch_size: int = 8,
    watched: Iterable[int] | Int[Tensor, " n"] = (),
    progress: bool = True,
) -> ExpertStatistics:
    """Measure how the layer's experts are used on a text.

        expert_statistics(model, mxd, tokens).to_pandas()

    Args:
        model: any hooked model; it runs up to the layer's MLP and no further.
        sae: the layer; its metadata says where it belongs. It may be attached or not.
        tokens: token ids with one sequence per row, a string, or strings. Tokens that the layer's training
            excluded are left out.
        batch_size: sequences in a forward pass. It does not change the numbers, beyond rounding.
        watched: experts of which it is counted with which others they fire, for `coactivation`; costs a
            column of d_sae counts each.
        progress: whether to show a progress bar.

    Raises:
        IndexError, TypeError: a watched expert does not exist.
        ValueError: the layer does not belong to the model, activations are NaN or infinite, or there is
            no text.
    """
    statistics = ExpertStatistics.of(sae, watched)
    for reading in read(model, {"": sae}, tokens, batch_size, progress):
        statistics.add_parts(reading[""].parts)
    return statistics


@torch.no_grad()
@model_first
def share_along(
    model: Any,
    sae: SAE[Any],
    tokens: Text,
    directions: Float[Tensor, "d_sae d_out"],
    batch_size: int = 8,
    progress: bool = True,
) -> Float[Tensor, " d_sae"]:
    """The share of each expert's contributions that lies along one direction of its own.

        sum_t <a_n u_n, d_n>^2 / sum_t ||a_n u_n||^2        d_n of unit length

    With `ExpertStatistics.mean_direction` it says how much of a direction an expert is: 1 for a
    transcoder's feature. It needs the directions beforehand, and so a second pass over the text.

    Args:
        model, sae, tokens, batch_size, progress: as for `expert_statistics`.
        directions: one row per expert, of any length; that of an expert that never fires is not used.

    Returns:
        A share for each expert; NaN where it never fires.

    Raises:
        ValueError: the directions are not [d_sae, d_out]; or as `expert_statistics`.
    """
    shape = (sae.cfg.d_sae, len(sae.b_dec))
    if directions.shape != shape:
        raise ValueError(f"expected one direction per expert, {shape}, got {tuple(directions.shape)}.")
    unit = F.normalize(directions.to(sae.W_dec), dim=-1)
    along, whole = torch.zeros(2, len(unit), dtype=torch.float64, device=unit.device)
    for reading in read(model, {"": sae}, tokens, batch_size, progress):
        for _, n, a, u in reading[""].parts.contributions():
            written = a[:, None] * u
            along.index_add_(0, n, (written * unit[n]).sum(-1).double() ** 2)
            whole.index_add_(0, n, written.double().pow(2).sum(-1))
    return along / whole


def usage_figure(statistics: ExpertStatistics, bins: int = 40) -> "go.Figure":
    """A plotly figure: how many experts fire how often."""
    import plotly.graph_objects as go

    histogram = statistics.density_histogram(bins)
    edges = histogram.edges
    figure = go.Figure(
        go.Bar(
            x=((edges[1:] + edges[:-1]) / 2).tolist(),
            y=histogram.counts.tolist(),
            width=(edges[1:] - edges[:-1]).tolist(),
            customdata=[f"{100 * 10**e:.2g} %" for e in ((edges[1:] + edges[:-1]) / 2).tolist()],
            hovertemplate="%{y} experts fire on about %{customdata} of the tokens<extra></extra>",
        )
    )
    figure.update_layout(
        title=f"{len(statistics.fired):,} experts on {statistics.n_tokens:,} tokens; "
        f"{histogram.n_silent:,} do not fire",
        xaxis_title="firing density, log10 of the share of tokens",
        yaxis_title="experts",
        bargap=0,
    )
    return figure

"""What a dashboard shows, as data: a few numbers for every expert of a layer, and all about some of them.

Saved as a folder of four files; tables in parquet, which pandas reads, and JSON:

    dashboard.json      {"format": 1, "id": ..., "settings": {...}}: what was collected, on what
    overview.parquet    a row for every expert of the layer, a column a number; row n is expert n
    experts.parquet     a row for every expert shown: the fields of `ExpertData` but its bands
    excerpts.parquet    a row for every excerpt: expert, band (its place in the expert's bands), name, low
                        and high (the fields of its `Band`), and the fields of `Excerpt`; a band without
                        excerpts has a row of its own, whose `tokens` is missing

The id is drawn anew whenever a folder is written and is in each of the tables too (in the metadata of their
schema): files of two writings are never read as one.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Self

from mxd_lens.artifacts.files import atomic_folder

FORMAT = 1
"""Of the files; raised when what is written can no longer be read by older versions."""
SETTINGS_FILENAME = "dashboard.json"
OVERVIEW_FILENAME, EXPERTS_FILENAME, EXCERPTS_FILENAME = (
    "overview.parquet",
    "experts.parquet",
    "excerpts.parquet",
)
FILENAMES = (SETTINGS_FILENAME, OVERVIEW_FILENAME, EXPERTS_FILENAME, EXCERPTS_FILENAME)
ID_KEY = b"mxd_lens.dashboard"


class TokenEffect(NamedTuple):
    """What an expert does to the logit of one token of the vocabulary."""

    token: str
    """Its text."""
    logit: float
    """What a coefficient of 1 adds to its logit on average over the expert's firings, weighted by the
    coefficient; before the final norm's division, and less the mean over the vocabulary."""
    spread: float
    """The standard deviation of that over the firings, weighted likewise, from a uniform sample of them; 0
    for a transcoder, whose features write the same everywhere."""


class Neighbour(NamedTuple):
    """Another expert, and how alike it is."""

    expert: int
    """Its id."""
    similarity: float
    """A Jaccard index or a cosine, see where it stands."""


@dataclass
class Excerpt:
    """A part of one sequence around a token at which an expert fires. A value a token in each list."""

    tokens: list[str]
    """The tokens' texts, which joined are the excerpt's text: a space belongs to the token that begins with
    it, and a character that several tokens make up stands at the first of them; the others are ""."""
    token_ids: list[int]
    """Their ids."""
    values: list[float]
    """a_n, the expert's coefficient; 0 where it does not fire, and at special tokens that the layer's
    training excluded, which are left to the MLP."""
    norms: list[float]
    """||a_n c_n * v||, the norm of what the expert writes; 0 where `values` is."""
    loss_effects: list[float]
    """Cross-entropy of the prediction made at the token (of the next one), in nats: without the expert,
    less with it; positive where the expert helps. Without it at all tokens of the sequence. nan where it
    is not known: at a sequence's last token, or where it was not asked for."""
    peak: int
    """Where in the lists the firing stands for which the excerpt was chosen: of the top excerpts the
    sequence's largest coefficient, of the others one drawn at random."""
    sequence: int
    """Which row of the collected tokens."""
    start: int
    """The excerpt's first position in it."""


@dataclass
class Band:
    """Excerpts at which an expert fires about equally strongly."""

    name: str
    """"top", or the share of the expert's firings that are weaker, as "80-100 %"."""
    low: float
    """The smallest coefficient in the band: of the excerpts' peaks for "top", else a quantile of the
    firings, from a uniform sample of them. nan without excerpts."""
    high: float
    """The largest."""
    excerpts: list[Excerpt]
    """Strongest first."""


@dataclass
class ExpertData:
    """All about one expert. Numbers are over the collected tokens, special ones left out where the layer's
    training left them out; what has no value, as the mean of an expert that never fires, is nan."""

    expert: int
    """Its id."""
    density: float
    """Share of the tokens on which it fires."""
    n_firings: int
    """Tokens on which it fires."""
    mean: float
    """Mean coefficient where it fires."""
    maximum: float
    """The largest coefficient; 0 if it never fires."""
    edges: list[float]
    """The bounds of the histogram's bins, one more than bins. Coefficients of all firings."""
    counts: list[int]
    """Firings in each bin, its lower bound included."""
    bands: list[Band]
    """"top", then quantile bands of its firings, strongest first. None for an expert that never fires."""
    promoted: list[TokenEffect]
    """The tokens whose logits its mean direction raises most, largest first. Empty for an expert that never
    fires, or a layer that does not write into the residual stream."""
    suppressed: list[TokenEffect]
    """Those it lowers most, most lowered first."""
    singular_values: list[float]
    """Of W_n, largest first; the one ||c_n|| for a transcoder. Empty where they were not asked for."""
    stable_rank: float
    """||W_n||_F^2 / ||W_n||_2^2: 1 for a map of one direction."""
    coactive: list[Neighbour]
    """The experts that fire on the same tokens, by the Jaccard index."""
    similar: list[Neighbour]
    """The experts whose rows c_n of W_dec point the same way, by the cosine."""
    share_of_output: float
    """Mean over all tokens of <a_n c_n * v, y - b> / ||y - b||^2. Over all experts, and the skip connection
    where there is one, these sum to 1."""
    loss_effect: float
    """Mean over its firings of the effect on the prediction made at the firing, in nats, positive where the
    expert helps: the mean over the quantile bands of the mean over their excerpts' peaks. nan where it was
    not asked for."""
    coherence: float
    """How alike the layer's inputs at the peaks of the top excerpts are: the mean over pairs of them of the
    cosine, after subtracting the mean input over all tokens; 0 where it would be negative. 1: the same
    input every time; 0: as different as any. nan for fewer than two excerpts."""
    mean_gate_share: float
    """Share of c_n's squared length along the mean gate: near 1, it only scales the dense part."""
    consistency: float
    """||mean u_n||^2 / mean ||u_n||^2, u_n being what a coefficient of 1 writes: 1 where that is the same
    for every token."""
    contribution_rms: float
    """sqrt(mean of ||a_n u_n||^2) over its firings."""
    mean_direction: list[float]
    """sum_t a_n u_n / sum_t a_n, [d_out]: what a coefficient of 1 writes on average. Empty for an expert
    that never fires."""


@dataclass
class DashboardData:
    """What `collect_dashboard` collected; `save` writes it and `load` reads it."""

    settings: dict[str, Any]
    """What it is of, as JSON takes it: model_name, hook_name, hook_name_out, architecture, layer (the folder
    or the release it came from, where known), d_sae, k, n_tokens (counted), n_sequences, context_size,
    text_name, collection (the fields of `CollectionConfig`), identity (a `RunIdentity`), labels (of experts,
    by id, where a labels.json is beside the layer), versions, and date."""
    overview: dict[str, list[float]]
    """A value for every expert of the layer, in their order: density, mean, maximum, load_share,
    share_of_output, contribution_rms, consistency, mean_gate_share."""
    experts: list[ExpertData]
    """The experts shown, in the order asked for."""

    def save(self, folder: str | Path) -> None:
        """Write the data as a folder, in one step, in place of what was there; see the module for the files.

        Raises:
            WriteError: they could not be written; an earlier folder is unchanged.
        """
        identity = secrets.token_hex(8)
        overview = pa.table({name: pa.array(v, pa.float64()) for name, v in self.overview.items()})
        rows = [_expert_row(expert) for expert in self.experts]
        excerpts = [row for expert in self.experts for row in _excerpt_rows(expert)]
        tables = {
            OVERVIEW_FILENAME: overview,
            EXPERTS_FILENAME: pa.Table.from_pylist(rows, EXPERTS_SCHEMA),
            EXCERPTS_FILENAME: pa.Table.from_pylist(excerpts, EXCERPTS_SCHEMA),
        }
        with atomic_folder(folder) as partial:
            for name, table in tables.items():
                pq.write_table(table.replace_schema_metadata({ID_KEY: identity}), partial / name)
            about = {"format": FORMAT, "id": identity, "settings": self.settings}
            (partial / SETTINGS_FILENAME).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads data that `save` wrote.

        Raises:
            FileNotFoundError: there are none in the folder, or their writing was interrupted.
            ValueError: the files are of different writings, or of a newer version.
        """
        folder = Path(folder)
        for name in FILENAMES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: DashboardData.save writes it.")
        about = json.loads((folder / SETTINGS_FILENAME).read_text(encoding="utf-8"))
        if about["format"] > FORMAT:
            raise ValueError(
                f"{folder} is in format {about['format']}, and this version of mxd_lens reads up to {FORMAT}."
            )
        overview, experts, excerpts = (
            _read_table(folder / name, about["id"])
            for name in (OVERVIEW_FILENAME, EXPERTS_FILENAME, EXCERPTS_FILENAME)
        )
        bands: dict[int, list[Band]] = {}
        for row in excerpts.to_pylist():
            of_expert = bands.setdefault(row["expert"], [])
            if row["band"] == len(of_expert):
                of_expert.append(Band(row["name"], row["low"], row["high"], []))
            if row["tokens"] is not None:
                of_expert[-1].excerpts.append(Excerpt(**{f.name: row[f.name] for f in fields(Excerpt)}))
        return cls(
            settings=about["settings"],
            overview=overview.to_pydict(),
            experts=[_expert(row, bands.get(row["expert"], [])) for row in experts.to_pylist()],
        )


@dataclass(kw_only=True)
class CollectionConfig:
    """How much is collected of every expert."""

    n_top: int = 10
    """Excerpts around the largest coefficients, one a sequence."""
    n_bands: int = 5
    """Quantile bands of the firings, equally many in each."""
    n_per_band: int = 4
    """Excerpts in a band, drawn at random."""
    before: int = 20
    """Tokens of an excerpt before its peak, at most."""
    after: int = 10
    """Tokens behind it."""
    n_tokens: int = 10
    """Promoted tokens, and suppressed ones."""
    n_neighbours: int = 10
    """Nearest experts by co-activation, and by weights."""
    n_sampled: int = 1000
    """Firings of an expert in the uniform sample, of which the bands' bounds and excerpts are."""
    n_directions: int = 64
    """Firings in the sample of what an MxD's expert writes, for the spread of the promoted tokens."""
    loss_effects: bool = True
    """Whether the effect of the expert on the loss is measured on the excerpts: most of the time."""
    seed: int = 0
    """Of what is drawn at random."""
    batch_size: int = 8
    """Sequences in a forward pass, or as many tokens in shorter ones; changes no number beyond rounding."""
    checkpoint_every: int = 20
    """Batches between two checkpoints, if there is a folder."""

    @classmethod
    def light(cls, **changes: Any) -> Self:
        """The settings for pages of all experts of a layer: fewer texts of each."""
        few = {"n_top": 8, "n_per_band": 2, "n_directions": 16, "n_sampled": 200}
        return cls(**few | changes)

    def __post_init__(self) -> None:
        positive = ("n_bands", "n_sampled", "n_directions", "batch_size", "checkpoint_every")
        for name in (*positive, "n_top", "n_per_band", "before", "after", "n_tokens", "n_neighbours"):
            least = 1 if name in positive else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


def is_saved(folder: str | Path) -> bool:
    """Whether a folder holds complete data."""
    return (Path(folder) / SETTINGS_FILENAME).is_file()


_EFFECTS = pa.list_(pa.struct({"token": pa.string(), "logit": pa.float64(), "spread": pa.float64()}))
_NEIGHBOURS = pa.list_(pa.struct({"expert": pa.int64(), "similarity": pa.float64()}))
_TYPES = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    list[int]: pa.list_(pa.int64()),
    list[float]: pa.list_(pa.float64()),
    list[str]: pa.list_(pa.string()),
    list[TokenEffect]: _EFFECTS,
    list[Neighbour]: _NEIGHBOURS,
}
EXPERTS_SCHEMA = pa.schema([(f.name, _TYPES[f.type]) for f in fields(ExpertData) if f.name != "bands"])  # type: ignore[index]
EXCERPTS_SCHEMA = pa.schema(
    [("expert", pa.int64()), ("band", pa.int64())]
    + [(f.name, _TYPES[f.type]) for f in fields(Band) if f.name != "excerpts"]  # type: ignore[index]
    + [(f.name, _TYPES[f.type]) for f in fields(Excerpt)]  # type: ignore[index]
)


def _expert_row(expert: ExpertData) -> dict[str, Any]:
    row = {f.name: getattr(expert, f.name) for f in fields(ExpertData) if f.name != "bands"}
    for name in ("promoted", "suppressed", "coactive", "similar"):
        row[name] = [entry._asdict() for entry in row[name]]
    return row


def _expert(row: Mapping[str, Any], bands: list[Band]) -> ExpertData:
    nested: dict[str, type[TokenEffect] | type[Neighbour]] = {
        "promoted": TokenEffect,
        "suppressed": TokenEffect,
        "coactive": Neighbour,
        "similar": Neighbour,
    }
    values = {name: [kind(**entry) for entry in row[name]] for name, kind in nested.items()}
    return ExpertData(**{**row, **values}, bands=bands)


def _excerpt_rows(expert: ExpertData) -> list[dict[str, Any]]:
    rows = []
    for i, band in enumerate(expert.bands):
        of_band = {"expert": expert.expert, "band": i, "name": band.name, "low": band.low, "high": band.high}
        rows += [of_band | asdict(excerpt) for excerpt in band.excerpts] or [of_band]
    return rows


def _read_table(path: Path, identity: str) -> pa.Table:
    table = pq.read_table(path)
    if (table.schema.metadata or {}).get(ID_KEY) != identity.encode():
        raise ValueError(
            f"{path} was not written together with {SETTINGS_FILENAME} beside it: collect the data again."
        )
    return table

"""Reading which experts fire on a token, and what each of them writes.

    y = sum_n a_n c_n * v + skip + b        v = D^T z for an MxD, 1 for a transcoder; '*' elementwise

a_n c_n * v is the contribution of expert n. Contributions add up to y - b, less the skip connection's
W_skip x where there is one.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.architectures.base import PairedTranscoder
from mxd_lens.architectures.inputs import EncodedInputs
from mxd_lens.artifacts.tables import Cell, Tabular, percent
from mxd_lens.hooks.site import check_trained_on, hook_names
from mxd_lens.models import attached_layer, hook_point_name, special_token_ids

if TYPE_CHECKING:
    import pandas

ENTRIES = 16_384
"""Contributions formed at once, so that memory does not grow with the text."""


class Parts(NamedTuple):
    """A layer's output on some tokens, taken apart: y = sum_n a_n c_n * v + skip + bias."""

    coefficients: Float[Tensor, "tokens n"]
    """a_n; 0 where fewer than n experts are active."""
    experts: Int[Tensor, "tokens n"]
    """Which experts they are of, in no particular order."""
    directions: Float[Tensor, "d_sae d_out"]
    """c_n, for every expert."""
    decoder_out: Float[Tensor, "tokens d_out_or_1"]
    """v: D^T z for an MxD; a column of ones for a transcoder, whose features are directions."""
    skip: Float[Tensor, "tokens d_out"] | None
    """W_skip x; None without a skip connection."""
    bias: Float[Tensor, " d_out"]
    """b."""

    @property
    def fired(self) -> tuple[Int[Tensor, " fired"], Int[Tensor, " fired"], Float[Tensor, " fired"]]:
        """Token, expert and coefficient, an entry for every active expert of every token."""
        token_of, slot = self.coefficients.nonzero(as_tuple=True)
        return token_of, self.experts[token_of, slot], self.coefficients[token_of, slot]

    @property
    def mixture(self) -> Float[Tensor, "tokens d_out"]:
        """C^T a."""
        mixture = self.directions.new_zeros(len(self.coefficients), self.directions.shape[1])
        for token_of, rows in self._rows:
            mixture.index_add_(0, token_of, rows)
        return mixture

    @property
    def output(self) -> Float[Tensor, "tokens d_out"]:
        """y - b."""
        return self.mixture * self.decoder_out + (0 if self.skip is None else self.skip)

    @property
    def rest(self) -> Float[Tensor, "tokens d_out"]:
        """skip + b, what the layer writes without its experts."""
        return self.bias.expand(len(self.coefficients), -1) if self.skip is None else self.skip + self.bias

    def dense(self, gate: Float[Tensor, " d_out"]) -> Float[Tensor, "tokens d_out"]:
        """gate * v + skip + b: the layer with the same gate at every token in the place of C^T a."""
        return gate * self.decoder_out + self.rest

    def norms(self) -> Float[Tensor, "tokens n"]:
        """||a_n c_n * v||, the length of each contribution; 0 where fewer than n experts are active."""
        return self._of_fired((rows * self.decoder_out[t]).norm(dim=-1) for t, rows in self._rows)

    def dots(self, y: Float[Tensor, "tokens d_out"]) -> Float[Tensor, "tokens n"]:
        """<a_n c_n * v, y>, how far each contribution goes along a vector a token; 0 where none is active."""
        along = self.decoder_out * y
        return self._of_fired((rows * along[t]).sum(-1) for t, rows in self._rows)

    def largest(self, shares: Float[Tensor, "tokens n"], k: int) -> Int[Tensor, "tokens k"]:
        """Where a token's k largest shares by magnitude stand, active experts first; all of fewer than k."""
        order = shares.abs().nan_to_num().masked_fill(self.coefficients == 0, -1)
        return order.argsort(-1, descending=True)[:, :k]

    @property
    def _rows(self) -> Iterator[tuple[Int[Tensor, " block"], Float[Tensor, "block d_out"]]]:
        """Tokens and a_n c_n, for some of `fired` at a time."""
        for token_of, expert, a in zip(*(part.split(ENTRIES) for part in self.fired), strict=True):
            yield token_of, a[:, None] * self.directions[expert]

    def _of_fired(self, blocks: Iterable[Float[Tensor, " block"]]) -> Float[Tensor, "tokens n"]:
        values = torch.zeros_like(self.coefficients)
        values[self.coefficients != 0] = torch.cat([values.new_zeros(0), *blocks])
        return values


def take_apart(sae: SAE[Any], x: Float[Tensor, "tokens d_in"]) -> Parts:
    """The parts of a layer's output on x.

    Right for every layer of this package, and for SAELens' transcoders and SAEs.

    Raises:
        ValueError: x has another width than the layer's input, or the layer is one of SAELens' that
            rescales or reshapes its input while it runs, so that a feature is no fixed direction.
    """
    if isinstance(sae, PairedTranscoder):
        sae.check_input(x)
    elif x.shape[-1] != sae.cfg.d_in:
        raise ValueError(f"expected an input [..., d_in = {sae.cfg.d_in}], got {tuple(x.shape)}.")
    x = x.to(sae.W_dec)
    directions = expert_directions(sae)
    coefficients, experts = active_experts(sae, x)
    decoder_out = sae.expert_input(x) if isinstance(sae, PairedTranscoder) else x.new_ones(len(x), 1)
    skip = x @ sae.W_skip.T if hasattr(sae, "W_skip") else None
    return Parts(coefficients, experts, directions, decoder_out, skip, sae.b_dec)


def writes_directions(sae: SAE[Any]) -> bool:
    """Whether an expert writes along its c_n at every token: v is 1, as in a transcoder or an SAE."""
    return not isinstance(sae, PairedTranscoder) or sae.writes_directions


def expert_directions(sae: SAE[Any]) -> Float[Tensor, "d_sae d_out"]:
    """c_n for every expert: what a coefficient of 1 writes, where v is 1.

    W_dec, except in SAELens' SAEs with rescale_acts_by_decoder_norm, which decode with its rows at unit
    norm.

    Raises:
        ValueError: the layer rescales or reshapes its input while it runs.
    """
    if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale") or (
        sae.cfg.reshape_activations != "none"
    ):
        raise ValueError(
            "What a feature of this layer writes depends on the whole input: it was made with "
            f"normalize_activations={sae.cfg.normalize_activations!r} and "
            f"reshape_activations={sae.cfg.reshape_activations!r}, and 'none' is needed for both."
        )
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
    return sae.W_dec


def active_experts(
    sae: SAE[Any], x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
    """The coefficients of the active experts and their ids.

    n is k for a layer that has one. For the others it is the largest number active on any token, and a
    token with fewer is filled up with experts whose coefficient is 0.
    """
    if isinstance(sae, PairedTranscoder):
        return sae.active_experts(x)
    a = encode_to_read(sae, x)
    n = int((a > 0).sum(-1).max()) if a.numel() else 0
    return a.topk(n, dim=-1)


def encode_to_read(sae: SAE[Any], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
    """encode(x) that no decode follows: a layer that keeps inputs for its decode does not keep this one."""
    kept = vars(sae).get("_encoded")
    if kept is None:
        return sae.encode(x)
    sae._encoded = EncodedInputs()
    try:
        return sae.encode(x)
    finally:
        sae._encoded = kept


def contributions(
    sae: SAE[Any],
    x: Float[Tensor, "*batch d_in"],
    experts: Sequence[int] | Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n d_out"]:
    """What experts write: a_n c_n * (D^T z) for an MxD, a_n c_n for a transcoder.

    Over all active experts they sum to y - b, less W_skip x where there is a skip connection.

    Args:
        sae: the layer.
        x: its input.
        experts: whose; a contribution is 0 where the expert is not active. None: the active ones, in
            the order of `active_experts(sae, x)`.

    Raises:
        IndexError: there is no such expert.
        ValueError: as `take_apart`.
    """
    parts = take_apart(sae, x.reshape(-1, x.shape[-1]))
    a, ids = parts.coefficients, parts.experts
    if experts is not None:
        named = expert_ids(sae, experts)
        a = a.new_zeros(len(a), sae.cfg.d_sae).scatter(1, ids, a)[:, named]
        ids = named.expand_as(a)
    written = a.unsqueeze(-1) * parts.directions[ids] * parts.decoder_out.unsqueeze(1)
    return written.view(*x.shape[:-1], *written.shape[1:])


def expert_ids(sae: SAE[Any], experts: int | Iterable[int] | Int[Tensor, " n"] | None) -> Int[Tensor, " n"]:
    """Expert ids as a tensor; all of them for None.

    Raises:
        IndexError: there is no such expert.
        ValueError: they are no integers; a mask, for one.
    """
    device, d_sae = sae.W_dec.device, sae.cfg.d_sae
    if experts is None:
        return torch.arange(d_sae, device=device)
    given = torch.as_tensor(experts if isinstance(experts, (int, Tensor)) else list(experts))
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise ValueError(f"experts are named by their ids, integers; got {given.dtype}.")
    ids = given.to(device, torch.long).reshape(-1)
    outside = ids[(ids < 0) | (ids >= d_sae)]
    if len(outside):
        raise IndexError(f"expert {int(outside[0])} does not exist: there are {d_sae}, from 0.")
    return ids


# The layer's input in a language model


@torch.no_grad()
def layer_input(
    sae: SAE[Any], model: Any, tokens: Int[Tensor, "sequences positions"]
) -> Float[Tensor, "sequences positions d_in"]:
    """What the layer gets to see on some text; the model runs up to its MLP and no further.

    The layer may be attached or not. Other layers that are attached do their part.

    Raises:
        ValueError: the layer was trained on another model, or on a hook this one lacks.
    """
    check_trained_on(model, sae)
    name = input_hook(sae, model)
    return run_to(model, tokens, [name])[name].to(sae.W_dec)


@torch.no_grad()
def run_to(
    model: Any, tokens: Int[Tensor, "sequences positions"], hooks: Collection[str]
) -> dict[str, Float[Tensor, "sequences positions d"]]:
    """The activations at some hook points; the model runs up to the last of them.

    Raises:
        ValueError: one of them does not fire.
    """
    captured: dict[str, Tensor] = {}

    def capturing(name: str) -> Any:
        return name, lambda x, hook: captured.__setitem__(name, x)  # noqa: ARG005

    stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hooks]
    model.run_with_hooks(
        tokens.to(model.cfg.device),
        stop_at_layer=None if None in stops else max(stop for stop in stops if stop is not None),
        fwd_hooks=[capturing(name) for name in hooks],
    )
    for name in hooks:
        if name not in captured:
            raise ValueError(f"{name} did not fire: this model does not run the hook point a layer reads.")
    return captured


def kept_inputs(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    batch_size: int,
    progress: bool,
) -> Iterator[Float[Tensor, "tokens d_in"]]:
    """The layer's inputs, a batch of sequences at a time, without the tokens its training excluded.

    Raises:
        ValueError: `tokens` are not ids [sequences, positions]; or as `layer_input`.
    """
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be ids [sequences, positions], got {tuple(tokens.shape)}.")
    for batch in tqdm(tokens.split(batch_size), desc="Reading experts", disable=not progress):
        x = layer_input(sae, model, batch)
        yield x[kept_tokens(sae, model, batch).to(x.device)]


def kept_tokens(
    sae: SAE[Any], model: Any, tokens: Int[Tensor, "*batch positions"]
) -> Bool[Tensor, "*batch positions"]:
    """The tokens that the layer's training did not exclude."""
    excluded = special_token_ids(model, sae.cfg.metadata.exclude_special_tokens)
    return ~torch.isin(tokens, torch.tensor(excluded).to(tokens))


def input_hook(sae: SAE[Any], model: Any) -> str:
    """The hook point at which this model has the layer's input, attached or not.

    Raises:
        ValueError: the model has no such hook point.
    """
    name = hook_point_name(model, hook_names(sae)[0])
    attached = attached_layer(model, name)
    if attached is not None:  # an SAE that is attached takes the place of the hook point it reads
        return f"{name}.hook_sae_input" if attached is sae else f"{name}.hook_sae_output"
    return name


# What fires on a prompt


@dataclass(frozen=True)
class Reading(Tabular):
    """What `top_experts` read. y is the layer's output, b its bias.

    A share is <part, y - b> / ||y - b||^2: the part's length along y - b, as a share of it. The shares of
    a token's experts, of the other experts and of the skip connection sum to 1; a part that points
    against the sum has a negative share.
    """

    tokens: list[str]
    """The prompt's tokens."""
    experts: Int[Tensor, "positions k"]
    """The experts with the largest shares, by magnitude."""
    coefficients: Float[Tensor, "positions k"]
    """a_n; 0 where fewer than k experts are active."""
    shares: Float[Tensor, "positions k"]
    """Each expert's share of y - b; NaN where y = b."""
    norms: Float[Tensor, "positions k"]
    """||a_n c_n * v||, the length of what the expert writes."""
    other_shares: Float[Tensor, " positions"]
    """The share of all other active experts together."""
    skip_shares: Float[Tensor, " positions"] | None
    """The share of W_skip x; None without a skip connection."""
    skip_norms: Float[Tensor, " positions"] | None
    """||W_skip x||; None without a skip connection."""
    output_norms: Float[Tensor, " positions"]
    """||y - b||."""
    bias_norm: float
    """||b||. The bias is the same for every token and has no share."""
    n_active: Int[Tensor, " positions"]
    """Active experts."""
    excluded: Bool[Tensor, " positions"]
    """Special tokens that the layer's training excluded: it has not learnt to replace the MLP there."""
    hook_name_out: str
    """Where the layer writes."""

    @property
    def title(self) -> str:
        excluded = "; * excluded from the layer's training" if self.excluded.any() else ""
        return (
            f"{self.hook_name_out}: each token's top experts as 'id: coefficient, share of y - b', "
            f"||b|| = {self.bias_norm:.3g}{excluded}"
        )

    @property
    def columns(self) -> list[str]:
        skip = [] if self.skip_shares is None else ["skip"]
        experts = [f"expert {i + 1}" for i in range(self.experts.shape[1])]
        return ["", "token", "||y - b||", "active", *experts, "others", *skip]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for t, token in enumerate(self.tokens):
            row: list[Cell] = [t, token + "*" * bool(self.excluded[t])]
            row += [self.output_norms[t].item(), int(self.n_active[t])]
            for n, a, share in zip(
                self.experts[t].tolist(), self.coefficients[t].tolist(), self.shares[t].tolist(), strict=True
            ):
                row.append(f"{n}: {a:.3g}, {percent(share)}" if a else "")
            row.append(percent(self.other_shares[t].item()))
            if self.skip_shares is not None:
                row.append(percent(self.skip_shares[t].item()))
            yield row

    def to_pandas(self) -> "pandas.DataFrame":
        """A row a part: position, token, part (expert, others, skip, bias), expert (the id, else missing),
        coefficient, norm and share."""
        import pandas

        rows: list[tuple[Any, ...]] = []
        for t, token in enumerate(self.tokens):
            for n, a, norm, share in zip(
                *(v[t].tolist() for v in (self.experts, self.coefficients, self.norms, self.shares)),
                strict=True,
            ):
                if a:
                    rows.append((t, token, "expert", n, a, norm, share))
            rows.append((t, token, "others", None, math.nan, math.nan, self.other_shares[t].item()))
            if self.skip_shares is not None and self.skip_norms is not None:
                norm, share = self.skip_norms[t].item(), self.skip_shares[t].item()
                rows.append((t, token, "skip", None, math.nan, norm, share))
            rows.append((t, token, "bias", None, math.nan, self.bias_norm, math.nan))
        columns = ["position", "token", "part", "expert", "coefficient", "norm", "share"]
        return pandas.DataFrame(rows, columns=columns).astype({"expert": "Int64"})


@torch.no_grad()
def top_experts(model: Any, sae: SAE[Any], prompt: str | Int[Tensor, " positions"], k: int = 5) -> Reading:
    """The experts that do most of a layer's writing, at every token of a prompt.

        reading = top_experts(model, mxd, "The capital of France is")

    Args:
        model: any hooked model; the layer may be attached to it or not.
        sae: the layer.
        prompt: text, which gets a BOS as the model's `to_tokens` gives one, or token ids.
        k: experts a token, the ones with the largest share of y - b by magnitude. The coefficient alone
            does not say how much an expert of an MxD writes.

    Raises:
        ValueError: k is not positive, the prompt is empty or more than one, or the layer does not belong
            to the model.
    """
    if k < 1:
        raise ValueError(f"k must be a positive number of experts, got {k}.")
    tokens = one_prompt(model, prompt)
    parts = take_apart(sae, layer_input(sae, model, tokens[None])[0])
    output = parts.output
    squared = output.pow(2).sum(-1)
    shares = parts.dots(output) / squared.unsqueeze(-1)
    order = parts.largest(shares, k)
    skip_shares = skip_norms = None
    if parts.skip is not None:
        skip_shares, skip_norms = (parts.skip * output).sum(-1) / squared, parts.skip.norm(dim=-1).cpu()
        skip_shares = skip_shares.cpu()
    top_shares = shares.gather(1, order)
    return Reading(
        tokens=[model.tokenizer.decode([t]) for t in tokens.tolist()],
        experts=parts.experts.gather(1, order).cpu(),
        coefficients=parts.coefficients.gather(1, order).cpu(),
        shares=top_shares.cpu(),
        norms=parts.norms().gather(1, order).cpu(),
        other_shares=(shares.sum(-1) - top_shares.sum(-1)).cpu(),
        skip_shares=skip_shares,
        skip_norms=skip_norms,
        output_norms=squared.sqrt().cpu(),
        bias_norm=parts.bias.norm().item(),
        n_active=(parts.coefficients != 0).sum(-1).cpu(),
        excluded=~kept_tokens(sae, model, tokens).cpu(),
        hook_name_out=hook_names(sae)[1],
    )


def one_prompt(model: Any, prompt: str | Int[Tensor, " positions"]) -> Int[Tensor, " positions"]:
    """The token ids of one prompt.

    Raises:
        ValueError: it is empty, or more than one.
    """
    tokens = model.to_tokens(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise ValueError(f"a prompt is text or a tensor of token ids, got {type(prompt).__name__}.")
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"one prompt of at least one token is read at a time, got {tuple(tokens.shape)}.")
    return tokens


# What tells two texts apart


@dataclass(frozen=True)
class ExpertContrast(Tabular):
    """What `find_experts` found: experts whose mean coefficient differs between two texts."""

    experts: Int[Tensor, " n"]
    """Largest difference first, by magnitude."""
    means_a: Float[Tensor, " n"]
    """Mean coefficient over the tokens of the first text; 0 counts where the expert is not active."""
    means_b: Float[Tensor, " n"]
    """Over those of the second."""
    n_tokens_a: int
    """Tokens of the first text, special ones left out."""
    n_tokens_b: int
    """Of the second."""

    @property
    def title(self) -> str:
        return f"Mean coefficients: a over {self.n_tokens_a:,} tokens, b over {self.n_tokens_b:,}"

    @property
    def columns(self) -> list[str]:
        return ["expert", "mean in a", "mean in b", "a - b"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        for n, a, b in zip(self.experts.tolist(), self.means_a.tolist(), self.means_b.tolist(), strict=True):
            yield [n, a, b, a - b]


def find_experts(
    model: Any,
    sae: SAE[Any],
    text_a: str | Sequence[str],
    text_b: str | Sequence[str],
    n: int = 10,
    progress: bool = True,
) -> ExpertContrast:
    """The experts whose mean coefficient differs most between two texts.

        find_experts(model, mxd, "Le chat est sur la table.", "The cat is on the table.")

    Args:
        model: any hooked model; the layer may be attached to it or not.
        sae: the layer.
        text_a, text_b: a text, or several; one longer than the model's context is cut. Means are over all
            tokens that are not special ones, so that a long text counts more than a short one.
        n: how many experts, by the magnitude of the difference; its sign says which text has more.
        progress: whether to show a progress bar.

    Raises:
        ValueError: n is not positive, a text has no token, or the layer does not belong to the model.
    """
    if n < 1:
        raise ValueError(f"n must be a positive number of experts, got {n}.")
    sides = [[text] if isinstance(text, str) else list(text) for text in (text_a, text_b)]
    with tqdm(total=sum(map(len, sides)), desc="Reading experts", disable=not progress) as bar:
        (mean_a, tokens_a), (mean_b, tokens_b) = (_mean_coefficients(sae, model, s, bar) for s in sides)
    order = (mean_a - mean_b).abs().argsort(descending=True, stable=True)[:n]
    return ExpertContrast(order, mean_a[order], mean_b[order], tokens_a, tokens_b)


@torch.no_grad()
def _mean_coefficients(
    sae: SAE[Any], model: Any, texts: Sequence[str], bar: "tqdm[Any]"
) -> tuple[Float[Tensor, " d_sae"], int]:
    special = torch.tensor(special_token_ids(model, True))
    sums, n_tokens = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=sae.W_dec.device), 0
    for text in texts:
        tokens = model.to_tokens(text)
        kept = ~torch.isin(tokens, special.to(tokens))
        if kept.any():
            x = layer_input(sae, model, tokens)
            values, ids = active_experts(sae, x[kept.to(x.device)])
            sums.index_add_(0, ids.flatten(), values.flatten().double())
            n_tokens += int(kept.sum())
        bar.update()
    if not n_tokens:
        raise ValueError(f"there is no token in this text, special ones left out: {list(texts)!r}.")
    return (sums / n_tokens).cpu(), n_tokens

"""Steering, as in the paper: what a model writes while one expert's coefficient is raised."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch.nn import functional as F

from mxd_lens.artifacts.files import write_json
from mxd_lens.artifacts.tables import Tabular
from mxd_lens.hooks.site import hook_names
from mxd_lens.hooks.steer import Mode, steer

NGRAM = 3
"""Tokens in the sequences whose repetition is counted."""


@dataclass(frozen=True)
class Sampling:
    """How texts are sampled; the defaults are the paper's."""

    prompt: str = "Let's talk about "
    n_samples: int = 10
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_p: float = 0.1
    """Share of the probability mass that is sampled from."""
    frequency_penalty: float = 1.0
    """Taken off a token's logit for every time it has occurred, in the prompt too."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("temperature", "frequency_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")

    @torch.no_grad()
    def continuations(self, model: Any, prepend_bos: bool = True) -> list[list[int]]:
        """What the model, as it is hooked now, goes on to write: token ids, up to the end of its text."""
        prompt = model.to_tokens(self.prompt, prepend_bos=prepend_bos)
        end = model.tokenizer.eos_token_id
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            tokens = model.generate(
                prompt.repeat(self.n_samples, 1),
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_p=self.top_p,
                freq_penalty=self.frequency_penalty,
                stop_at_eos=end is not None,
                verbose=False,
            )
        written = tokens[:, prompt.shape[1] :].tolist()
        return [ids[: ids.index(end)] if end in ids else ids for ids in written]


@dataclass(frozen=True, repr=False)
class SteeredSamples(Tabular):
    """What `steered_samples` gives: the same model's continuations, with an expert steered and without."""

    model_name: str
    hook_name_out: str
    """Where the layer writes."""
    expert: int
    coefficient: float
    mode: Mode
    sampling: Sampling
    steered: list[str]
    """The continuations, without the prompt."""
    unsteered: list[str]
    """Those with the layer in the MLP's place and no expert steered, for the same seed."""
    steered_ids: list[list[int]]
    """Their token ids."""
    unsteered_ids: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the samples as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "SteeredSamples":
        """Reads samples that `save` wrote."""
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**known | {"sampling": Sampling(**known["sampling"])})

    @property
    def title(self) -> str:
        return f"{self.model_name}, {self.hook_name_out}, prompt {self.sampling.prompt!r}"

    @property
    def columns(self) -> list[str]:
        change = {"add": "+", "set": "=", "scale": "x"}[self.mode]
        return [f"expert {self.expert} {change} {self.coefficient:g}", "not steered"]

    @property
    def rows(self) -> list[tuple[str, str]]:
        return list(zip(self.steered, self.unsteered, strict=True))


def steered_samples(
    model: Any,
    sae: SAE[Any],
    expert: int,
    coefficient: float = 100.0,
    prompt: str = "Let's talk about ",
    n_samples: int = 10,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_p: float = 0.1,
    frequency_penalty: float = 1.0,
    seed: int = 0,
    mode: Mode = "add",
) -> SteeredSamples:
    """Samples continuations of a prompt with one expert steered at every position, and without.

    Both are written with the layer in the MLP's place, so that what differs is the steering's doing. The
    model's own `generate` samples them; the same seed gives the same texts.

    Args:
        model: any hooked model with a tokenizer.
        sae: the layer; attached by SAELens already, or put in its place for this.
        expert, coefficient, mode: as for `steer`.
        prompt: where the texts begin; BOS is put before it where the layer's training did.
        n_samples, max_new_tokens: how many texts, and how many tokens each at most.
        temperature, top_p, frequency_penalty: of the sampling.
        seed: of the sampling; PyTorch's own generators are left as they were.

    Raises:
        ValueError, IndexError, TypeError: as `steer`, or a setting of the sampling is out of range.
    """
    sampling = Sampling(prompt, n_samples, max_new_tokens, temperature, top_p, frequency_penalty, seed)
    return compare(model, sae, expert, coefficient, mode, sampling, written(model, sae, {}, mode, sampling))


def compare(
    model: Any,
    sae: SAE[Any],
    expert: int,
    coefficient: float,
    mode: Mode,
    sampling: Sampling,
    unsteered: list[list[int]],
) -> SteeredSamples:
    """Samples with one expert steered, and puts unsteered texts that are there already beside them."""
    steered = written(model, sae, {expert: coefficient}, mode, sampling)
    return SteeredSamples(
        model_name=model.cfg.model_name,
        hook_name_out=hook_names(sae)[1],
        expert=expert,
        coefficient=coefficient,
        mode=mode,
        sampling=sampling,
        steered=[model.tokenizer.decode(ids, skip_special_tokens=True) for ids in steered],
        unsteered=[model.tokenizer.decode(ids, skip_special_tokens=True) for ids in unsteered],
        steered_ids=steered,
        unsteered_ids=unsteered,
    )


def written(
    model: Any, sae: SAE[Any], experts: Mapping[int, float], mode: Mode, sampling: Sampling
) -> list[list[int]]:
    """The token ids of continuations with the layer in its place and some experts steered, or none."""
    with steer(model, sae, experts, mode):
        return sampling.continuations(model, prepend_bos=sae.cfg.metadata.prepend_bos is not False)


class Measured(NamedTuple):
    """Numbers about steered texts that need no judge."""

    perplexity: float
    """exp of the mean cross-entropy of the steered texts' tokens, under the model as it is without the
    layer."""
    perplexity_unsteered: float
    """That of the unsteered texts."""
    repetition: float
    """1 - different 3-grams / 3-grams, the mean over the steered texts that have any."""
    repetition_unsteered: float


def measure(model: Any, samples: SteeredSamples, perplexity_unsteered: float | None = None) -> Measured:
    """Perplexity and repetition of steered and unsteered texts.

    The unsteered texts of several experts are the same: their perplexity may be given.
    """
    if perplexity_unsteered is None:
        perplexity_unsteered = perplexity(model, samples.sampling.prompt, samples.unsteered_ids)
    return Measured(
        perplexity(model, samples.sampling.prompt, samples.steered_ids),
        perplexity_unsteered,
        repetition(samples.steered_ids),
        repetition(samples.unsteered_ids),
    )


@torch.no_grad()
def perplexity(model: Any, prompt: str, continuations: Sequence[Sequence[int]]) -> float:
    """exp of the mean cross-entropy, in nats, of all tokens of the continuations, given the prompt.

    NaN where there is none. The model is run as it is: a caller inside `steer` gets the steered one's.
    """
    begin = model.to_tokens(prompt)[0]
    by_length: dict[int, list[Sequence[int]]] = {}
    for ids in continuations:
        if ids:
            by_length.setdefault(len(ids), []).append(ids)
    losses = []
    for of_it in by_length.values():
        written = torch.tensor(of_it).to(begin)
        tokens = torch.cat([begin.expand(len(of_it), -1), written], dim=1)
        logits = model(tokens)[:, len(begin) - 1 : -1].float()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), written.to(logits.device).flatten(), reduction="none")
        )
    return torch.cat(losses).double().mean().exp().item() if losses else math.nan


def repetition(continuations: Sequence[Sequence[int]]) -> float:
    """The share of repeated 3-grams, the mean over texts long enough to have any; 0 without one."""
    shares = []
    for ids in continuations:
        ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
        if ngrams:
            shares.append(1 - len(set(ngrams)) / len(ngrams))
    return sum(shares) / len(shares) if shares else 0.0

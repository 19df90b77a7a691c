"""Who judges steered texts: by the language model's own measure, or another model behind an endpoint."""

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mxd_lens.evals.endpoint import ChatEndpoint
from mxd_lens.evals.steering import Measured, SteeredSamples


class Judgement(NamedTuple):
    """What a judge says of an expert's steered texts, taken together; both from 0 to 100."""

    concept: float
    """How clearly the texts share a concept."""
    fluency: float
    """How well they are language."""


class Judge(Protocol):
    """Whoever judges an expert's steered texts."""

    @property
    def name(self) -> str:
        """What the results call it."""
        ...

    def __call__(self, samples: SteeredSamples, measured: Measured) -> Judgement:
        """Judges one expert's texts, of which the numbers that need no judge are known."""
        ...


@dataclass(frozen=True)
class LocalJudge:
    """Judges by the language model's own measure, without a network.

    fluency = 100 (1 - r) min(1, p_0 / p): r is the share of repeated 3-grams in the steered texts, p
    their perplexity under the model as it is without the layer, p_0 that of the unsteered texts.

    concept = 100 m, m the mean of two margins, each clipped to [0, 1]: the mean similarity of two steered
    texts less that of a steered and an unsteered one. Similarity is 1 - the Jensen-Shannon divergence, in
    bits, of the texts' token distributions, and the cosine of their mean token embeddings, less the mean
    of all embeddings. Texts that the steering left as they were get 0, and so do texts that differ from
    each other as much as from those.

    It knows agreement and no meanings: one word repeated is a perfect concept. Read it beside the fluency.
    """

    model: Any
    name: str = "local"

    def __call__(self, samples: SteeredSamples, measured: Measured) -> Judgement:
        """Raises ValueError where there is only one text: nothing can agree with it."""
        if len(samples.steered_ids) < 2:
            raise ValueError("The local judge compares texts with each other: sample at least two.")
        steered = [ids for ids in samples.steered_ids if ids]
        unsteered = [ids for ids in samples.unsteered_ids if ids]
        if len(steered) < 2 or not unsteered:
            return Judgement(concept=0.0, fluency=0.0)
        margins = (
            margin(token_agreement(steered, steered), token_agreement(steered, unsteered)),
            margin(
                embedding_agreement(self.model, steered, steered),
                embedding_agreement(self.model, steered, unsteered),
            ),
        )
        likelihood = min(1.0, measured.perplexity_unsteered / measured.perplexity)
        return Judgement(
            concept=100 * sum(margins) / len(margins),
            fluency=100 * (1 - measured.repetition) * likelihood,
        )


def margin(within: Float[Tensor, "n n"], across: Float[Tensor, "n m"]) -> float:
    """The mean similarity of different texts of one kind less that of texts of two kinds, in [0, 1]."""
    n = len(within)
    between_different = (within.sum() - within.trace()) / (n * (n - 1))
    return (between_different - across.mean()).clamp(0, 1).item()


def token_agreement(one: list[list[int]], other: list[list[int]]) -> Float[Tensor, "n m"]:
    """1 - the Jensen-Shannon divergence, in bits, of the token distributions of every pair of texts."""
    used = {token: i for i, token in enumerate(sorted({token for ids in one + other for token in ids}))}
    p, q = (
        torch.stack(
            [
                torch.bincount(torch.tensor([used[token] for token in ids]), minlength=len(used)) / len(ids)
                for ids in texts
            ]
        ).double()
        for texts in (one, other)
    )
    p, q = p.unsqueeze(1), q.unsqueeze(0)
    mean = (p + q) / 2
    nats = (torch.xlogy(p, p) + torch.xlogy(q, q)) / 2 - torch.xlogy(mean, mean)
    return 1 - nats.sum(-1) / torch.tensor(2.0).log()


@torch.no_grad()
def embedding_agreement(model: Any, one: list[list[int]], other: list[list[int]]) -> Float[Tensor, "n m"]:
    """The cosine of the mean token embeddings of every pair of texts, less the mean of all embeddings."""
    mean = model.W_E.mean(0)
    p, q = (
        torch.stack([(model.W_E[ids] - mean).mean(0).double() for ids in texts]) for texts in (one, other)
    )
    return (F.normalize(p, dim=-1) @ F.normalize(q, dim=-1).T).cpu()


RUBRIC = """You are shown several short texts. A language model wrote all of them as continuations of the \
same opening, while one direction inside it was amplified. Judge the set as a whole, in two respects that \
have nothing to do with each other:

concept_coherence, 0 to 100: do the texts have one recognisable subject, style or kind of word in common, \
beyond what the opening itself calls for? 0: nothing in common. 50: some of them share something, or \
all share something vague. 100: one specific concept is unmistakable in nearly every text.

fluency, 0 to 100: would these pass for text that a person wrote? 0: repeated fragments, or strings \
without grammar. 50: understandable with frequent slips or loops. 100: grammatical and natural throughout.

Answer with a JSON object and nothing else: {"concept_coherence": <number>, "fluency": <number>}"""


class EndpointJudge(ChatEndpoint):
    """Asks a model behind an OpenAI-compatible endpoint to rate the texts by `RUBRIC`."""

    def __call__(self, samples: SteeredSamples, measured: Measured) -> Judgement:  # noqa: ARG002
        """Asks for one expert's texts.

        Raises:
            ValueError, ConnectionError: as `ChatEndpoint.ask`.
        """
        texts = "\n\n".join(f"Text {i}: {text}" for i, text in enumerate(samples.steered, start=1))
        opening = f"The opening: {samples.sampling.prompt}\n\n{texts}"
        return self.ask(RUBRIC, opening, parse_judgement, f"Judging expert {samples.expert}")


def parse_judgement(answer: str) -> Judgement:
    """The two numbers in a judge's answer; text around the JSON object is passed over.

    Raises:
        ValueError: there is no such object, or a number is missing or not from 0 to 100.
    """
    found = re.search(r"\{[^{}]*\}", answer or "")
    try:
        rating = json.loads(found[0]) if found else {}
        judgement = Judgement(concept=float(rating["concept_coherence"]), fluency=float(rating["fluency"]))
    except (ValueError, KeyError, TypeError):
        judgement = None
    if judgement is None or not all(0 <= number <= 100 for number in judgement):
        raise ValueError(
            "the judge was asked for concept_coherence and fluency, numbers from 0 to 100 in a JSON object, "
            f"and answered {(answer or '')[:300]!r}."
        )
    return judgement

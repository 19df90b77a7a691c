"""Three experts of the bundled MxD, described by hand, and the evidence: a page and a JSON file.

    python -m experiments.experts --text FOLDER --output FOLDER [--sequences 256]

FOLDER of --text holds WikiText-2's valid.txt and test.txt, as `experiments.wikitext` says; nltk must find the
Brown corpus. Both texts are held out from the MxD's training. How an expert's description was tested: a rule
says, without looking at the expert, at which tokens it should fire.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from experiments.wikitext import BOS, wikitext_sequences
from mxd_lens import ExpertStatistics, MxD, ablate, load_model, logit_lens, steer
from mxd_lens.analysis.decomposition import active_experts
from mxd_lens.analysis.firings import layer_input
from mxd_lens.analysis.weights import nearest_neurons, spectrum
from mxd_lens.artifacts.page import Section, write_page
from mxd_lens.artifacts.tables import Tabular
from mxd_lens.models import SMOLLM2
from mxd_lens.text import load_text, split_text, token_sequences

RELEASE, SAE_ID = "smollm2-135m-mxd", "blocks.11.mlp"
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"


@dataclass(frozen=True)
class Description:
    """What an expert is for, in words and as a rule."""

    expert: int
    title: str
    words: str
    rule: Callable[[str, str], bool]
    """Whether it should fire at a token, given the text before it and its own."""
    rule_in_words: str
    prompts: tuple[str, ...]
    """At the last token of each it should fire. None of them is from a text."""


DESCRIPTIONS = (
    Description(
        3245,
        "What one loses",
        "Fires at the possessive after a form of “to lose”, and makes the things that idiom lets one lose "
        "more likely: way, temper, mind, cool, faith. After other verbs of having and changing (change, "
        "earn, keep) it fires too, more weakly. It does not fire at “lost” itself: it waits until the "
        "object is due.",
        lambda before, token: (
            token.strip() in {"my", "your", "his", "her", "its", "our", "their"}
            and re.search(r"\b(lose|loses|lost|losing)\s*$", before) is not None
        ),
        "a possessive directly after lose, loses, lost or losing",
        (
            "Everyone shouted, and in the end he lost his",
            "She never lost her",
            "After the war the party lost its",
        ),
    ),
    Description(
        2802,
        "What one refuses to do",
        "Fires at “to” after “refuse”, and moves the prediction from the bare “do” to what people refuse to "
        "do: resign, leave, answer, say, pay, sign. All firings above 1.4 on these texts are of this kind; a "
        "long tail of weak ones lies at “will”.",
        lambda before, token: (
            token.strip() == "to" and re.search(r"\b[Rr]efus(e|es|ed|ing|al)\s*$", before) is not None
        ),
        "“to” directly after refuse, refuses, refused, refusing or refusal",
        (
            "The minister was asked to resign, but he refused to",
            "The witness refused to",
            "All through the strike the owners refused to",
        ),
    ),
    Description(
        763,
        "The day of the month",
        "Fires at the last digit of a day after a month's name, and makes the suffix that turns it into an "
        "ordinal more likely: “st” after 31, “nd” after 22, “th” after 29. It writes nearly the same each "
        "time (see the cosine below), so which suffix it becomes is settled by later layers, which know the "
        "digit.",
        lambda before, token: token.isdigit() and re.search(rf"({MONTHS})\s*[1-3]?\s*$", before) is not None,
        "a digit directly after a month's name, or after it and a first digit 1, 2 or 3",
        ("The pension year ended December 31", "She was born on May 22", "It rained on October 29"),
    ),
)


@dataclass
class Evidence:
    """What was measured about one expert."""

    expert: int
    n_tokens: int
    fires: int
    rule_holds: int
    both: int
    """Tokens at which it fires and the rule holds."""
    share_of_coefficients: float
    """Of the sum of its coefficients, what falls on tokens at which the rule holds."""
    of_the_strongest: int
    """Of its 20 largest coefficients, how many do."""
    contexts: list[tuple[float, str, str, str]]
    """Coefficient, text before, token, text after: the largest, one a sequence."""
    promoted: list[str]
    suppressed: list[str]
    """By the mean direction, through the unembedding."""
    effective_rank: float
    alike: float
    """Mean cosine of what it writes at two of its strongest firings."""
    neurons: list[tuple[int, float]]
    """The MLP's neurons that write in the most similar direction, and the cosine."""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """Next-token probabilities."""


class Firings:
    """Where an MxD's experts fire on some text."""

    def __init__(self, mxd: MxD, model: Any, tokens: Tensor) -> None:
        self.mxd, self.model, self.tokens = mxd, model, tokens
        self.statistics = ExpertStatistics.of(mxd)
        values, experts = [], []
        for batch in tokens.split(16):
            x = layer_input(model, mxd, batch)
            self.statistics.add(mxd, x[batch != BOS])
            v, ids = active_experts(mxd, x)
            values.append(v * (batch != BOS).unsqueeze(-1))
            experts.append(ids)
        self.values, self.experts = torch.cat(values), torch.cat(experts)
        self.texts = [[model.tokenizer.decode([t]) for t in row] for row in tokens.tolist()]

    def coefficients(self, expert: int) -> Tensor:
        """[sequences, positions]"""
        return (self.values * (self.experts == expert)).sum(-1)

    def rule(self, description: Description) -> Tensor:
        """[sequences, positions], a mask."""
        return torch.tensor(
            [
                [p > 0 and description.rule("".join(row[max(1, p - 8) : p]), row[p]) for p in range(len(row))]
                for row in self.texts
            ]
        )

    def written(self, expert: int, at: Tensor) -> Tensor:
        """[n, d_out], what a coefficient of 1 writes at the tokens at[n, 2]."""
        x = layer_input(self.model, self.mxd, self.tokens[at[:, 0]])[torch.arange(len(at)), at[:, 1]]
        return self.mxd.W_dec[expert] * (self.mxd.hidden(x) @ self.mxd.W_out)


def evidence(description: Description, firings: Firings) -> Evidence:
    """What there is to say for a description, and against it."""
    n, model = description.expert, firings.model
    a, holds = firings.coefficients(n), firings.rule(description)
    order = a.flatten().argsort(descending=True)[: int((a > 0).sum())]
    at = torch.stack([order // a.shape[1], order % a.shape[1]], dim=1)
    strongest = {sequence: (sequence, position) for sequence, position in reversed(at.tolist())}
    contexts = []
    for sequence, p in sorted(strongest.values(), key=lambda place: -a[place])[:8]:
        row = firings.texts[sequence]
        before, after = "".join(row[max(1, p - 12) : p]), "".join(row[p + 1 : p + 6])
        contexts.append((a[sequence, p].item(), before, row[p], after))
    written = torch.nn.functional.normalize(firings.written(n, at[:20]), dim=-1)
    cosines = written @ written.T
    lens = logit_lens(model, firings.statistics.mean_direction([n]), k=8)
    neurons = nearest_neurons(model, firings.mxd, firings.statistics, [n], k=3)
    result = Evidence(
        expert=n,
        n_tokens=int((firings.tokens != BOS).sum()),
        fires=len(order),
        rule_holds=int(holds.sum()),
        both=int(((a > 0) & holds).sum()),
        share_of_coefficients=((a * holds).sum() / a.sum()).item(),
        of_the_strongest=sum(bool(holds[s, p]) for s, p in at[:20].tolist()),
        contexts=contexts,
        promoted=lens.promoted[0],
        suppressed=lens.suppressed[0],
        effective_rank=spectrum(firings.mxd, [n], progress=False).effective_rank.item(),
        alike=((cosines.sum() - cosines.trace()) / (len(at[:20]) * (len(at[:20]) - 1))).item(),
        neurons=list(
            zip(neurons.neurons["output"][0].tolist(), neurons.cosines["output"][0].tolist(), strict=True)
        ),
    )
    strength = 2 * (a.sum() / (a > 0).sum()).item()
    result.prompts = [on_prompt(prompt, n, max(strength, 10.0), firings) for prompt in description.prompts]
    return result


def on_prompt(prompt: str, expert: int, added: float, firings: Firings) -> dict[str, Any]:
    """Next-token probabilities with the layer in its place, with the expert ablated, and with it raised."""
    model, mxd = firings.model, firings.mxd
    tokens = model.to_tokens(prompt)
    values, experts = active_experts(mxd, layer_input(model, mxd, tokens))
    changes = {
        "as it is": steer(model, mxd, {}),
        "without it": ablate(model, mxd, [expert]),
        f"raised by {added:.0f}": steer(model, mxd, {expert: added}, positions=[tokens.shape[1] - 1]),
    }
    logprobs = {}
    for name, change in changes.items():
        with change:
            logprobs[name] = model(tokens)[0, -1].log_softmax(-1)
    plain, without, raised = logprobs.values()
    gained = (plain.exp() * (plain - without)).topk(6).indices.tolist()
    likeliest = plain.topk(3).indices.tolist()
    return {
        "prompt": prompt,
        "coefficient": (values[0, -1] * (experts[0, -1] == expert)).sum().item(),
        "kl_without": (plain.exp() * (plain - without)).sum().item(),
        "kl_raised": (plain.exp() * (plain - raised)).sum().item(),
        "probabilities": {
            model.tokenizer.decode([t]): {name: p[t].exp().item() for name, p in logprobs.items()}
            for t in dict.fromkeys([*gained, *likeliest])
        },
    }


@dataclass(frozen=True)
class NextTokens(Tabular):
    """One prompt's probabilities."""

    prompt: dict[str, Any]

    @property
    def title(self) -> str:
        return (
            f"“{self.prompt['prompt']} …”: coefficient {self.prompt['coefficient']:.1f}; KL "
            f"{self.prompt['kl_without']:.3f} nats without it, {self.prompt['kl_raised']:.3f} with it raised"
        )

    @property
    def columns(self) -> list[str]:
        return ["next token", *next(iter(self.prompt["probabilities"].values()))]

    @property
    def rows(self) -> list[list[str]]:
        probabilities = self.prompt["probabilities"]
        return [[repr(t), *(f"{p:.3f}" for p in of_it.values())] for t, of_it in probabilities.items()]


def section(description: Description, found: Evidence) -> Section:
    """A section of the page."""
    contexts = "".join(
        f"<tr><td class='number'>{a:.1f}</td><td>{escape(before)}<mark>{escape(token)}</mark>{escape(after)}"
        "</td></tr>"
        for a, before, token, after in found.contexts
    )
    neurons = ", ".join(f"{n} ({cosine:+.2f})" for n, cosine in found.neurons)
    tables = "".join(
        f'<div style="margin: 1.4rem 0">{NextTokens(prompt)._repr_html_()}</div>' for prompt in found.prompts
    )
    promoted, suppressed = (", ".join(map(repr, words)) for words in (found.promoted, found.suppressed))
    body = f"""<p>Tested by a rule: {escape(description.rule_in_words)}. On {found.n_tokens:,} held-out tokens
the rule holds at {found.rule_holds:,}, and the expert fires at {found.both} of these and at
{found.fires - found.both} others; {found.share_of_coefficients:.0%} of its coefficients' sum and
{found.of_the_strongest} of its 20 largest lie where the rule holds.</p>
<table>{contexts}</table>
{tables}
<p>Through the unembedding, its mean direction promotes {escape(promoted)} and suppresses
{escape(suppressed)}. What it writes at two of its strongest firings has the cosine {found.alike:.2f} on
average; the effective rank of W_n is {found.effective_rank:.0f} of 576. The MLP's
neurons that write most like it: {neurons}.</p>"""
    return Section(f"Expert {found.expert}: {description.title}", description.words, (Markup(body),))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=256, help="of each text, at most")
    args = parser.parse_args()

    model = load_model(SMOLLM2)
    mxd = MxD.from_pretrained(RELEASE, SAE_ID, dtype="float32")
    _, brown = split_text(load_text("nltk:brown"))
    tokens = torch.cat(
        [
            wikitext_sequences(args.text, model.tokenizer)[: args.sequences],
            token_sequences(model, brown, args.sequences),
        ]
    )
    firings = Firings(mxd, model, tokens)
    found = [evidence(description, firings) for description in DESCRIPTIONS]
    args.output.mkdir(parents=True, exist_ok=True)
    written = json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False)
    (args.output / "experts.json").write_text(written + "\n", encoding="utf-8")
    write_page(
        args.output / "index.html",
        f"Three experts of {RELEASE}, {SAE_ID}",
        "Found by reading the texts at which experts fire most, and described by hand. The rules were "
        "written from the descriptions, the prompts are made up.",
        [section(*pair) for pair in zip(DESCRIPTIONS, found, strict=True)],
    )


if __name__ == "__main__":
    main()

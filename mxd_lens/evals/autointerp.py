"""Automatic interpretation: an expert is explained in words, and the words are put to the test.

    detection    given the explanation, which of some passages does the expert fire on?
    fuzzing      in which of some passages on which it fires are the right tokens marked?

Half of the answers should be yes, so that guessing gives a balanced accuracy of 0.5. An expert that a
word explains passes both; one whose explanation fits the passages and not the tokens, detection alone.
"""

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from sae_lens import SAE, logger
from torch import Tensor
from tqdm.auto import tqdm

from mxd_lens.artifacts.tables import Cell, Tabular
from mxd_lens.evals.endpoint import ChatEndpoint
from mxd_lens.evals.passages import MARKS, ExpertPassages, Passage, read_passages
from mxd_lens.training.runner import then_and_now

AUTOINTERP_FILENAME = "autointerp.jsonl"
ENOUGH = 4
"""Passages that an expert must fire on: two to explain it from, two to test on."""

Task = Literal["detection", "fuzzing"]


class Interpreter(Protocol):
    """Whoever explains experts, and says where an explanation applies."""

    @property
    def name(self) -> str:
        """What the results call it."""
        ...

    def explain(self, passages: Sequence[Passage]) -> str:
        """What the passages on which an expert fires have in common.

        Raises:
            ValueError: it gave no explanation.
        """
        ...

    def applies(self, explanation: str, texts: Sequence[str], task: Task) -> list[bool]:
        """Whether an explanation applies to each of some texts: in detection to the text, in fuzzing to what
        is marked in it by << and >>.

        Raises:
            ValueError: it gave no answer for each of them.
        """
        ...


# Interpreters


@dataclass(frozen=True)
class LocalInterpreter:
    """Explains an expert by the tokens it fires on, without a network.

    The explanation names the tokens that make up most of the firing in the passages; it applies where one
    of them is, or is marked. It knows words and no meanings: right for token lookups, and the least that
    another interpreter should do better than.
    """

    n_tokens: int = 5
    """How many tokens an explanation names, at most."""
    at_least: float = 0.1
    """Share of the firing that a token must have to be named; the one with most is in any case."""
    name: str = "local"

    def explain(self, passages: Sequence[Passage]) -> str:
        weights: defaultdict[str, float] = defaultdict(float)
        for passage in passages:
            for i in passage.strong:
                weights[passage.tokens[i]] += passage.coefficients[i] / passage.peak
        if not weights:
            raise ValueError("there is no passage on which the expert fires.")
        total = sum(weights.values())
        top = sorted(weights.items(), key=lambda item: (-item[1], item[0]))[: self.n_tokens]
        named = [token for token, weight in top if weight >= self.at_least * total] or [top[0][0]]
        return f"The tokens {json.dumps(named, ensure_ascii=False)}"

    def applies(self, explanation: str, texts: Sequence[str], task: Task) -> list[bool]:
        try:
            named = json.loads(explanation[explanation.index("[") :])
        except ValueError:
            raise ValueError(
                f"the local interpreter knows only its own explanations, not {explanation!r}."
            ) from None
        spans = [marked_spans(text) if task == "fuzzing" else [text] for text in texts]
        return [any(token in span for token in named for span in of) for of in spans]


def marked_spans(text: str) -> list[str]:
    """What stands between << and >> in a text."""
    return re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", text, flags=re.DOTALL)


EXPLAIN = """You are shown passages of text in which some tokens stand between << and >>: there, one unit \
of a language model was active. The passages are given in the order of how strongly, the strongest first. \
Say in one short sentence what the marked tokens, or the contexts they stand in, have in common: what makes \
the unit active, as specifically as all the passages allow. Do not list the passages, nor mention the marks.

Answer with a JSON object and nothing else: {"explanation": "<sentence>"}"""

DETECT = """You are given a description of when one unit of a language model is active, and numbered \
passages of text. For each passage, say whether it contains what the description describes: 1 if it does, 0 \
if not. About half do.

Answer with a JSON list of as many numbers as there are passages, in their order, and nothing else: [1, 0]"""

FUZZ = """You are given a description of when one unit of a language model is active, and numbered passages \
of text in which some tokens stand between << and >>. For each passage, say whether the marked tokens are \
those that the description describes: 1 if they are, 0 if other tokens are marked. About half are right.

Answer with a JSON list of as many numbers as there are passages, in their order, and nothing else: [1, 0]"""


@dataclass(frozen=True, repr=False)
class EndpointInterpreter(ChatEndpoint):
    """Asks a model behind an OpenAI-compatible endpoint."""

    at_once: int = 5
    """Passages in one question: many make answers in the right form harder."""

    def explain(self, passages: Sequence[Passage]) -> str:
        """Raises ValueError, ConnectionError as `ChatEndpoint.ask`."""
        question = numbered([passage.marked() for passage in passages])
        return self.ask(EXPLAIN, question, parse_explanation, "Explaining an expert")

    def applies(self, explanation: str, texts: Sequence[str], task: Task) -> list[bool]:
        """Raises ValueError, ConnectionError as `ChatEndpoint.ask`."""
        answers: list[bool] = []
        for first in range(0, len(texts), self.at_once):
            part = texts[first : first + self.at_once]
            answers += self.ask(
                DETECT if task == "detection" else FUZZ,
                f"The description: {explanation}\n\n{numbered(part)}",
                partial(parse_answers, n=len(part)),
                f"Scoring an explanation by {task}",
            )
        return answers


def numbered(texts: Sequence[str]) -> str:
    return "\n\n".join(f"Passage {i}: {text}" for i, text in enumerate(texts, start=1))


def parse_explanation(answer: str) -> str:
    """The explanation in an interpreter's answer; text around the JSON object is passed over.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"\{.*\}", answer or "", flags=re.DOTALL)
    try:
        explanation = json.loads(found[0])["explanation"] if found else None
    except (ValueError, KeyError, TypeError):
        explanation = None
    if not isinstance(explanation, str) or not explanation.strip():
        raise ValueError(
            'the interpreter was asked for {"explanation": "<sentence>"} and answered '
            f"{(answer or '')[:300]!r}."
        )
    return explanation.strip()


def parse_answers(answer: str, n: int) -> list[bool]:
    """The n answers of 0 or 1 in an interpreter's answer; text around the JSON list is passed over.

    Raises:
        ValueError: there is no such list, or it is of another length.
    """
    found = re.search(r"\[[^\[\]]*\]", answer or "")
    try:
        answers = json.loads(found[0]) if found else None
    except ValueError:
        answers = None
    if not isinstance(answers, list) or len(answers) != n or any(a not in (0, 1) for a in answers):
        raise ValueError(
            f"the interpreter was asked for a list of {n} numbers, each 0 or 1, and answered "
            f"{(answer or '')[:300]!r}."
        )
    return [bool(a) for a in answers]


# Scores


@dataclass(frozen=True)
class Trial:
    """One passage put to the interpreter."""

    tokens: list[str]
    coefficients: list[float]
    text: str
    """What it was shown."""
    truth: bool
    """Whether the expert fires on it, or the right tokens are marked."""
    answer: bool | None
    """What the interpreter said; None where it gave no answer that could be read."""


@dataclass(frozen=True)
class Interpretation:
    """What became of one expert."""

    expert: int
    n_firing: int
    """Passages of the text on which it fires."""
    explanation: str
    """Empty where there is none."""
    detection: list[Trial]
    fuzzing: list[Trial]
    failure: str
    """Why there is no explanation, or no score; empty where nothing went wrong."""

    def accuracy(self, task: Task) -> float:
        """The balanced accuracy over the trials that were answered: the mean of the shares of right answers
        among those that are true and among those that are not. NaN where one of the two is missing."""
        rights: dict[bool, list[bool]] = {True: [], False: []}
        for trial in self.trials(task):
            if trial.answer is not None:
                rights[trial.truth].append(trial.answer == trial.truth)
        return mean(mean(r) for r in rights.values()) if all(rights.values()) else math.nan

    def trials(self, task: Task) -> list[Trial]:
        return self.detection if task == "detection" else self.fuzzing

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Interpretation":
        known = json.loads(line)
        return cls(**known | {t: [Trial(**trial) for trial in known[t]] for t in ("detection", "fuzzing")})


@dataclass
class Autointerp(Tabular):
    """What `autointerp` found."""

    settings: dict[str, Any]
    """The layer, the text and the interpreter."""
    interpretations: list[Interpretation]

    def save(self, path: str | Path) -> None:
        """Writes it as JSON lines: the settings, then an interpretation a line. An older file is exchanged in
        one step."""
        path = Path(path)
        partial = path.with_name(f".{path.name}")
        lines = [json.dumps(self.settings), *(i.to_json() for i in self.interpretations)]
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Autointerp":
        """Reads what `save` wrote; a last line that was not written to its end is left out."""
        settings, *lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
        return cls(json.loads(settings), [Interpretation.from_json(line) for line in lines])

    @property
    def title(self) -> str:
        s = self.settings
        return f"{s['architecture']} at {s['hook_name']}, explained by {s['interpreter']}"

    @property
    def columns(self) -> list[str]:
        return ["expert", "detection", "fuzzing", "explanation"]

    @property
    def rows(self) -> list[list[Cell]]:
        tasks: tuple[Task, ...] = ("detection", "fuzzing")
        rows: list[list[Cell]] = [
            [str(i.expert), *(_shown(i.accuracy(task)) for task in tasks), i.explanation or f"– {i.failure}"]
            for i in self.interpretations
        ]
        n_scored = sum(not i.failure for i in self.interpretations)
        return [*rows, ["mean", *(_shown(self.mean(task)) for task in tasks), f"{n_scored} experts scored"]]

    def mean(self, task: Task) -> float:
        """The mean balanced accuracy over the experts that have one; NaN without any."""
        known = self.accuracies(task)
        return mean(known) if known else math.nan

    def accuracies(self, task: Task) -> list[float]:
        """The balanced accuracy of each expert that has one."""
        found = [i.accuracy(task) for i in self.interpretations]
        return [a for a in found if not math.isnan(a)]


def _shown(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.2f}"


def autointerp(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequences positions"],
    output: str | Path,
    experts: int | Sequence[int] = 20,
    interpreter: Interpreter | None = None,
    length: int = 32,
    n_explain: int = 20,
    n_test: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> Autointerp:
    """Explains experts in words, and scores the explanations by detection and fuzzing.

    Results are written after every expert; the same call goes on where an earlier one stopped. An expert
    that fires too rarely, or for which the interpreter gives no answer that can be read, stays without a
    score and says why. An interpreter that cannot be reached stops the run.

    Args:
        sae, model, tokens, batch_size, progress: as for `evaluate`.
        output: a folder, for autointerp.jsonl.
        experts: how many, drawn at random; or which.
        interpreter: who explains and scores. Default: `LocalInterpreter()`.
        length, n_explain, n_test, seed: see `read_passages`.

    Raises:
        IndexError: there is no such expert.
        ValueError: `output` holds results of other settings, or as `read_passages`.
        ConnectionError: the interpreter's endpoint refused, or cannot be reached.
    """
    interpreter = interpreter or LocalInterpreter()
    settings = {
        "model_name": model.cfg.model_name,
        "architecture": sae.cfg.architecture(),
        "hook_name": sae.cfg.metadata.hook_name,
        "d_sae": sae.cfg.d_sae,
        "interpreter": interpreter.name,
        "sequences": list(tokens.shape),
        "length": length,
        "n_explain": n_explain,
        "n_test": n_test,
        "seed": seed,
    }
    path = Path(output) / AUTOINTERP_FILENAME
    path.parent.mkdir(parents=True, exist_ok=True)
    result = _resumed(path, settings) if path.is_file() else Autointerp(settings, [])
    result.save(path)
    done = {i.expert for i in result.interpretations}
    todo = [n for n in _chosen(sae, experts, seed) if n not in done]
    if not todo:
        return result
    passages = read_passages(sae, model, tokens, todo, length, n_explain, n_test, seed, batch_size, progress)
    for of in tqdm(passages, desc="Interpreting", disable=not progress):
        interpretation = interpret(interpreter, of, seed)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(interpretation.to_json() + "\n")
        result.interpretations.append(interpretation)
    return result


def interpret(interpreter: Interpreter, passages: ExpertPassages, seed: int = 0) -> Interpretation:
    """Explains one expert and scores the explanation.

    Raises:
        ConnectionError: the interpreter cannot be reached.
    """
    explanation, problems = "", []
    trials: dict[Task, list[Trial]] = {"detection": [], "fuzzing": []}
    if passages.n_firing < ENOUGH:
        problems.append(f"it fires on {passages.n_firing} passages, and {ENOUGH} are needed")
    else:
        try:
            explanation = interpreter.explain(passages.explain)
        except ValueError as e:
            problems.append(f"no explanation: {e}")
    if explanation:
        asked: dict[Task, list[tuple[Passage, str, bool]]] = {
            "detection": _to_detect(passages),
            "fuzzing": _to_fuzz(passages, seed),
        }
        for task, questions in asked.items():
            random.Random(seed).shuffle(questions)
            answers: Sequence[bool | None]
            try:
                answers = interpreter.applies(explanation, [text for _, text, _ in questions], task)
                if len(answers) != len(questions):
                    raise ValueError(f"{len(answers)} answers to {len(questions)} questions.")
            except ValueError as e:
                problems.append(f"no {task}: {e}")
                answers = [None] * len(questions)
            trials[task] = [
                Trial(passage.tokens, passage.coefficients, text, truth, answer)
                for (passage, text, truth), answer in zip(questions, answers, strict=True)
            ]
    for problem in problems:
        logger.warning("Expert %d: %s", passages.expert, problem)
    return Interpretation(
        passages.expert, passages.n_firing, explanation, **trials, failure="; ".join(problems)
    )


def _to_detect(passages: ExpertPassages) -> list[tuple[Passage, str, bool]]:
    return [(p, p.text, p.fires) for p in (*passages.test, *passages.silent)]


def _to_fuzz(passages: ExpertPassages, seed: int) -> list[tuple[Passage, str, bool]]:
    """The test's passages, every second one with as many tokens marked on which the expert is silent."""
    rng = random.Random(seed)

    def questions() -> Iterator[tuple[Passage, str, bool]]:
        for i, passage in enumerate(passages.test):
            if i % 2 == 0:
                yield passage, passage.marked(), True
            elif passage.silent:
                n = min(len(passage.strong), len(passage.silent))
                yield passage, passage.marked(rng.sample(passage.silent, n)), False

    return list(questions())


def _chosen(sae: SAE[Any], experts: int | Sequence[int], seed: int) -> list[int]:
    if not isinstance(experts, int):
        return list(dict.fromkeys(int(n) for n in experts))
    if experts < 1:
        raise ValueError(f"experts must be at least 1, or a list of them, got {experts}.")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(sae.cfg.d_sae, generator=generator)[:experts].tolist()


def _resumed(path: Path, settings: dict[str, Any]) -> Autointerp:
    known = Autointerp.load(path)
    if changed := then_and_now(known.settings, settings, list(settings)):
        raise ValueError(f"{path} holds other interpretations. {'; '.join(changed)}. Name another folder.")
    return known

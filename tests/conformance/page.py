"""docs/conformance.md, made of what the tests found."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

CLASSES = ("HookedTransformer", "bridge")
VERBS = (
    "train on pairs",
    "SAELens' attach",
    "`replacement_hooks`",
    "`evaluate`",
    "`steer`",
    "`ablate`",
    "`top_experts`",
    "`expert_statistics`",
    "`direct_effects`",
    "dashboard",
)
LOAD = "loading"
EXACT = "exact"
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
WRITE = "MXD_LENS_WRITE_CONFORMANCE"
"""Set it to write the page; without it the page is compared with what was found."""

INTRODUCTION = """# Where it is exact

This page says on which language models the results are exact. Ten functions were run on tiny random models
of twenty families, and compared with PyTorch's forward hooks on transformers' own modules. "Exact" means
equal to these within float32 rounding. Where a function cannot be exact, it raises an error before it gives a
number.

The ten functions are {verbs}.

The models were written by transformers and loaded by `load_model`. They have two blocks, and random weights,
norms and biases. The tests are in `tests/conformance`, and this page is generated from their results:
`{write}=1 pytest tests/conformance` writes it anew.
"""
FAMILIES_HEADING = """
## Model families

Which functions are exact on which family? "All" means the ten above. Families that HookedTransformer cannot
load are loaded as a bridge.

| family | HookedTransformer | bridge |
|---|---|---|
"""
STATES_HEADING = """
## States of a model

Which functions are exact on a model in each of these states? The model is a Llama; "all" means those that
apply. Reduced precision is compared with transformers in the same precision, within its rounding.

| state | HookedTransformer | bridge |
|---|---|---|
"""
REFUSALS_HEADING = """
## What the errors say

What does each error say, and where is it raised? MODEL is the model's name.

| where | error |
|---|---|
"""


@dataclass(frozen=True)
class Cell:
    row: str
    """A family, or a state."""
    class_name: str
    verb: str


@dataclass
class Outcomes:
    """What came out of each cell: EXACT, or the sentence it was refused with."""

    rows: tuple[str, ...]
    found: dict[Cell, str] = field(default_factory=dict)

    def add(self, cell: Cell, outcome: str) -> None:
        assert "\n" not in outcome, outcome
        assert len(outcome) < 600, outcome
        self.found[cell] = re.sub(r"(/[\w.-]+)+/([\w.-]+)", r"\2", outcome)  # no folder of this machine

    def line(self, row: str) -> str:
        """A row of the table."""
        return f"| {row} | " + " | ".join(self._summary(row, name) for name in CLASSES) + " |\n"

    def _summary(self, row: str, class_name: str) -> str:
        of = {c.verb: o for c, o in self.found.items() if (c.row, c.class_name) == (row, class_name)}
        if not of:
            return "does not apply"
        refused = [verb for verb, outcome in of.items() if outcome != EXACT]
        if LOAD in refused:
            return "refused when loaded"
        if len(refused) == len(of):
            return "all refused"
        return "all" if not refused else f"all but {', '.join(refused)}"

    def refusals(self) -> dict[str, dict[str, list[str]]]:
        """By error: which functions raise it, by model."""
        where: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for cell, outcome in self.found.items():
            if outcome != EXACT:
                text = re.sub(rf"(?<!\w){cell.row.replace(' ', '-')}(?!\w)", "MODEL", outcome)
                text = re.sub(r"\w+ForCausalLM", "MODELForCausalLM", text).replace("|", "\\|")
                where[text][f"{cell.row} ({cell.class_name})"].append(cell.verb)
        return where

    def is_complete(self) -> bool:
        return {cell.row for cell in self.found} == set(self.rows)


def check(families: Outcomes, states: Outcomes) -> None:
    """Compares the page with what was found, as far as it was; or writes it."""
    whole = families.is_complete() and states.is_complete()
    if os.environ.get(WRITE) and whole:
        PAGE.write_text(page(families, states), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    for outcomes in (families, states):
        for row in {cell.row for cell in outcomes.found}:
            assert outcomes.line(row) in text
    if whole:
        assert text == page(families, states)


def page(families: Outcomes, states: Outcomes) -> str:
    refusals: dict[str, list[str]] = defaultdict(list)
    for outcomes in (families, states):
        for text, by_model in outcomes.refusals().items():
            refusals[text] += [f"{model}: {', '.join(verbs)}" for model, verbs in by_model.items()]
    return (
        INTRODUCTION.format(verbs=", ".join(VERBS), write=WRITE)
        + FAMILIES_HEADING
        + "".join(map(families.line, families.rows))
        + STATES_HEADING
        + "".join(map(states.line, states.rows))
        + REFUSALS_HEADING
        + "".join(f"| {'; '.join(where)} | {text} |\n" for text, where in refusals.items())
    )

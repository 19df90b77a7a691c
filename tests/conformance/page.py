"""docs/conformance.md, made of what the tests found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

CLASSES = ("HookedTransformer", "bridge")
VERBS = (
    "train on pairs",
    "SAELens' attach",
    "replacement_hooks",
    "evaluate",
    "steer",
    "ablate",
    "top_experts",
    "expert_statistics",
    "direct_effects",
    "dashboard",
)
EXACT = "exact"
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


@dataclass(frozen=True)
class Cell:
    family: str
    class_name: str
    verb: str | None
    """None: loading the model."""


@dataclass
class Outcomes:
    """What came out of each cell: EXACT, or the sentence it was refused with."""

    KEY: ClassVar[pytest.StashKey] = pytest.StashKey()
    found: dict[Cell, str] = field(default_factory=dict)

    def add(self, cell: Cell, outcome: str) -> None:
        # A refusal is one paragraph for a person, and names no private path.
        assert "\n" not in outcome and len(outcome) < 600, outcome
        self.found[cell] = outcome

    def check_page(self, config: pytest.Config) -> None:
        for c, o in self.found.items():
            if o != EXACT:
                print(c, o)

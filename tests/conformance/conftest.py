"""Models made once, and what was found on them, for all tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from families import FAMILIES, Reference, save_family
from page import Outcomes
from states import STATES


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Reference]]:
    """A family's folder, and its reference in float32."""
    known: dict[str, tuple[Path, Reference]] = {}

    def make(name: str) -> tuple[Path, Reference]:
        if name not in known:
            folder = save_family(FAMILIES[name], tmp_path_factory.mktemp("family") / name.replace(" ", "-"))
            known[name] = folder, Reference(FAMILIES[name], folder)
        return known[name]

    return make


@pytest.fixture(scope="session")
def families() -> Outcomes:
    return Outcomes(tuple(FAMILIES))


@pytest.fixture(scope="session")
def states() -> Outcomes:
    return Outcomes(tuple(STATES))

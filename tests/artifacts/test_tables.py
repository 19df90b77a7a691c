"""What prints as a table does so by Python's own print too."""

from collections.abc import Iterator
from dataclasses import dataclass

from mxd_lens import list_pretrained
from mxd_lens.artifacts.tables import Cell, Tabular


@dataclass(frozen=True)
class Counts(Tabular):
    counts: dict[str, int]

    @property
    def title(self) -> str:
        return "How many [bold]there are[/bold]"

    @property
    def columns(self) -> list[str]:
        return ["what", "how many"]

    @property
    def rows(self) -> Iterator[list[Cell]]:
        yield from ([name, n] for name, n in self.counts.items())


def test_a_table_is_printed_as_one():
    printed = str(Counts({"experts": 5888, "[red]": 3}))
    assert "[bold]there" in printed
    assert "experts      5888" in printed
    assert "[red]           3" in printed
    assert "\x1b" not in printed


def test_its_repr_stays_that_of_its_values():
    assert repr(Counts({"experts": 5})) == "Counts(counts={'experts': 5})"


def test_pretrained_layers_are_a_list_and_print_as_a_table():
    layers = list_pretrained()
    assert isinstance(layers, list)
    assert "Pretrained layers" in str(layers)
    assert "PretrainedLayer(" in repr(layers)

"""The tutorials run from top to bottom, and are kept as they ran."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000
"""Bytes of a notebook's file."""

spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_seven_notebooks_are_there_in_order():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{n}_" for n in range(1, 8)]
    assert runner.notebooks() == NOTEBOOKS


@each_notebook
def test_a_notebook_is_kept_as_it_ran(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert path.stat().st_size < LARGEST


@each_notebook
def test_a_notebook_names_no_folder_of_a_machine(path: Path):
    notebook = nbformat.read(path, as_version=4)
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    found = re.findall(r"(?:/home|/root|/tmp|/work|/Users|C:\\\\Users)\b[^\s\"]*", nbformat.writes(notebook))
    assert not found


@each_notebook
def test_a_notebook_is_a_lesson(path: Path):
    """It opens with its question and a picture, and ends with two exercises and where to go next."""
    cells = nbformat.read(path, as_version=4).cells
    assert "**Question.**" in cells[0].source
    third = cells[: max(2, -(-len(cells) // 3))]
    shown = [output for cell in third for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert pictures or any("![" in cell.source for cell in third)
    assert re.search(r"## Exercises\n\n1\. .+\n2\. .+\n\n## Where to go next", cells[-1].source)


@each_notebook
def test_links_between_notebooks_lead_somewhere(path: Path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target


@pytest.mark.slow
@pytest.mark.real_model
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its kernel runs this package, wherever the tests were started from."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    ran = runner.execute(path, renderer="json")
    for now, kept in zip(ran.cells, nbformat.read(path, as_version=4).cells, strict=True):
        if now.cell_type == "code":
            # Progress bars and warnings, which are streams, differ by machine.
            kinds = [
                [output.output_type for output in cell.outputs if output.output_type != "stream"]
                for cell in (now, kept)
            ]
            assert kinds[0] == kinds[1], now.source


@pytest.mark.real_model
def test_an_error_in_a_cell_is_one(tmp_path: Path):
    path = tmp_path / "wrong.ipynb"
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        runner.execute(path, renderer="json")

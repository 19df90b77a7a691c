"""README.md and docs/ are true: their code runs, their commands exist, their numbers are those measured."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from markdown_it import MarkdownIt

import mxd_lens
from docs import measured
from mxd_lens import models, text
from mxd_lens.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*measured.pages(), ROOT / "CONTRIBUTING.md"]
markdown = MarkdownIt("commonmark", {"html": True})

# Every page loads the same model and the same text.
load_model_once = cache(models.load_model)
documentation = text.python_documentation
python_documentation_once = cache(lambda: list(documentation()))


class Block(NamedTuple):
    """A block of code in a page."""

    language: str
    code: str
    line: int
    comment: str
    """The HTML comment right above it, without its marks."""

    @property
    def runs(self) -> bool:
        return self.language == "python" and not self.comment.startswith("not run:")

    @property
    def tested(self) -> str:
        """The code with what `tested with: A -> B; C -> D` says in its place."""
        code = self.code
        if self.comment.startswith("tested with:"):
            for change in self.comment.removeprefix("tested with:").split(";"):
                old, new = (part.strip() for part in change.split("->"))
                assert old in code, f"line {self.line} replaces {old}, which is not there."
                code = code.replace(old, new)
        return code


def blocks(page: Path) -> Iterator[Block]:
    comment = ""
    for token in markdown.parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            yield Block(token.info.strip(), token.content, (token.map or [0])[0] + 1, comment)
        comment = ""
        if token.type == "html_block":
            comment = token.content.strip().removeprefix("<!--").removesuffix("-->").strip()


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runnable() -> Iterator[object]:
    for page in PAGES:
        code = "".join(block.code for block in blocks(page) if block.runs)
        if code:
            marks = [pytest.mark.real_model, pytest.mark.slow] if models.SMOLLM2 in code else []
            yield pytest.param(page, id=page_id(page), marks=marks)


@pytest.mark.parametrize("page", list(runnable()))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Its blocks one after the other, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", load_model_once)
    monkeypatch.setattr(text, "python_documentation", python_documentation_once)
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        if block.runs:
            # The line numbers of a traceback are those of the page.
            exec(compile("\n" * block.line + block.tested, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_is_of_a_known_kind(page):
    """So that none escapes the tests by its name, or by its indentation."""
    for block in blocks(page):
        assert block.language in ("python", "sh", "markdown", "text", "bibtex"), f"line {block.line}"
        assert not block.comment.startswith("not run") or block.comment.removeprefix("not run:").strip()
    kinds = [token.type for token in markdown.parse(page.read_text(encoding="utf-8"))]
    assert "code_block" not in kinds, "code is fenced, with its language"


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, comments and continuation lines considered."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


def shell_commands() -> Iterator[object]:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                for words in commands(block.code):
                    yield pytest.param(words, id=f"{page_id(page)}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(shell_commands()))
def test_a_shell_command_exists(words):
    check_command(words)


def check_command(words: list[str]) -> None:
    """Raises where a command, a sub-command, an option, a module or a make target does not exist."""
    program, *arguments = words
    if program == "mxd-lens":
        check_options(typer.main.get_command(app), arguments)
    elif program == "make":
        assert re.search(rf"^{re.escape(arguments[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
            words
        )
    elif (
        program == "python"
        and arguments[:1] == ["-m"]
        and arguments[1].startswith(("benchmarks.", "experiments."))
    ):
        source = (ROOT / f"{arguments[1].replace('.', '/')}.py").read_text()
        for option in (word for word in arguments if word.startswith("--")):
            assert f'"{option}"' in source, words
    else:
        assert program in ("python", "pip", "."), f"nobody checks {program}"


def check_options(command: Any, arguments: list[str]) -> None:
    """Compares sub-command, options and operands with what typer knows; nothing is run or opened."""
    if hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        check_options(command.commands[arguments[0]], arguments[1:])
        return
    options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
    given, operands = set(), 0
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            operands += 1
        elif word not in ("-h", "--help"):
            assert name in options, f"there is no option {name}"
            given.add(options[name].name)
            if not equals and not options[name].is_flag:
                next(words)
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            operands -= 1 if parameter.nargs == 1 else operands
            assert operands >= 0, f"{parameter.name} is missing"
        else:
            assert not parameter.required or parameter.name in given, f"{parameter.opts[0]} is missing"
    assert operands == 0, "there are more operands than arguments"


@pytest.mark.parametrize(
    "line",
    [
        "mxd-lens trian out",
        "mxd-lens train out --layerz 3",
        "mxd-lens train out another",
        "mxd-lens compare page.html a b --prompt x",
        "mxd-lens steer a",
        "make coffee",
        "python -m experiments.frontier --x",
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises((KeyError, AssertionError)):
        check_command(shlex.split(line))


MARK = "<!-- {layer12.normalized_mse:.3f} -->"
REPORT = json.loads((ROOT / "results" / "smollm2-135m-layer12" / "report.json").read_text())
MEASURED = f"{REPORT['normalized_mse']:.3f}"


def test_the_numbers_are_those_measured():
    assert list(measured.problems()) == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (f"error {MARK}9.999<!-- -->", f"is {MEASURED}, the page says 9.999"),
        (f"error {MARK}{MEASURED}", "no value or no end"),
        (f"error\n{MARK}{MEASURED}<!-- -->", "a line begins with a mark"),
        ("an error of 0.225 was measured", "not read from results/"),
        ("62 % of them", "not read from results/"),
        ("| MxD | 0.225 |", "not read from results/"),
    ],
)
def test_a_wrong_number_is_found(page, problem, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    assert any(problem in found for found in measured.problems())


@pytest.mark.parametrize(
    "page",
    [
        f"error {MARK}{MEASURED}<!-- -->",
        "Python 3.10 and arXiv 2505.21364, [a link](v1.5.html)",
        "`lr=4e-3`, `0.5`, $0.5 x$",
        "```python\nx = 0.5\n```",
        "2,048 tokens, K 32",
    ],
)
def test_what_is_no_measured_number_is_let_through(page, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    assert list(measured.problems()) == []


def test_numbers_are_written_into_the_marks():
    assert measured.updated(f"is {MARK}old<!-- -->.") == f"is {MARK}{MEASURED}<!-- -->."
    written = measured.updated("<!-- {tables.errors12} --><!-- -->")
    assert "\n\n| K | transcoder |" in written
    assert measured.updated(written) == written


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_id
)
def test_the_links_of_pages_outside_docs_lead_somewhere(page):
    """mkdocs checks those inside."""
    tokens = [child for token in markdown.parse(page.read_text()) for child in token.children or []]
    links = [token.attrs.get("href") or token.attrs.get("src") for token in tokens if token.attrs]
    for link in map(str, links):
        if not link.startswith("https://"):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_every_public_name_is_on_an_api_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)
    for name in mxd_lens.__all__:
        module = getattr(mxd_lens, name).__module__
        assert any(module == known or module.startswith(f"{known}.") for known in documented), name


def test_the_versions_of_the_project_agree():
    for file, pattern in (("pyproject.toml", r'^version = "(.*)"'), ("CITATION.cff", r"^version: (.*)")):
        found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
        assert found is not None
        assert found[1] == mxd_lens.__version__, file

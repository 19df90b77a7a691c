"""The fields of the config classes, read from their source.

`mxd-lens train` has an option for every field of `TranscoderRunnerConfig`, of SAELens' `LoggingConfig` and of
the layers' configs. simple-parsing makes such options of a class, and a class has to be imported first:
SAELens takes seconds, which neither --help nor a mistyped option should wait for. So the source is parsed,
which takes milliseconds. A test compares what is found with `dataclasses.fields`.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from docstring_parser import DocstringStyle, parse

COMPUTED = object()
"""The default of a field that is not a literal in the source."""


@dataclass(frozen=True)
class ConfigField:
    """A field of a config class."""

    name: str
    type: str
    """As written in the source, without `| None`."""
    default: Any
    """`COMPUTED` if the source has no literal."""
    optional: bool
    """Whether None is allowed."""
    help: str


def fields_of(class_name: str, *files: Path) -> dict[str, ConfigField]:
    """The fields of a dataclass with those that it inherits, the parents' first.

    Args:
        class_name: the class.
        files: where it and its parents are defined; a parent defined elsewhere is left out.
    """
    classes = {name: node for file in files for name, node in _classes(file).items()}
    found: dict[str, ConfigField] = {}
    for name in _bases_first(class_name, classes):
        for own in _own_fields(classes[name]):
            inherited = found.get(own.name)
            found[own.name] = replace(own, help=own.help or inherited.help) if inherited else own
    return found


def architecture_names(*files: Path) -> dict[str, str]:
    """The training config's class by the architecture's name, for every architecture that can be trained."""
    classes = {name: node for file in files for name, node in _classes(file).items()}
    found = {}
    for name, node in classes.items():
        if f"Training{name}" not in classes:
            continue
        for method in ast.walk(node):
            if isinstance(method, ast.FunctionDef) and method.name == "architecture":
                returned = next(s.value for s in ast.walk(method) if isinstance(s, ast.Return))
                if isinstance(returned, ast.Constant):
                    found[str(returned.value)] = f"Training{name}"
    return found


def package_file(package: str, *parts: str) -> Path:
    """A file of a package, found without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed.")
    return Path(spec.submodule_search_locations[0], *parts)


@cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _bases_first(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    for base in classes[name].bases:
        written = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(written, ast.Name) and written.id in classes:
            yield from _bases_first(written.id, classes)
    yield name


def _own_fields(node: ast.ClassDef) -> Iterator[ConfigField]:
    documented = parse(ast.get_docstring(node) or "", DocstringStyle.GOOGLE)
    helps = {param.arg_name: " ".join((param.description or "").split()) for param in documented.params}
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        written = ast.unparse(statement.annotation)
        if written.startswith("ClassVar"):
            continue
        name = statement.target.id
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            helps[name] = " ".join(str(after.value.value).split())
        kinds = [kind for kind in written.split(" | ") if kind != "None"]
        yield ConfigField(
            name=name,
            type=" | ".join(kinds),
            default=_literal(statement.value),
            optional="None" in written.split(" | "),
            help=helps.get(name, ""),
        )


def _literal(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=...), and SAELens' own functions that call it
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return COMPUTED if value is None else ast.literal_eval(value)
    except ValueError:
        return COMPUTED

"""Imports point downwards, as CONTRIBUTING.md draws it, and the name of every module says what is in it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mxd_lens

PACKAGE = Path(mxd_lens.__file__).parent
ROOT = Path(__file__).parents[1]


def lint_imports(pyproject: Path, package: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed")
    return subprocess.run(
        [program, "--no-cache", "--no-logo", pyproject],
        cwd=package.parent,
        capture_output=True,
        text=True,
    )


def test_imports_point_downwards():
    found = lint_imports(ROOT / "pyproject.toml", PACKAGE)
    assert found.returncode == 0, found.stdout


def test_an_upward_import_inside_a_function_is_found(tmp_path):
    copy = tmp_path / "mxd_lens"
    shutil.copytree(PACKAGE, copy, ignore=lambda folder, names: [n for n in names if n == "weights"])
    with (copy / "hooks" / "replace.py").open("a") as file:
        file.write("\n\ndef f():\n    from mxd_lens.evals import frontier\n\n    return frontier\n")
    found = lint_imports(ROOT / "pyproject.toml", copy)
    assert "mxd_lens.hooks.replace -> mxd_lens.evals.frontier" in found.stdout
    assert found.returncode == 1


def test_no_module_has_a_name_that_says_nothing():
    named = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not named & {"utils", "util", "helpers", "helper", "common", "misc", "tools"}

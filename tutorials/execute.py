"""Runs the notebooks and keeps what they show: `python tutorials/execute.py [NUMBER ...]`."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
SECONDS_A_CELL = 3600
"""A cell takes at most a minute or two on an idle machine; a busy one is no error."""
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def notebooks() -> list[Path]:
    """The tutorials, in order."""
    return sorted(FOLDER.glob("[0-9]_*.ipynb"))


def execute(path: Path, renderer: str) -> NotebookNode:
    """The notebook, run in a new kernel in its own folder; logs and warnings are left out.

    Args:
        path: the notebook. It is read, and not written.
        renderer: plotly's: "png" keeps pictures, which needs `pip install 'mxd-lens[png]'`; "json" the
            figures' data.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    os.environ.update(QUIET, PLOTLY_RENDERER=renderer)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(numbers: list[str]) -> None:
    for path in notebooks():
        if not numbers or path.name[0] in numbers:
            nbformat.write(execute(path, "png"), path)


if __name__ == "__main__":
    main(sys.argv[1:])

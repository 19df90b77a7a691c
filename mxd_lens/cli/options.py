"""The options that commands share, each checked as it is read: before anything heavy is imported."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

STDOUT = Path("-")
MOST_NUMBERS = 10_000
"""How many numbers a list such as 0-199 may name."""


def integers(text: str, least: int = 0) -> list[int]:
    """The numbers in "1,2,7-9" or "0-29:3" (every third), both ends included, each once.

    Raises:
        ValueError: it is not such a list, it names a number below `least`, or more than `MOST_NUMBERS`.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,18})(?:-(\d{1,18})(?::(\d{1,18}))?)?\s*", part)
        if match is None:
            raise ValueError(f"{text!r} is not a list of numbers. Write 3,17 or 3-17 or 0-29:3.")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise ValueError(f"{part!r} is an empty range. Write the smaller number first, as 3-17.")
        if first < least:
            raise ValueError(f"{first} is below {least}.")
        numbers = range(first, last + 1, step)
        if len(found) + len(numbers) > MOST_NUMBERS:
            raise ValueError(f"{text!r} names more than {MOST_NUMBERS:,} numbers.")
        found |= dict.fromkeys(numbers)
    return list(found)


def checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A callback that lets `check` look at an option's value; its ValueError or OSError names the option."""

    def callback(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except (ValueError, OSError) as e:
            raise typer.BadParameter(message_of(e)) from e

    return callback


def message_of(error: Exception) -> str:
    """An error's message, without the number that the operating system gives it."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    return str(error)


def one_of(*known: str) -> Callable[[str], str]:
    """A check that a value is one of `known`."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}.")
        return value

    return check


def is_list_of_integers(least: int = 0, *words: str) -> Callable[[str], str]:
    """A check that a value is a list that `integers` reads, or one of some words; empty is the default."""

    def check(value: str) -> str:
        if value and value not in words:
            integers(value, least)
        return value

    return check


def is_finite(value: float) -> float:
    """Checks that a number is neither infinite nor NaN."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number.")
    return value


def is_text(source: str) -> str:
    """Checks what can be checked of a text's name without reading it."""
    if not source:
        raise ValueError("The text has no name. Give embedded, nltk:NAME, a path or a data set on the hub.")
    path = Path(source).expanduser()
    if (re.match(r"[./~\\]", source) or source.endswith((".txt", ".md"))) and not path.exists():
        raise ValueError(f"There is no text at {source}.")
    return source


def is_device(name: str) -> str:
    """Checks a device's name, and that this machine has it."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError(f"{name!r} is not a device. Use auto, cpu, cuda, cuda:1 or mps.")
    if name.startswith("cuda"):
        import torch

        wanted, found = int(name.partition(":")[2] or 0), torch.cuda.device_count()
        if not torch.cuda.is_available() or wanted >= found:
            raise ValueError(f"torch finds {found} CUDA devices here. Use --device auto or --device cpu.")
    if name == "mps":
        import torch

        if not torch.backends.mps.is_available():
            raise ValueError("torch finds no MPS device here. Use --device auto or --device cpu.")
    return name


def best_device(name: str) -> str:
    """The device itself, or for auto the best that torch finds here: cuda, mps or cpu."""
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def is_model(name: str) -> str:
    """Checks what can be checked of a model's name without loading anything."""
    path = Path(name).expanduser()
    is_path = re.match(r"[./~\\]", name) or path.is_dir()
    if is_path and not (path / "config.json").is_file():
        raise ValueError(f"{name} is not a Hugging Face model folder: it has no config.json.")
    return name


def is_file_to_write(path: Path) -> Path:
    """Checks that a file can be written at `path`."""
    path = path.expanduser()
    if path == STDOUT:
        return path
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}. Create it, or name another file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written. Name another file.")
    return path


def is_folder_to_write(path: Path) -> Path:
    """Checks that a folder can be made at `path`, or written to if it exists."""
    path = path.expanduser()
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file. Name a folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{existing} cannot be written. Name another folder.")
    return path


DTYPES = ("float32", "bfloat16")


def is_training_dtype(name: str) -> str:
    """Checks the dtype of a layer in training."""
    if name == "float16":
        raise ValueError(
            "float16 is not for training: Adam's epsilon is zero there, and the weights would be NaN after "
            "one step. Train in float32 or bfloat16."
        )
    return one_of(*DTYPES)(name)


Model = Annotated[
    str,
    typer.Option(
        help="The language model: a TransformerLens name, a Hugging Face folder, or smollm2-135m-instruct "
        "(offline).",
        callback=checked(is_model),
    ),
]
ItsModel = Annotated[
    str | None,
    typer.Option(
        help="The language model. Default: the one that the layer was trained on.",
        callback=checked(is_model),
    ),
]
Bridge = Annotated[bool, typer.Option("--bridge", help="Load the language model as SAETransformerBridge.")]
Device = Annotated[
    str,
    typer.Option(
        help="auto (CUDA or MPS if there is one), cpu, cuda, cuda:1, mps.", callback=checked(is_device)
    ),
]
Text = Annotated[
    str,
    typer.Option(
        help="The text: embedded (Python's documentation), nltk:NAME, a text file or folder, or a data set "
        "on the Hugging Face hub.",
        callback=checked(is_text),
    ),
]
Sequences = Annotated[int, typer.Option(help="Sequences of the text to read.", min=1)]
Skip = Annotated[int, typer.Option(help="Rows of the text to skip first.", min=0)]
HeldOut = Annotated[
    bool,
    typer.Option("--held-out", help="Use only the rows that `train --hold-out` and the demo leave out."),
]
Json = Annotated[
    Path | None,
    typer.Option(
        help="Also write the result to this file as JSON; - prints the JSON in place of the tables.",
        allow_dash=True,
        callback=checked(is_file_to_write),
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(help="Also write a page about the result to this file.", callback=checked(is_file_to_write)),
]


def output_folder(help: str) -> Any:
    """The option --output of a command that writes a folder."""
    return typer.Option("--output", "-o", help=help, callback=checked(is_folder_to_write))


def output_file(help: str) -> Any:
    """The option --output of a command that writes a file."""
    return typer.Option("--output", "-o", help=help, callback=checked(is_file_to_write))

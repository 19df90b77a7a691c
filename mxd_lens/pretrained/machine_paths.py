"""What is published says what was used, not where it lay on the machine."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

V = TypeVar("V")

START = r"(?:file:/+|[A-Za-z]:[\\/]|\\\\|~[\\/]|/(?=[\w.~]))"
WHOLE = re.compile(START)
"""A text that begins as a path is one, spaces included."""
WITHIN = re.compile(rf"(?<![\w.:/\\~<]){START}[^\s'\"`,;()<>|*?]*")
"""A path in the middle of a text ends where the word does."""

WHERE_NOT_WHAT = (
    "output_path",
    "checkpoint_path",
    "cached_activations_path",
    "resume_from_checkpoint",
    "from_pretrained_path",
)
"""Settings of a runner that say nothing but where files lay."""


def without_machine_paths(value: V) -> V:
    """The same JSON value with every absolute path cut to its last name, and without WHERE_NOT_WHAT."""
    cleaned: Any = value
    if isinstance(value, str):
        cleaned = _last_name(value) if WHOLE.match(value) else WITHIN.sub(lambda m: _last_name(m[0]), value)
    elif isinstance(value, Mapping):
        cleaned = {
            without_machine_paths(name): without_machine_paths(item)
            for name, item in value.items()
            if name not in WHERE_NOT_WHAT
        }
    elif isinstance(value, list | tuple):
        cleaned = [without_machine_paths(item) for item in value]
    return cleaned


def _last_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]

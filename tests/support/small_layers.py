"""What a configuration of any registered architecture needs beyond the widths that all have."""

from typing import Any

SIZES = {"d_hidden": 6, "rank": 2}


def sizes_of(config: type[Any]) -> dict[str, int]:
    """Small values for the fields of `config` that count something of its own."""
    return {field: n for field, n in SIZES.items() if field in config.__dataclass_fields__}

"""What a configuration of any registered architecture needs beyond the widths that all have."""

from typing import Any

SIZES = {"d_hidden": 6, "rank": 2, "l0_coefficient": 1e-3}


def sizes_of(config: type[Any]) -> dict[str, Any]:
    """Small values for the fields that `config` has of its own; no k where thresholds take its place."""
    fields = config.__dataclass_fields__
    no_k: dict[str, Any] = {"k": None} if fields["k"].default is None else {}
    if no_k and "l1_coefficient" in fields and "l0_coefficient" not in fields:
        no_k["l1_coefficient"] = 1e-3
    return {field: n for field, n in SIZES.items() if field in fields} | no_k

"""Settings that make any architecture's configuration valid."""

from typing import Any


def fitting(config: type[Any], **settings: Any) -> dict[str, Any]:
    """`settings` as a configuration class takes them, with what else it needs."""
    fields = config.__dataclass_fields__
    if fields["k"].default is None:  # thresholds or plain relu decide how many are active
        settings["k"] = None
    if "l0_coefficient" in fields:
        settings.setdefault("l0_coefficient", 1e-3)
    elif "l1_coefficient" in fields and settings["k"] is None:
        settings.setdefault("l1_coefficient", 1e-3)
    if "d_hidden" in fields:
        settings.setdefault("d_hidden", 6)
    return settings

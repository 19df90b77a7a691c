"""What decides a job's results, so that a job resumed, or results reused, are those of the same run.

Every job that resumes or reuses results keeps a `RunIdentity` beside them: training, many layers, the
activation cache, the frontier, dashboards, statistics, steering scores, probing.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


@dataclass(frozen=True)
class RunIdentity:
    """The weights, tokens and settings that decide the results of a job, hashed whole.

    identity = RunIdentity.of(model=model, layers=sae, tokens=tokens, batch_size=8)
    RunIdentity.from_dict(saved).require(identity, folder)
    """

    fields: dict[str, Any]
    """By name: hashes and settings, as JSON takes them."""

    @classmethod
    def of(
        cls,
        *,
        model: nn.Module | None = None,
        layers: nn.Module | Mapping[str, nn.Module] | None = None,
        tokens: Tensor | Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> "RunIdentity":
        """Return the identity of a job.

        Args:
            model: the language model; all its weights count, those of layers attached to it do not.
            layers: the layer, or several by name: their architecture, all weights, configuration.
            tokens: the token ids, or several by name.
            settings: whatever else decides the results, as JSON takes it.
        """
        fields: dict[str, Any] = {}
        if model is not None:
            name = getattr(getattr(model, "cfg", None), "model_name", type(model).__name__)
            fields["model"] = {"name": name, "weights": hash_weights(model)}
        if layers is not None:
            several = layers if isinstance(layers, Mapping) else {"": layers}
            identities = {name: layer_identity(layer) for name, layer in several.items()}
            fields["layer"] = identities.get("", identities)
        if tokens is not None:
            fields["tokens"] = (
                hash_tensors({"": tokens})
                if isinstance(tokens, Tensor)
                else {name: hash_tensors({"": ids}) for name, ids in tokens.items()}
            )
        return cls(as_json(fields | settings))

    def differences(self, now: "RunIdentity", ignore: Iterable[str] = ()) -> list[str]:
        """Return one line for each field that is not the same in `now`; see the function `differences`."""
        return differences(self.fields, now.fields, ignore)

    def require(self, now: "RunIdentity", where: str | Path, ignore: Iterable[str] = ()) -> None:
        """Raise ValueError where `now` is another run than this one, whose results are at `where`."""
        if changed := self.differences(now, ignore):
            more = f"; and {len(changed) - 8} more" if len(changed) > 8 else ""
            raise ValueError(
                f"{where} holds the results of another run ({'; '.join(changed[:8])}{more}). Choose another "
                "place, or delete it."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, as JSON takes it."""
        return self.fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunIdentity":
        """Return the identity that `to_dict` gave."""
        return cls(dict(fields))

    @property
    def hash(self) -> str:
        """One hash of all fields."""
        return hash_settings(self.fields)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Return one line for each field that differs: "settings.lr: 0.1 then, 0.2 now".

    Args:
        then: the fields of the earlier run. Mappings in them are compared field by field.
        now: those of this one.
        ignore: names of fields, with the dots before them, that may differ.
    """
    old, new = _flat(as_json(then)), _flat(as_json(now))
    absent = "not set"
    return [
        f"{name}: {_shown(old, name, absent)} then, {_shown(new, name, absent)} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
        and not any(name == other or name.startswith(f"{other}.") for other in ignore)
    ]


def layer_identity(layer: nn.Module) -> dict[str, Any]:
    """Return what decides a layer's output: architecture, size, weights."""
    cfg: Any = getattr(layer, "cfg", None)
    architecture = cfg.architecture() if hasattr(cfg, "architecture") else type(layer).__name__
    settings = cfg.to_dict() if hasattr(cfg, "to_dict") else {}
    kept = {name: value for name, value in settings.items() if name not in ("metadata", "device")}
    return {"architecture": architecture, "settings": hash_settings(kept), "weights": hash_weights(layer)}


def hash_weights(module: nn.Module) -> str:
    """Return a hash of all parameters of a module, their names, shapes and dtypes.

    Where SAELens attaches a layer it puts it in the place of a hook point: what lies below one is left out.
    """
    return hash_tensors(
        {
            name: parameter
            for name, parameter in module.named_parameters()
            if not any(part.startswith("hook_") for part in name.split(".")[:-1])
        }
    )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of all values of tensors, their names, shapes and dtypes. The device does not count."""
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.numel():
            hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def hash_settings(settings: Any) -> str:
    """Return a hash of anything that JSON takes."""
    return xxhash.xxh3_128_hexdigest(json.dumps(as_json(settings), sort_keys=True).encode())


def as_json(value: Any) -> Any:
    """Return `value` as JSON gives it back: tuples are lists, paths and dtypes text."""
    return json.loads(json.dumps(value, default=str))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(fields: Mapping[str, Any], name: str, absent: str) -> str:
    text = repr(fields[name]) if name in fields else absent
    return text if len(text) <= 100 else f"{text[:97]}..."

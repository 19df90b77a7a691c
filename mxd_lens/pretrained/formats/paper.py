"""The checkpoint files of the paper's own code, github.com/james-oldfield/MxD: read, checked, converted.

One class there is switched by its config; which of the classes here it is:

| use_conditional | use_skip | is_transcoder | here |
|---|---|---|---|
| yes | no | yes | `MxD`, gated with use_glu |
| yes | yes | yes | `SkipMxD`, gated with use_glu |
| no | no | yes | `TopKTranscoder` |
| no | yes | yes | `TopKSkipTranscoder` |
| no | no | no | SAELens' `TopKSAE`, or `StandardSAE` without topk |

Which of its weights is which of ours, transposed where it says T:

| there | MxD | transcoder, SAE |
|---|---|---|
| gate, gate_bias | W_enc T, b_enc | |
| W_cond | W_dec T | |
| W_enc, b_enc | W_hidden, b_hidden; gated: W_hidden_gate, b_hidden_gate | W_enc, b_enc |
| W_glu.weight, W_glu.bias | W_hidden T, b_hidden | |
| W_dec | W_out | W_dec |
| W_skip.weight | W_skip | W_skip |
| b_dec_out | b_dec | b_dec, of a transcoder |
| b_dec | not used by a transcoder | b_dec, of an SAE |
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str, str_to_dtype
from safetensors.torch import save_file
from torch import Tensor

from mxd_lens.architectures import (
    MxD,
    MxDConfig,
    SkipMxD,
    SkipMxDConfig,
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)
from mxd_lens.architectures.mxd import HIDDEN_ACTIVATIONS
from mxd_lens.architectures.saved import few
from mxd_lens.artifacts.files import atomic_folder
from mxd_lens.pretrained.formats.checkpoint_file import (
    DESCRIBED_MODULE,
    Described,
    UnreadableCheckpointError,
    read_checkpoint_file,
    shown,
)

ReferenceLayer: TypeAlias = MxD | SkipMxD | TopKTranscoder | TopKSkipTranscoder | TopKSAE | StandardSAE

CONFIG_CLASS = f"{DESCRIBED_MODULE}.LanguageModelSAERunnerConfig"
SUFFIXES = (".pkl.gz", ".pkl", ".pt")
SPARSITY_SUFFIX = "_log_feature_sparsity.pt"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
L = TypeVar("L", bound=SAE[Any])

RMS_NORM = re.compile("llama|gemma|mi[sx]tral|qwen|olmo-2|phi-3|yi-|smollm", re.IGNORECASE)
"""Models whose norms are RMS norms, by their names."""

MAX_SETTINGS = 10_000
"""Values in a config, those inside lists and dictionaries included; the paper's has about 70."""
MAX_DEPTH = 20
MAX_PROBLEMS = 30
"""In one message; a layer has at most 11 weights."""


def load_reference_checkpoint(
    path: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> ReferenceLayer:
    """A layer from a checkpoint file of the paper's code; see this module for which class it becomes.

    The file is read as data: nothing in it runs, and the paper's code is not needed. Its config goes to
    `cfg.metadata`: model_name, hook_name, hook_name_out, context_size, dataset_path, prepend_bos, and
    everything else that JSON can hold as `reference_config`. The paper's code hooks a model as
    HookedTransformer.from_pretrained processes it: norms folded, and what the MLP writes centred, so that
    its mean over d_out is zero. `metadata.weight_processing` records it, and the layer is refused on another.

    Args:
        path: a `.pt` (torch's zip format, which is mapped rather than read, or its legacy one), `.pkl` or
            `.pkl.gz` file.
        device: where to put the layer.
        dtype: its dtype. None: that of the file's weights.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableCheckpointError: a ValueError. The file is damaged, hostile or another's; its weights are
            not finite floating point numbers; they and the config contradict each other; or the config is
            of a layer that no class here computes. One message lists all that is wrong.
    """
    return _load(Path(path), device, dtype)


def load_reference_checkpoint_with_sparsity(
    path: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> tuple[ReferenceLayer, Float[Tensor, " d_sae"] | None]:
    """As `load_reference_checkpoint`, and log10 of how often each expert is active.

    The paper's code writes it beside the checkpoint, as `..._log_feature_sparsity.pt`; None where that file
    is missing. SAELens has the same in its `from_pretrained_with_cfg_and_sparsity`.

    Raises:
        UnreadableCheckpointError: also where the sparsity file cannot be read, or is of another layer.
    """
    path = Path(path)
    layer = _load(path, device, dtype)
    sparsity_path = path.with_name(_without_suffix(path.name) + SPARSITY_SUFFIX)
    if not sparsity_path.exists():
        return layer, None
    stored = read_checkpoint_file(sparsity_path)
    shape = (layer.cfg.d_sae,)
    if not isinstance(stored, Tensor) or stored.shape != shape:
        got = tuple(stored.shape) if isinstance(stored, Tensor) else shown(stored)
        raise UnreadableCheckpointError(f"{sparsity_path} should hold a tensor of shape {shape}, got {got}.")
    if problems := _weight_problems({"the sparsity": stored}, torch.float32):
        raise UnreadableCheckpointError(f"{sparsity_path} cannot be used: {'; '.join(problems)}.")
    return layer, stored.to(torch.float32, copy=True)


def convert(
    path: str | Path, folder: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> ReferenceLayer:
    """Writes a checkpoint file of the paper's code as a folder that SAELens reads, and returns the layer.

    The folder gets cfg.json, sae_weights.safetensors and, where the sparsity is known, sparsity.safetensors.

    Args:
        path, device, dtype: as in `load_reference_checkpoint`.
        folder: where to write. It is made where needed.

    Raises:
        FileExistsError: the folder is a file, or holds something; nothing is overwritten.
        FileNotFoundError, UnreadableCheckpointError: as in `load_reference_checkpoint_with_sparsity`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder, and nothing is overwritten: name another.")
    layer, sparsity = load_reference_checkpoint_with_sparsity(path, device, dtype)
    with atomic_folder(folder) as partial:
        layer.save_model(partial)
        if sparsity is not None:
            save_file({"sparsity": sparsity}, partial / SPARSITY_FILENAME)
    return layer


def _without_suffix(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _load(path: Path, device: str, dtype: str | torch.dtype | None) -> ReferenceLayer:
    asked = str_to_dtype(dtype) if dtype is not None else None
    if asked not in (None, *DTYPES):
        raise ValueError(f"dtype must be a floating point one, as float32, got {dtype}.")
    checkpoint = read_checkpoint_file(path)
    try:
        settings, weights = _parts(checkpoint)
        reference = ReferenceConfig.from_settings(settings)
        target = asked or _common_dtype(weights)
        expected = reference.shapes()
        right = {name: weight for name, weight in weights.items() if weight.shape == expected.get(name)}
        _raise(reference.contradictions(weights) + _weight_problems(right, target), "cannot be used")
        metadata = reference.metadata(settings)
    except UnreadableCheckpointError as e:
        raise UnreadableCheckpointError(f"{path} {e}") from None
    common = {"dtype": dtype_to_str(target), "device": device, "metadata": metadata}
    return reference.layer(common, Weights(weights, torch.device(device), target))


def _raise(problems: list[str], what: str) -> None:
    if problems:
        raise UnreadableCheckpointError(f"{what}: {few(problems, MAX_PROBLEMS)}.")


def _parts(checkpoint: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config's settings and the tensors of a checkpoint."""
    what = "is no checkpoint of the paper's code"
    if type(checkpoint) is not dict or checkpoint.keys() != {"cfg", "state_dict"}:
        raise UnreadableCheckpointError(f"{what}: that is a dictionary of cfg and state_dict.")
    config, weights = checkpoint["cfg"], checkpoint["state_dict"]
    if not isinstance(config, Described) or type(config).__name__ != CONFIG_CLASS.rpartition(".")[2]:
        raise UnreadableCheckpointError(f"{what}: its cfg is {shown(config)}, not a {CONFIG_CLASS}.")
    if not isinstance(weights, dict):
        raise UnreadableCheckpointError(f"{what}: its state_dict is {shown(weights)}.")
    _raise(
        [
            f"{shown(name)} is {shown(weight)}"
            for name, weight in weights.items()
            if type(name) is not str or not isinstance(weight, Tensor)
        ],
        "cannot be used: every weight should be a tensor with a name",
    )
    return {name: value for name, value in vars(config).items() if name != "args"}, weights


def _common_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The paper's code keeps some weights in float32 whatever its config says: the dtype that holds all."""
    floating = [weight.dtype for weight in weights.values() if weight.dtype in DTYPES]
    return functools.reduce(torch.promote_types, floating or [torch.float32])


def _weight_problems(weights: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """What is wrong with weights that does not depend on the config.

    Args:
        weights: the weights by name.
        dtype: what they will be converted to.
    """
    problems = []
    for name, weight in weights.items():
        if weight.dtype not in DTYPES:
            problems.append(f"{shown(name)} is of {weight.dtype}, a weight is a floating point number")
            continue
        if (
            weight.layout != torch.strided
            or weight.device.type != "cpu"
            or not (weight.is_contiguous() or weight.T.is_contiguous())
        ):
            problems.append(f"{shown(name)} has gaps, overlaps or no numbers")
            continue
        largest = torch.stack(weight.aminmax()).abs().max()
        if not largest.isfinite():
            problems.append(f"{shown(name)} has values that are not finite")
        elif largest > torch.finfo(dtype).max:
            problems.append(f"{shown(name)} has values up to {largest:.3g}, too large for {dtype}")
    return problems


class Weights:
    """The weights of a checkpoint, one at a time, in the dtype and on the device asked for."""

    def __init__(self, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.stored = stored
        self.device = device
        self.dtype = dtype
        self.given: set[int] = set()

    def take(self, name: str, transposed: bool = False) -> Tensor:
        """A weight or its transpose, contiguous; it stays mapped to the file if nothing has to change."""
        weight = self.stored[name].T if transposed else self.stored[name]
        # Weights that were tied at the start share their storage still: theirs is no longer one.
        storage = weight.untyped_storage().data_ptr()
        is_shared = storage in self.given
        self.given.add(storage)
        return weight.to(self.device, self.dtype, copy=is_shared).contiguous()


@dataclass(kw_only=True)
class ReferenceConfig:
    """The settings of the paper's config that say what the layer computes, under their names there."""

    use_conditional: bool
    use_glu: bool
    use_skip: bool
    is_transcoder: bool
    topk: int
    mlp_activation_fn: str
    d_in: int
    d_sae: int
    d_out: int
    n_experts: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ReferenceConfig":
        """Raises UnreadableCheckpointError where a setting is missing or impossible, or no class here
        computes the layer."""
        known: dict[str, Any] = {name: settings.get(name) for name in cls.__dataclass_fields__}
        if known["d_out"] is None or known["is_transcoder"] is False:
            known["d_out"] = known["d_in"]
        if known["use_conditional"] is False:
            known["n_experts"] = known["d_sae"]
        _raise(list(_impossible(known, settings)), "cannot be used, its config is not valid")
        config = cls(**known)
        _raise(list(config.without_class()), "is of a layer that no class here computes")
        return config

    def without_class(self) -> Iterator[str]:
        """The combinations of settings that no class here computes."""
        if self.use_conditional and not self.is_transcoder:
            yield "use_conditional without is_transcoder, an MxD of its own input"
        if self.use_skip and not self.is_transcoder:
            yield "use_skip without is_transcoder, a skip connection that the paper's code does not use"
        if self.use_glu and not self.use_conditional:
            yield "use_glu without use_conditional, features that are gated linear units"
        if self.mlp_activation_fn != "relu" and not self.use_conditional:
            yield (
                f"mlp_activation_fn = {shown(self.mlp_activation_fn)} without use_conditional, features "
                "with another activation than relu"
            )

    @property
    def width(self) -> int:
        """Number of experts, or features."""
        return self.n_experts if self.use_conditional else self.d_sae

    @property
    def k(self) -> int | None:
        return None if self.topk < 0 else self.topk

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights that the settings ask for, and their shapes."""
        d_in, d_sae, d_out, n_experts = self.d_in, self.d_sae, self.d_out, self.n_experts
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_out),
            "b_dec": (d_in,),
        }
        if self.is_transcoder:
            shapes |= {"b_dec_out": (d_out,)}
        if self.use_conditional:
            shapes |= {"gate": (n_experts, d_in), "gate_bias": (n_experts,), "W_cond": (d_out, n_experts)}
        if self.use_glu:
            shapes |= {"W_glu.weight": (d_sae, d_in), "W_glu.bias": (d_sae,)}
        if self.use_skip:
            shapes |= {"W_skip.weight": (d_out, d_in)}
        return shapes

    def contradictions(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Where the config and the weights say different things."""
        expected = self.shapes()
        return [
            f"{shown(name)}: the config says {expected.get(name, 'nothing')}, "
            f"the weights {tuple(weights[name].shape) if name in weights else 'nothing'}"
            for name in [*expected, *sorted(weights.keys() - expected)]
            if name not in weights or expected.get(name) != weights[name].shape
        ]

    def metadata(self, settings: Mapping[str, Any]) -> SAEMetadata:
        """What the settings say about the layer's place in the model, and all else that JSON can hold."""
        rest = _json_settings(settings)
        known: dict[str, Any] = {
            "model_name": rest.pop("model_name"),
            "hook_name": rest.pop("hook_point"),
            "context_size": rest.pop("context_size", None),
            "dataset_path": rest.pop("dataset_path", None),
            "prepend_bos": True,
            # As HookedTransformer.from_pretrained processes the model: RMS norms leave nothing to centre.
            "weight_processing": ["fold_ln"]
            + ["center_writing_weights"] * (not RMS_NORM.search(str(settings.get("model_name")))),
        }
        if self.is_transcoder:
            known["hook_name_out"] = rest.pop("out_hook_point")
        return SAEMetadata(**known, reference_config=rest)

    def layer(self, common: dict[str, Any], weights: Weights) -> ReferenceLayer:
        """The layer with these weights.

        Args:
            common: dtype, device and metadata of its config.
            weights: the file's, checked.
        """
        common = {"d_in": self.d_in, "d_sae": self.width, **common}
        if not self.is_transcoder:
            if self.k is None:
                return _filled(StandardSAE, StandardSAEConfig(**common), self.sae_weights(weights))
            return _filled(TopKSAE, TopKSAEConfig(k=self.k, **common), self.sae_weights(weights))
        common |= {"d_out": self.d_out, "k": self.k}
        if not self.use_conditional:
            ours = self.transcoder_weights(weights)
            if self.use_skip:
                return _filled(TopKSkipTranscoder, TopKSkipTranscoderConfig(**common), ours)
            return _filled(TopKTranscoder, TopKTranscoderConfig(**common), ours)
        common |= {"d_hidden": self.d_sae, "gated": self.use_glu}
        common |= {"hidden_activation": self.mlp_activation_fn}
        ours = self.mxd_weights(weights)
        if self.use_skip:
            return _filled(SkipMxD, SkipMxDConfig(**common), ours)
        return _filled(MxD, MxDConfig(**common), ours)

    def sae_weights(self, weights: Weights) -> dict[str, Tensor]:
        return {name: weights.take(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def transcoder_weights(self, weights: Weights) -> dict[str, Tensor]:
        return {
            "W_enc": weights.take("W_enc", transposed=True).T,  # stored column by column, as here
            "b_enc": weights.take("b_enc"),
            "W_dec": weights.take("W_dec"),
            "b_dec": weights.take("b_dec_out"),
        } | self.skip_weights(weights)

    def mxd_weights(self, weights: Weights) -> dict[str, Tensor]:
        branch = "W_hidden_gate" if self.use_glu else "W_hidden"
        ours = {
            "W_enc": weights.take("gate").T,
            "b_enc": weights.take("gate_bias"),
            "W_dec": weights.take("W_cond", transposed=True),
            "b_dec": weights.take("b_dec_out"),
            branch: weights.take("W_enc"),
            branch.replace("W", "b", 1): weights.take("b_enc"),
            "W_out": weights.take("W_dec"),
        }
        if self.use_glu:
            ours["W_hidden"] = weights.take("W_glu.weight", transposed=True)
            ours["b_hidden"] = weights.take("W_glu.bias")
        return ours | self.skip_weights(weights)

    def skip_weights(self, weights: Weights) -> dict[str, Tensor]:
        return {"W_skip": weights.take("W_skip.weight")} if self.use_skip else {}


def _filled(layer_class: type[L], config: Any, weights: dict[str, Tensor]) -> L:
    """The layer made of these weights, not of copies."""
    device, config.device = config.device, "meta"
    layer = layer_class(config)
    layer.process_state_dict_for_loading(weights)
    layer.load_state_dict(weights, assign=True)
    return layer.to(dtype=layer.dtype, device=device)


def _impossible(known: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are missing, of another type, or out of range.

    Args:
        known: those of `ReferenceConfig`.
        settings: all.
    """
    for name in ("use_conditional", "use_glu", "use_skip", "is_transcoder"):
        if type(known[name]) is not bool:
            yield f"{name} should be True or False, got {shown(known[name])}"
    widths = ("d_in", "d_sae", "d_out", "n_experts")
    for name in widths:
        if type(known[name]) is not int or known[name] < 1:
            yield f"{name} should be a positive integer, got {shown(known[name])}"
    topk, width = known["topk"], known["n_experts"]
    if type(topk) is not int or topk == 0 or (type(width) is int and topk > width > 0):
        yield (
            f"topk should be negative, for none, or from 1 to the number of experts or features, "
            f"{shown(width)}, got {shown(topk)}"
        )
    activation = known["mlp_activation_fn"]
    if type(activation) is not str or activation not in HIDDEN_ACTIVATIONS:
        yield f"mlp_activation_fn should be one of {sorted(HIDDEN_ACTIVATIONS)}, got {shown(activation)}"
    names = ["model_name", "hook_point"] + ["out_hook_point"] * (known["is_transcoder"] is True)
    for name in names:
        if type(settings.get(name)) is not str:
            yield f"{name} should be a name, got {shown(settings.get(name))}"


def _json_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that JSON can hold; tuples become lists, a torch.dtype its name.

    Raises:
        UnreadableCheckpointError: they are nested too deeply, or too many.
    """
    left = MAX_SETTINGS

    def as_json(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise UnreadableCheckpointError("has a config of more, or deeper, settings than a config has.")
        if isinstance(value, torch.dtype | torch.device):
            return str(value).removeprefix("torch.")
        if value is None or isinstance(value, str | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, list | tuple):
            return [as_json(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {str(name): as_json(item, depth + 1) for name, item in value.items()}
        if isinstance(value, Described) and vars(value).keys() == {"args"} and len(value.args) == 1:
            return as_json(value.args[0], depth + 1)  # a member of an Enum
        raise TypeError(f"JSON cannot hold {shown(value)}")

    held: dict[str, Any] = {}
    for name, value in settings.items():
        with suppress(TypeError):
            held[str(name)] = as_json(value, 0)
    return held

"""Checkpoints of Dunefsky's transcoder_circuits: a `.pt`, `.pkl` or `.pkl.gz` with cfg and state_dict.

    a = relu((x - b_dec) W_enc + b_enc)    y = a W_dec + b_dec_out

b_dec is folded into b_enc here. The paper's code grew out of this one: its files have the same names, and a
`use_conditional` in their configuration. The GPT-2 transcoders read ln2.hook_normalized of a model that
HookedTransformer.from_pretrained has processed: the norm's output before gain and bias. They predict an MLP
output whose mean over d_out is zero; an unprocessed model writes that mean too, and the next norm removes it.
"""

from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from mxd_lens.architectures.saved import few
from mxd_lens.pretrained.formats.checkpoint_file import (
    Described,
    UnreadableCheckpointError,
    read_checkpoint_file,
    shown,
)
from mxd_lens.pretrained.formats.foreign import ForeignLayer
from mxd_lens.pretrained.formats.source import Source, check_shapes, width_of

NAME = "transcoder_circuits"
SUFFIXES = (".pt", ".pkl", ".pkl.gz")


def recognises(source: Source, layer: str) -> bool:
    """Whether `layer` is a checkpoint file, of this code or of the paper's."""
    return layer.endswith(SUFFIXES) and source.has(layer)


def layers(source: Source) -> list[str]:
    """The names of the layers in a release."""
    return [
        path
        for path in source.files()
        if path.endswith(SUFFIXES) and not PurePosixPath(path).name.endswith("_log_feature_sparsity.pt")
    ]


def is_the_papers(content: Any) -> bool:
    """Whether a checkpoint is of the paper's code."""
    config = content.get("cfg") if type(content) is dict else None
    return isinstance(config, Described) and "use_conditional" in vars(config)


def read(source: Source, layer: str) -> ForeignLayer:
    """The layer in the checkpoint file `layer` of a release.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, hostile or another's; nothing in it is run.
    """
    file = source.fetch(layer)
    content = read_checkpoint_file(file)
    config = content.get("cfg") if type(content) is dict else None
    stored = content.get("state_dict") if type(content) is dict else None
    if not isinstance(config, Described) or not isinstance(stored, dict):
        raise UnreadableCheckpointError(f"{file} is not a checkpoint: it should hold cfg and state_dict.")
    if wrong := [f"{shown(n)} is {shown(w)}" for n, w in stored.items() if not isinstance(w, Tensor)]:
        raise UnreadableCheckpointError(f"{file} should hold tensors in its state_dict; {few(wrong)}.")
    settings = vars(config)
    hooks = [settings.get(name) for name in ("hook_point", "out_hook_point")]
    if settings.get("is_transcoder") is not True or not all(isinstance(hook, str) for hook in hooks):
        raise UnreadableCheckpointError(
            f"{file} is not a transcoder: is_transcoder should be True, with hook_point and out_hook_point."
        )
    weights = {name: w.clone() for name, w in stored.items()}
    d_in, d_sae = width_of(file, weights, "W_enc"), width_of(file, weights, "W_enc", 1)
    d_out = width_of(file, weights, "W_dec", 1)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_in,),
        "b_dec_out": (d_out,),
    }
    check_shapes(file, weights, shapes)
    shift = weights.pop("b_dec").double() @ weights["W_enc"].double()
    weights["b_enc"] = (weights["b_enc"].double() - shift).to(weights["b_enc"].dtype)
    weights["b_dec"] = weights.pop("b_dec_out")
    names = {name: settings.get(name) for name in ("model_name", "dataset_path")}
    context_size = settings.get("context_size")
    return ForeignLayer(
        weights=weights,
        activation="relu",
        k=None,
        hook_name=hooks[0],
        hook_name_out=hooks[1],
        model_name=names["model_name"] if isinstance(names["model_name"], str) else None,
        metadata={
            "prepend_bos": True,
            "exclude_special_tokens": False,
            "context_size": context_size if type(context_size) is int else None,
            "dataset_path": names["dataset_path"] if isinstance(names["dataset_path"], str) else None,
            "source_format": NAME,
        },
    )

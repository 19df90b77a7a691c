"""Gemma Scope's transcoders for Gemma 2: a folder layer_N/width_W/average_l0_L with params.npz.

W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc, b_dec and threshold, float32. There is no configuration
beside them: block, width and L0 are in the path, and the language model follows from the width. They read
the norm's output before its gain (the gain was folded into the MLP) and predict what the block adds to the
residual stream, after Gemma's second norm. BOS, EOS and padding were left out of the training.
"""

import re
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from mxd_lens.pretrained.formats.foreign import ForeignLayer
from mxd_lens.pretrained.formats.source import Source, check_shapes, joined, width_of

NAME = "Gemma Scope"
WEIGHTS = "params.npz"
MODELS = {2304: "gemma-2-2b", 3584: "gemma-2-9b", 4608: "gemma-2-27b"}
MAX_EXPANSION, FREE_EXPANSION = 10, 2**24
"""A compressed archive may expand that much, beyond `FREE_EXPANSION` bytes; trained weights do not."""


def recognises(source: Source, layer: str) -> bool:
    """Whether `layer` is a folder with params.npz."""
    return source.has(joined(layer, WEIGHTS))


def layers(source: Source) -> list[str]:
    """The names of the layers in a release."""
    return sorted(joined(str(PurePosixPath(p).parent)) for p in source.files() if p.endswith(f"/{WEIGHTS}"))


def read(source: Source, layer: str) -> ForeignLayer:
    """The layer in the folder `layer` of a release.

    Raises:
        FileNotFoundError: there is no such layer.
        ValueError: the file is none of Gemma Scope's, or its path does not say which block it belongs to
            or that it is a transcoder.
    """
    foreign = read_weights(source.fetch(joined(layer, WEIGHTS)))
    path = f"{source.location}/{layer}"
    block = re.search(r"layer_(\d+)", layer) or re.search(r"layer_(\d+)", path)
    if block is None or "transcoder" not in path.lower():
        raise ValueError(
            f"{path} holds a params.npz of Gemma Scope, whose files say neither their block nor whether they "
            "are SAEs or transcoders: the path does. Keep the release's own folders, as "
            "gemma-scope-2b-pt-transcoders/layer_19/width_16k/average_l0_15."
        )
    model_name = MODELS.get(foreign.weights["W_enc"].shape[0])
    foreign.model_name = f"{model_name}-it" if model_name and re.search(r"-it\b", path) else model_name
    foreign.hook_name = f"blocks.{block[1]}.ln2.hook_normalized"
    foreign.hook_name_out = f"blocks.{block[1]}.hook_mlp_out"
    stated = re.search(r"average_l0_(\d+)", path)
    foreign.metadata |= {
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "context_size": 1024,
        "stated_l0": float(stated[1]) if stated else None,
        "source_format": NAME,
    }
    return foreign


def read_weights(file: Path) -> ForeignLayer:
    """The weights of a params.npz; where in a model they belong is not in the file.

    Raises:
        ValueError: it is damaged, or holds something else; nothing in it is run.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > FREE_EXPANSION + MAX_EXPANSION * file.stat().st_size:
            raise ValueError(f"it expands to {size:,} bytes, as weights do not")
        with np.load(file, allow_pickle=False) as params:
            weights = {name: _tensor(params[name]) for name in params.files}
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as e:
        raise ValueError(f"{file} is not a params.npz of Gemma Scope ({type(e).__name__}: {e}).") from e
    except Exception as e:  # zlib.error and what else a damaged archive makes of its readers
        raise ValueError(f"{file} is damaged ({type(e).__name__}: {e}).") from e
    d_in, d_sae = width_of(file, weights, "W_enc"), width_of(file, weights, "W_enc", 1)
    d_out = width_of(file, weights, "W_dec", 1)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_out),
        "b_enc": (d_sae,),
        "b_dec": (d_out,),
        "threshold": (d_sae,),
    }
    check_shapes(file, weights, shapes)
    return ForeignLayer(weights, "jumprelu", None, None, None, None)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))

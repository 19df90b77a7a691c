"""Where a layer belongs in a model: the hook points of its metadata, and whether the model runs them.

Every function that takes a model and a layer asks here first, so that a layer at the wrong place is an
error before there is a number.
"""

from typing import Any

from sae_lens import SAE
from sae_lens.util import extract_layer_from_tlens_hook_name

from mxd_lens.models import attached_layer, check_fires, check_processing, is_same_model, model_first


def hook_names(sae: SAE[Any]) -> tuple[str, str]:
    """The hook points of a layer's input and output, as its metadata names them.

    Raises:
        ValueError: it names none.
    """
    metadata = sae.cfg.metadata
    if not metadata.hook_name:
        raise ValueError(
            "This layer does not say where it belongs: set sae.cfg.metadata.hook_name to its input's "
            "hook point, and hook_name_out to its output's."
        )
    return metadata.hook_name, metadata.hook_name_out or metadata.hook_name


def block_of_layer(sae: SAE[Any]) -> int:
    """The block whose MLP a layer stands for.

    Raises:
        ValueError: its metadata names none.
    """
    block = extract_layer_from_tlens_hook_name(hook_names(sae)[1])
    if block is None:
        raise ValueError(f"{hook_names(sae)[1]} is in no block: this layer stands for no MLP.")
    return block


@model_first
def check_fits(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on another model, or on hooks this one does not run."""
    check_trained_on(model, sae)
    check_fires(model, *hook_names(sae))


@model_first
def check_trained_on(model: Any, sae: SAE[Any]) -> None:
    """Raises ValueError where a layer was trained on another model, or on other weights of it."""
    metadata = sae.cfg.metadata
    if metadata.model_name and not is_same_model(metadata.model_name, model.cfg.model_name):
        raise ValueError(
            f"This layer was trained on {metadata.model_name}, and the model is {model.cfg.model_name}. If "
            f"they are the same model, set sae.cfg.metadata.model_name = {model.cfg.model_name!r}."
        )
    check_processing(model, sae)


def check_free(model: Any, name: str) -> None:
    """Raises ValueError where SAELens has attached a layer at a hook point."""
    if attached_layer(model, name) is not None:
        raise attached_at(name)


def attached_at(name: str) -> ValueError:
    """The error of what needs the MLP's own output where a layer is attached."""
    return ValueError(
        f"a layer is attached at {name}: take it away with model.reset_saes() first, for the MLP's own "
        "output is needed."
    )

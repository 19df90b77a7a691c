"""A language model whose MLPs, all or some, are replaced by layers."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor

from mxd_lens.hooks.replace import Replaced, Replacement
from mxd_lens.hooks.site import block_of_layer, check_fits, hook_names


class ReplacementModel:
    """A model with a layer in the place of the MLP of each of several blocks.

        replacement = ReplacementModel(model, {0: mxd_0, 1: mxd_1})
        logits = replacement(tokens)
        with replacement.replaced([1]):                  # only block 1, in whatever the model does
            text = model.generate("The capital of France is")

    The layers replace the MLPs' outputs at every position. The model itself is unchanged outside a call or a
    with block.

    Args:
        model: any hooked model.
        layers: the layers by block; or a folder with one saved layer in each sub-folder.

    Raises:
        ValueError: a layer does not fit the model or is named by another block than its own, or there is no
            layer.
        FileNotFoundError: the folder holds no saved layer.
    """

    def __init__(self, model: Any, layers: Mapping[int, SAE[Any]] | str | Path) -> None:
        self.model = model
        given = layers if isinstance(layers, Mapping) else layers_in(layers)
        if not given:
            raise ValueError("There is no layer to replace an MLP with: give at least one.")
        for block, sae in given.items():
            check_fits(model, sae)
            if block_of_layer(sae) != block:
                raise ValueError(
                    f"The layer given for block {block} belongs to block {block_of_layer(sae)}, as its "
                    "metadata.hook_name_out says. Name it by that block."
                )
        self.layers: dict[int, SAE[Any]] = dict(sorted(given.items()))

    @contextmanager
    def replaced(self, blocks: Collection[int] | None = None) -> Iterator[Any]:
        """The model with the MLPs of some blocks replaced, of all that have a layer by default.

        Raises:
            KeyError: a block has no layer.
        """
        with ExitStack() as stack:
            for block in self.layers if blocks is None else blocks:
                if block not in self.layers:
                    raise KeyError(f"Block {block} has no layer; those with one: {list(self.layers)}.")
                sae = self.layers[block]
                stack.enter_context(Replaced(self.model, *hook_names(sae), _output_of(sae)))
            yield self.model

    def __call__(
        self, tokens: Int[Tensor, "sequences positions"], blocks: Collection[int] | None = None
    ) -> Float[Tensor, "sequences positions vocabulary"]:
        """The logits with the MLPs of some blocks replaced, of all that have a layer by default."""
        with self.replaced(blocks) as model:
            return model(tokens)


def _output_of(sae: SAE[Any]) -> Replacement:
    return lambda x, _y: sae(x.to(sae.W_dec))


def layers_in(folder: str | Path) -> dict[int, SAE[Any]]:
    """The layers saved in the sub-folders of a folder, by block.

    Raises:
        FileNotFoundError: there is none.
        ValueError: two are of one block.
    """
    layers: dict[int, SAE[Any]] = {}
    for config in sorted(Path(folder).expanduser().glob(f"*/{SAE_CFG_FILENAME}")):
        sae = SAE.load_from_disk(config.parent)
        if (block := block_of_layer(sae)) in layers:
            raise ValueError(
                f"{folder} has two layers of block {block}: give a dictionary of the ones to use."
            )
        layers[block] = sae
    if not layers:
        raise FileNotFoundError(f"{folder} has no saved layer in its sub-folders (no */{SAE_CFG_FILENAME}).")
    return layers

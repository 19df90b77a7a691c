"""SAELens' own skip transcoders, as others have released them, with a skip that survives attachment.

y = C^T a + W_skip x + b, with a = relu(G^T x + b_G), or the same cut off below a threshold (JumpReLU).

SAELens attaches a layer by calling `encode` and then `decode`, which knows no x, and so drops W_skip x.
These classes have its weights, names and configurations, and give attached what `forward` gives.
"""

from typing import Any, ClassVar

from jaxtyping import Float
from sae_lens.registry import get_sae_class
from sae_lens.saes import transcoder as saelens
from torch import Tensor
from typing_extensions import override

from mxd_lens.architectures.inputs import EncodedInputs


class KeepsItsSkip(saelens.SkipTranscoder):
    """A SAELens skip transcoder whose decode adds W_skip x too."""

    config_class: ClassVar[type[saelens.TranscoderConfig]]

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._encoded = EncodedInputs()

    @override
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The features' coefficients a; they carry x with them for `decode`."""
        feature_acts = super().encode(x)
        self._encoded.remember(feature_acts, x)
        return feature_acts

    @override
    def decode(
        self,
        feature_acts: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """y = C^T a + W_skip x + b.

        Args:
            feature_acts: a: what `encode` returned, or an edited copy of it.
            x: the input. May be left out for the activations of an `encode`.

        Raises:
            ValueError: it is not certain which input the activations belong to, or the shapes differ.
        """
        sae_in = self._encoded.resolve(feature_acts, x).to(self.dtype)
        # SAELens fires hook_sae_recons in its decode, before the skip.
        return super().decode(feature_acts) + sae_in @ self.W_skip.T

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x))

    @override
    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature_acts = self.encode(x)
        return self.decode(feature_acts), feature_acts

    @classmethod
    @override
    def get_sae_class_for_architecture(cls, architecture: str) -> type[Any]:
        if architecture == cls.config_class.architecture():
            return cls
        classes = {
            made.config_class.architecture(): made for made in (SkipTranscoder, JumpReLUSkipTranscoder)
        }
        use = classes.get(architecture) or get_sae_class(architecture)[0]
        raise ValueError(
            f"This layer is a {architecture}, not a {cls.config_class.architecture()}: use "
            f"{use.__module__.split('.')[0]}.{use.__name__}."
        )


class SkipTranscoder(KeepsItsSkip):
    """SAELens' `SkipTranscoder`, attached as it runs: y = C^T relu(G^T x + b_G) + W_skip x + b."""

    config_class = saelens.SkipTranscoderConfig


class JumpReLUSkipTranscoder(KeepsItsSkip, saelens.JumpReLUSkipTranscoder):
    """SAELens' `JumpReLUSkipTranscoder` (Gemma Scope 2's affine transcoders), attached as it runs."""

    config_class = saelens.JumpReLUSkipTranscoderConfig

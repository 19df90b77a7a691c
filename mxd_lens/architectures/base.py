"""What every architecture here shares: input at one hook, target at another, decode knowing its input.

The layers differ in one line only, `mix`: how the sparse part C^T a and the input x make the output.

    a = TopK_K(relu(G^T x + b_G))           expert coefficients          [d_sae]
    y = mix(C^T a, x)                       the layer's output           [d_out]

SAELens attaches a layer by calling `encode(x)` and then `decode(a)`; where `mix` needs x, decode has
to know which x its activations came from. `EncodedInputs` keeps that, one entry per activation tensor.
"""

import reprlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from sae_lens.constants import DTYPE_TO_STR, SAE_CFG_FILENAME
from sae_lens.loading import pretrained_saes_directory
from sae_lens.loading.pretrained_sae_loaders import PretrainedSaeDiskLoader
from sae_lens.saes.sae import (
    SAE,
    SAEMetadata,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from sae_lens.util import filter_valid_dataclass_fields
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformer_lens.hook_points import HookPoint
from typing_extensions import Self, override

from mxd_lens.architectures.saved import download_layer, few, hub_errors, read_folder, shown
from mxd_lens.sparse import sparse_decode, topk_gate

C = TypeVar("C", bound="PairedTranscoderConfig")

LARGEST_WIDTH = 2**29
"""torch counts the bytes of a weight of two such widths in 64 bits."""


@dataclass(kw_only=True)
class PairedTranscoderConfig(TranscoderConfig):
    """Configuration shared by every architecture here."""

    d_in: int
    """Width of the input, the activations at `metadata.hook_name`."""
    d_out: int = field()
    """Width of the output, the activations at `metadata.hook_name_out`."""
    d_sae: int
    """Number of experts (of features, for a transcoder)."""
    k: int | None
    """Experts active on a token. None: plain relu, made sparse by an L1 penalty in training."""
    apply_b_dec_to_input: bool = False
    """Must be False: b_dec lives in the output space."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.positive_integers():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_WIDTH:
                raise ValueError(
                    f"{name} must be a positive integer, at most {LARGEST_WIDTH:,}, "
                    f"got {reprlib.repr(value)}."
                )
        if self.k is not None:
            if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
                raise ValueError(
                    f"k must be a positive integer, or None for relu sparsity, got {reprlib.repr(self.k)}."
                )
            if self.k > self.d_sae:
                raise ValueError(
                    f"k must be at most d_sae, got k = {reprlib.repr(self.k)} and d_sae = {self.d_sae}: "
                    "no token can have more active experts than there are."
                )
        if self.normalize_activations != "none":
            raise ValueError(
                "normalize_activations must be 'none', got "
                f"{self.normalize_activations!r}: input and target are different activations, and "
                "SAELens' normalisations assume they are the same."
            )
        if self.reshape_activations != "none":
            raise ValueError(
                f"reshape_activations must be 'none', got {self.reshape_activations!r}: "
                "an MLP has no head dimension."
            )

    @classmethod
    def positive_integers(cls) -> tuple[str, ...]:
        """The names of the fields that count something."""
        return ("d_in", "d_out", "d_sae")

    @classmethod
    @override
    def from_dict(cls: type[C], config_dict: dict[str, Any]) -> C:
        """The config that `to_dict` wrote; unknown keys are ignored."""
        known: dict[str, Any] = filter_valid_dataclass_fields(config_dict, cls)
        known["metadata"] = SAEMetadata(**config_dict.get("metadata", {}))
        return cls(**known)


def check_metadata(metadata: SAEMetadata) -> None:
    """Raises ValueError where what a file said about a layer cannot be true."""
    settings = vars(metadata)
    # They are attributes: one named as a method takes its place.
    if taken := settings.keys() & set(dir(SAEMetadata)):
        raise ValueError(f"metadata must not have settings named {', '.join(sorted(taken))}.")
    for name in ("model_name", "hook_name", "hook_name_out"):
        if not isinstance(settings.get(name), str | None):
            raise ValueError(f"metadata.{name} must be a name, got {reprlib.repr(settings[name])}.")


class EncodedInputs:
    """Which input each activation tensor was encoded from.

    An entry lives exactly as long as the activation tensor `encode` returned, so nothing is kept
    alive after use. A tensor that `encode` did not return (an edited copy) belongs to the last
    encode if no decode has followed it and no encode of another input is waiting for its own; that
    input is held weakly.
    """

    def __init__(self) -> None:
        self._input_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._waiting: weakref.ref[Tensor] | None = None
        self._others_wait = False

    def remember(self, feature_acts: Tensor, sae_in: Tensor) -> None:
        if self._waiting is not None and self._waiting() is not sae_in:
            self._others_wait = True
        self._waiting = weakref.ref(sae_in)
        self._input_of[feature_acts] = sae_in

    def recall(self, feature_acts: Tensor) -> Tensor:
        """The input of `feature_acts`. Raises ValueError where that is not certain."""
        sae_in = self._input_of.get(feature_acts)
        if sae_in is None:
            shape = tuple(feature_acts.shape)
            if self._others_wait:
                raise ValueError(
                    f"decode got activations of shape {shape} that encode did not return, and more than "
                    "one encode is waiting for its decode: pass the input, decode(feature_acts, x)."
                )
            sae_in = self._waiting() if self._waiting is not None else None
            if sae_in is None:
                raise ValueError(
                    f"decode got activations of shape {shape} and no encode is waiting for its decode: "
                    "this layer's output depends on its input. Pass it, decode(feature_acts, x)."
                )
        self._waiting, self._others_wait = None, False
        return sae_in

    def resolve(self, feature_acts: Tensor, x: Tensor | None) -> Tensor:
        """x, or where it is None the input of `feature_acts`. Raises ValueError where it does not fit."""
        sae_in = self.recall(feature_acts) if x is None else x
        if feature_acts.shape[:-1] != sae_in.shape[:-1]:
            raise ValueError(
                f"activations of shape {tuple(feature_acts.shape)} do not belong to an input of "
                f"shape {tuple(sae_in.shape)}: pass the input they were encoded from, "
                "decode(feature_acts, x)."
            )
        return sae_in

    def __deepcopy__(self, memo: dict[int, Any]) -> "EncodedInputs":
        return EncodedInputs()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class PairedTranscoder(Transcoder):
    """A layer y = (C^T a) * v(x) + b, a = TopK_k(relu(x W_enc + b_enc)), C = W_dec; '*' elementwise.

    v is 1, which makes it a transcoder; subclasses that multiply with something else give `decoder_out`,
    and what else is added is `WithSkip`. Any leading shape. Hook points keep SAELens' meaning:
    hook_sae_input (x), hook_sae_acts_pre, hook_sae_acts_post (a), hook_sae_recons (y);
    hook_expert_out is the part of y that the experts make, before biases and skip connections.
    """

    cfg: PairedTranscoderConfig
    b_enc: nn.Parameter
    unit_rows: ClassVar[bool] = False
    """Whether training keeps the rows of W_dec at unit norm."""

    def __init__(self, cfg: PairedTranscoderConfig) -> None:
        check_metadata(cfg.metadata)
        super().__init__(cfg)
        self._encoded = EncodedInputs()
        self.hook_expert_out = HookPoint()
        self.setup()

    def mix(
        self, mixture: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The layer's output from the sparse part C^T a and the input x: (C^T a) * v(x) + b."""
        return self.hook_expert_out(mixture * self.decoder_out(x)) + self.b_dec

    def decoder_out(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out_or_1"]:
        """v, what the mixture of a token is multiplied with: D^T z for an MxD, 1 for a transcoder.

        What takes a layer apart into its experts asks for it too, so that it must be all that multiplies.
        """
        return x.new_ones(*x.shape[:-1], 1)

    @override
    def get_activation_fn(self) -> nn.Module:
        return nn.ReLU() if self.cfg.k is None else TopK(self.cfg.k)

    @override
    def initialize_weights(self) -> None:
        """W_enc as a linear layer's default; W_dec uniform(-1, 1) at unit norm where its rows are kept
        there, else 0, so that y is 0 at the start; biases 0."""
        cfg = self.cfg
        self.W_enc = nn.Parameter(expert_by_expert(self.new_linear(cfg.d_in, cfg.d_sae).data))
        self.b_enc = self.new_parameter(cfg.d_sae)
        self.W_dec = self.new_parameter(cfg.d_sae, cfg.d_out)
        self.b_dec = self.new_parameter(cfg.d_out)
        if self.unit_rows:
            nn.init.uniform_(self.W_dec, -1, 1)
            self.normalize_decoder()

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """A parameter of zeros with this layer's dtype and device."""
        return nn.Parameter(torch.zeros(*shape, dtype=self.dtype, device=self.device))

    def new_linear(self, d_in: int, d_out: int) -> nn.Parameter:
        """A weight [d_in, d_out], uniform(-1, 1) / sqrt(d_in) as in torch.nn.Linear."""
        weight = self.new_parameter(d_in, d_out)
        bound = d_in**-0.5
        nn.init.uniform_(weight, -bound, bound)
        return weight

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scales every row of W_dec to unit norm, in place, where training keeps them there."""
        if self.unit_rows:
            self.W_dec.div_(self.get_W_dec_norm().unsqueeze(-1).to(self.W_dec.dtype))

    @torch.no_grad()
    def fold_standardization(
        self,
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, ""],
        target_scale: Float[Tensor, ""],
    ) -> None:
        """Turns a layer for ((x - mean) / scale, y / target_scale) into the same one for (x, y)."""
        self.fold_input_scale(self.W_enc, self.b_enc, mean, scale)
        self.scaled_output.mul_(target_scale)
        self.b_dec.mul_(target_scale)

    @property
    def scaled_output(self) -> nn.Parameter:
        """The weight whose scale is that of the output."""
        return self.W_dec

    @staticmethod
    def fold_input_scale(
        weight: Float[Tensor, "d_in width"],
        bias: Float[Tensor, " width"],
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, ""],
    ) -> None:
        """x W + b, made from ((x - mean) / scale) W + b, in place."""
        weight.div_(scale)
        bias.copy_(bias.double() - mean.double() @ weight.double())

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError if x cannot be this layer's input."""
        if x.shape[-1] != self.cfg.d_in:
            metadata = self.cfg.metadata
            raise ValueError(
                f"expected an input [..., d_in = {self.cfg.d_in}], got {tuple(x.shape)}. This layer "
                f"was trained on {metadata.model_name or 'an unnamed model'} at "
                f"{metadata.hook_name or 'an unnamed hook'}: is it attached to another?"
            )

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        self.check_input(sae_in)
        return super().process_sae_in(sae_in)

    @override
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """a = TopK_k(relu(x W_enc + b_enc)), dense.

        The tensor returned carries its input with it: `decode(a)` uses x again as long as `a` lives.
        """
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        feature_acts = self.hook_sae_acts_post(self.activation_fn(hidden_pre))
        self._encoded.remember(feature_acts, sae_in)
        return feature_acts

    @override
    def decode(
        self,
        feature_acts: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """y = mix(C^T a, x).

        Args:
            feature_acts: a, [..., d_sae]: what `encode` returned, or an edited copy of it.
            x: the input, [..., d_in]. May be left out for the activations of an `encode`.

        Raises:
            ValueError: x is left out and it is not certain which input the activations belong to,
                or the shapes do not fit.
        """
        if feature_acts.shape[-1] != self.cfg.d_sae:
            raise ValueError(
                f"expected activations [..., d_sae = {self.cfg.d_sae}], got {tuple(feature_acts.shape)}."
            )
        if x is not None:
            self.check_input(x)
            x = x.to(self.dtype)
        sae_in = self._encoded.resolve(feature_acts, x)
        return self.hook_sae_recons(self.mix(feature_acts @ self.W_dec, sae_in))

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """y = mix(C^T a, x), with every hook point fired."""
        return self.hook_sae_output(self.decode(self.encode(x)))

    @override
    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature_acts = self.encode(x)
        return self.decode(feature_acts), feature_acts

    def active_experts(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """The coefficients of the k active experts and their ids; no dense [..., d_sae] is made.

        Raises:
            ValueError: the layer has relu sparsity (k is None), where their number varies.
        """
        if self.cfg.k is None:
            raise ValueError("active_experts needs a layer with k; this one has relu sparsity.")
        return topk_gate(x.to(self.dtype), self.W_enc, self.b_enc, self.cfg.k)

    @override
    def fold_W_dec_norm(self) -> None:
        """Makes the rows of W_dec unit norm without changing the outputs.

        Exact for relu sparsity. With k, scaling a row would change which experts are chosen, so it
        is done only where there is nothing to do: the rows have unit norm already.

        Raises:
            NotImplementedError: the layer has k and rows that are not of unit norm.
        """
        if self.cfg.k is None:
            super().fold_W_dec_norm()
            return
        norms = self.get_W_dec_norm().float()
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-2):
            raise NotImplementedError(
                f"fold_W_dec_norm would change which k = {self.cfg.k} experts are chosen: the rows "
                f"of W_dec have norms from {norms.min():.3g} to {norms.max():.3g}."
            )

    # Saving and loading

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors takes nothing else

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        expected = {name: tuple(p.shape) for name, p in self.state_dict().items()}
        got = {name: tuple(p.shape) for name, p in state_dict.items()}
        wrong = [
            f"{shown(name)}: the config says {expected.get(name, 'nothing')}, "
            f"the weights {got.get(name, 'nothing')}"
            for name in sorted(expected.keys() | got.keys())
            if expected.get(name) != got.get(name)
        ]
        if wrong:
            raise ValueError(
                f"The config of this {type(self).__name__} contradicts its weights. {few(wrong)}"
            )
        for name, weight in state_dict.items():
            if weight.dtype not in DTYPE_TO_STR:
                raise ValueError(f"{name} holds {weight.dtype}: weights are floating-point numbers.")
            # isfinite(weight) would make a copy of it.
            if not torch.linalg.vector_norm(weight, ord=float("inf")).isfinite():
                raise ValueError(f"{name} holds values that are not finite in {weight.dtype}.")
        state_dict["W_enc"] = expert_by_expert(state_dict["W_enc"])

    @classmethod
    @override
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        """An untrained layer from a config dictionary."""
        return SAE.from_dict.__func__(cls, config_dict)

    @classmethod
    @override
    def load_from_disk(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str | None = None,
        converter: PretrainedSaeDiskLoader = read_folder,
        **kwargs: Any,
    ) -> Self:
        """As SAELens' `load_from_disk`, with errors that say what is wrong with the folder.

        Raises:
            FileNotFoundError: the folder, its cfg.json or its weights are missing.
            ValueError: the weights are truncated, no safetensors file or not finite numbers, the config is
                not valid, or the two contradict each other, or it holds another architecture than this
                class.
        """
        folder = Path(path)
        try:
            return super().load_from_disk(path, device, dtype, converter, **kwargs)
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"{folder / SAE_CFG_FILENAME} is not the configuration of a layer ({type(e).__name__}: {e})."
            ) from e
        except ValueError as e:
            if str(folder) in str(e):  # read_folder says it already
                raise
            raise ValueError(f"{folder}: {e}") from e

    @classmethod
    @override
    def from_pretrained(
        cls,
        release: str | Path,
        sae_id: str | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        force_download: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a layer, as SAELens' `SAE.from_pretrained`.

        Args:
            release: a local folder, a Hugging Face `user/repo`, or a name in SAELens' directory.
            sae_id: which layer of the release; for a local folder the subfolder, if any.
            device: where to put it.
            dtype: its dtype. None: the one it was saved in; from SAELens' directory, float32.
            force_download: whether to download again what the hub's cache has.
            revision: a branch, tag or commit of the repository. None: its main branch.
            kwargs: what else SAELens takes.

        Raises:
            FileNotFoundError, ValueError: as `load_from_disk`; or there is no such release, or no such
                layer in it.
            PermissionError: the repository is not one this token may read.
            ConnectionError: the hub cannot be reached, and the layer is not in its cache.
        """
        folder = Path(release).expanduser() / (sae_id or "")
        if folder.is_dir():
            return cls.load_from_disk(folder, device=device, dtype=dtype)
        directory = pretrained_saes_directory.get_pretrained_saes_directory()
        if sae_id is None and release in directory:
            ids = ", ".join(list(directory[str(release)].saes_map)[:5])
            raise FileNotFoundError(
                f"{release} is a release: name the layer too, by its sae_id. It has {ids}."
            )
        if sae_id is None or isinstance(release, Path) or Path(release).exists():
            raise FileNotFoundError(
                f"{folder} is not a folder; a release on the hub is named by its release and sae_id."
            )
        if "converter" in kwargs or "/" not in release or release in directory:
            with hub_errors(release):
                return super().from_pretrained(
                    release, sae_id, device, dtype or "float32", force_download, **kwargs
                )
        folder = download_layer(release, sae_id, revision, force_download)
        return cls.load_from_disk(folder, device=device, dtype=dtype, **kwargs)


def expert_by_expert(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same matrix, stored column by column: its gradient arises an expert at a time."""
    return W_enc.T.contiguous().T


@dataclass(kw_only=True)
class TrainingPairedTranscoderConfig(PairedTranscoderConfig, TrainingSAEConfig):
    """What training adds to a configuration."""

    decoder_init_norm: float | None = None
    """Must be None: each architecture starts W_dec as its source does."""
    l1_coefficient: float = 0.0
    """Weight of the penalty mean_tokens sum_n |a_n|. Needed where k is None."""
    l1_warm_up_steps: int = 0
    """Steps over which the penalty grows to its full weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_init_norm is not None:
            raise ValueError(
                "decoder_init_norm must be None: each architecture starts W_dec as its source does, "
                f"got {self.decoder_init_norm}."
            )
        if self.l1_coefficient < 0 or (self.k is None and self.l1_coefficient == 0):
            raise ValueError(
                "l1_coefficient must be positive where k is None (it is what makes the experts "
                f"sparse) and never negative, got {self.l1_coefficient} with k = {self.k}."
            )


class TrainingPairedTranscoder(PairedTranscoder, TrainingSAE[Any]):
    """Trains a `PairedTranscoder` with SAELens' trainer on pairs [x | y].

    Loss, as in the paper's code: mean over tokens and output dimensions of (y_hat - y)^2 / ||y||_2,
    plus l1_coefficient * mean_tokens sum_n a_n. With `unit_rows`, the rows of C are set to unit norm
    before every step, and the component of C's gradient parallel to each row is removed.
    """

    cfg: TrainingPairedTranscoderConfig

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.cfg.l1_coefficient == 0:
            return {}
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        return self.activation_fn(hidden_pre), hidden_pre

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        if "l1" not in step_input.coefficients:
            return {}
        return {"l1_loss": step_input.coefficients["l1"] * feature_acts.sum(-1).mean()}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's forward pass.

        Args:
            step_input: `sae_in` is the pair [x | y], [tokens, d_in + d_out].

        Returns:
            SAELens' TrainStepOutput with the target y as `sae_in`, so that SAELens' logs compare the
            output with the target; `feature_acts` is sparse.

        Raises:
            ValueError: the pairs have another width.
            FloatingPointError: the loss is not finite; raised before any gradient is taken.
        """
        d_in, d_out = self.cfg.d_in, self.cfg.d_out
        if step_input.sae_in.shape[-1] != d_in + d_out:
            raise ValueError(
                f"training wants pairs [x | y] of width d_in + d_out = {d_in} + {d_out}, "
                f"got {tuple(step_input.sae_in.shape)}."
            )
        self.normalize_decoder()
        x, y = step_input.sae_in.to(self.dtype).split([d_in, d_out], dim=-1)

        if self.cfg.k is None:
            values, hidden_pre = self.encode_with_hidden_pre(x)
            mixture = values @ (TangentGradient.apply(self.W_dec) if self.unit_rows else self.W_dec)
            feature_acts = values.detach().to_sparse()
        else:
            values, indices = hidden_pre, _ = topk_gate(x, self.W_enc, self.b_enc, self.cfg.k)
            mixture = sparse_decode(values, indices, self.W_dec, unit_rows=self.unit_rows)
            feature_acts = sparse_activations(values.detach(), indices, self.cfg.d_sae)
        y_hat = self.mix(mixture, x)

        precise = torch.promote_types(self.dtype, torch.float32)
        squared_error = (y_hat - y).to(precise).pow(2).sum(-1)
        y_norm = y.to(precise).norm(dim=-1).clamp_min(1e-6)
        losses = {"mse_loss": (squared_error / y_norm).mean() / d_out}
        losses |= self.calculate_aux_loss(step_input, values, hidden_pre, y_hat)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at this step.")
        return TrainStepOutput(
            sae_in=y,
            sae_out=y_hat,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre.detach(),
            loss=loss,
            losses=losses,
            metrics={"normalized_mse": (squared_error.detach() / y_norm.pow(2)).mean()},
        )


def sparse_activations(
    values: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], d_sae: int
) -> Float[Tensor, "tokens d_sae"]:
    """The activations as a COO tensor, as SAELens' trainer takes them."""
    tokens = torch.arange(values.shape[0], device=values.device).repeat_interleave(values.shape[1])
    return torch.sparse_coo_tensor(
        torch.stack([tokens, indices.flatten()]),
        values.flatten(),
        (values.shape[0], d_sae),
        check_invariants=False,
    )


class TangentGradient(torch.autograd.Function):
    """The identity, whose gradient loses its component parallel to each (unit norm) row."""

    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return W.view_as(W)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (W,) = ctx.saved_tensors
        return grad - (grad * W).sum(-1, keepdim=True) * W

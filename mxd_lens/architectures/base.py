"""What every architecture here shares, and what an architecture says about itself.

    a = TopK_K(relu(G^T x + b_G))                  the experts' coefficients      [d_sae]
    y = experts_out(m, s) + b + skip_out(x)        the layer's output             [d_out]
        m = mixture(a)                             linear in a, knows no x        [m]
        s = expert_input(x)                        knows no a                     [s]

`experts_out` is linear in m, so that the experts' outputs add up: y is the sum of what each active expert
writes, and of what no expert writes, b + skip_out(x). Expert n writes

    a_n experts_out(mixture(e_n), s)               `a_n * written_by(n, s)`

Whatever decomposes, edits or evaluates a layer uses these five methods and asks for no class. The defaults
are those of a transcoder: m = C^T a, s = 1, experts_out = m * s, no skip.

A new architecture is one file and one line. The file has four classes, as `topk_transcoder`: the layer, its
configuration, and both in training; it ends in `register_architecture`. The line is in
`architectures/__init__.py`; an architecture of somebody else's package needs none. The layer overrides

| what | when |
|---|---|
| `initialize_weights` | it has parameters of its own |
| `expert_input`, `mixture`, `experts_out`, `skip_out` | its output is not C^T a + b |
| `coefficients`, `activate` | its gate is not TopK or relu |
| `training_coefficients` | its gate is another one in training |
| `fold_standardization`, `scale_experts` | it has parameters of its own |
| `formula`, `gate_formula`, `title`, `about`, `unit`, `dense_parts` | a card should describe it |
| `expert_weight`, `singular_values` | its experts are not directions |

A class that overrides what is computed and not the formula has none, rather than its parent's false one; the
same holds for the experts' weights. Its matched size needs nothing: `PairedTranscoderConfig.matched_size`
counts the parameters of the layer.
"""

import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from sae_lens.constants import DTYPE_TO_STR, SAE_CFG_FILENAME
from sae_lens.loading import pretrained_saes_directory
from sae_lens.loading.pretrained_sae_loaders import PretrainedSaeDiskLoader
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_class
from sae_lens.saes import topk_sae
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from sae_lens.util import filter_valid_dataclass_fields
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.hook_points import HookPoint
from typing_extensions import Self, override

from mxd_lens.architectures.inputs import EncodedInputs
from mxd_lens.architectures.saved import few, hub_errors, locate, read_folder, shown
from mxd_lens.sparse import topk_gate
from mxd_lens.sparse.coefficients import Active, Coefficients, Dense
from mxd_lens.sparse.selection import largest

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

    @property
    def n_parameters(self) -> int:
        """How many parameters the layer has; none is made to count them."""
        on_meta: Any = self
        layer = get_sae_class(self.architecture())[0](replace(on_meta, device="meta"))
        return sum(parameter.numel() for parameter in layer.parameters())

    @classmethod
    def matched_size(cls, n_parameters: int, **settings: Any) -> int:
        """The largest d_sae with which the layer has at most `n_parameters` parameters.

            budget = transcoder_parameters(d_in=768, d_out=768, width=24_576)
            MxDConfig.matched_size(budget, d_in=768, d_out=768, d_hidden=3_072)        21,490, as in the paper

        Args:
            n_parameters: the budget.
            settings: the configuration's other fields; k is not needed.

        Raises:
            ValueError: a layer of one expert has more.
        """
        k = {} if settings.get("k", 1) is None or cls.__dataclass_fields__["k"].default is None else {"k": 1}
        one, two = (cls(**{**settings, **k, "d_sae": d_sae}).n_parameters for d_sae in (1, 2))
        if n_parameters < one:
            raise ValueError(
                f"A layer of architecture {cls.architecture()!r} with one expert has {one:,} parameters, and "
                f"{n_parameters:,} are allowed. Allow more, or make its other widths smaller."
            )
        return 1 + (n_parameters - one) // (two - one)


def transcoder_parameters(d_in: int, d_out: int, width: int) -> int:
    """The parameters of a transcoder of `width` features: width (d_in + d_out + 1) + d_out."""
    return width * (d_in + d_out + 1) + d_out


def check_metadata(metadata: SAEMetadata) -> None:
    """Raises ValueError where what a file said about a layer cannot be true."""
    settings = vars(metadata)
    # They are attributes: one named as a method takes its place.
    if taken := settings.keys() & set(dir(SAEMetadata)):
        raise ValueError(f"metadata must not have settings named {', '.join(sorted(taken))}.")
    for name in ("model_name", "hook_name", "hook_name_out"):
        if not isinstance(settings.get(name), str | None):
            raise ValueError(f"metadata.{name} must be a name, got {reprlib.repr(settings[name])}.")


def expert_ids(layer: SAE[Any], experts: int | Iterable[int] | Int[Tensor, " n"] | None) -> Int[Tensor, " n"]:
    """Expert ids as a tensor on the layer's device; all of them for None.

    Raises:
        IndexError: there is no such expert.
        TypeError: they are no integers; a mask, for one.
    """
    device, d_sae = layer.W_dec.device, layer.cfg.d_sae
    if experts is None:
        return torch.arange(d_sae, device=device)
    if not isinstance(experts, Tensor):
        experts = (
            list(experts) if isinstance(experts, Iterable) and not isinstance(experts, str) else [experts]
        )
        for n in experts:
            if isinstance(n, bool) or not hasattr(n, "__index__"):
                raise TypeError(f"an expert is named by an integer, got {reprlib.repr(n)}.")
        experts = torch.tensor([operator.index(n) for n in experts], dtype=torch.long)
    if experts.is_floating_point() or experts.dtype == torch.bool:
        raise TypeError(f"an expert is named by an integer, got a tensor of {experts.dtype}.")
    ids = experts.to(device, torch.long).reshape(-1)
    outside = ids[(ids < 0) | (ids >= d_sae)]
    if len(outside):
        raise IndexError(f"expert {int(outside[0])} does not exist: there are {d_sae}, from 0.")
    return ids


WRITES = frozenset(("expert_input", "mixture", "experts_out"))
"""The methods that make what an expert writes."""
GATES = frozenset(("coefficients", "activate", "get_activation_fn", "encode"))
"""The methods that make its coefficient."""


def _not_said(says: str) -> Any:
    def method(self: "PairedTranscoder", *_: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} computes something of its own and does not say its {says}: define {says} "
            "in the class."
        )

    return method


def _singular_values_of_expert_weight(
    self: "PairedTranscoder", batches: Iterable[Int[Tensor, " n"]]
) -> Iterator[Float[Tensor, "n rank"]]:
    for experts in batches:
        yield torch.stack([torch.linalg.svdvals(self.expert_weight(n).double()) for n in experts.tolist()])


SAYS: dict[str, tuple[frozenset[str], Any]] = {
    "formula": (WRITES | {"hidden", "skip_out", "decode", "forward"}, _not_said("formula")),
    "gate_formula": (GATES, _not_said("gate_formula")),
    "expert_weight": (WRITES, _not_said("expert_weight")),
    "singular_values": (WRITES | {"expert_weight"}, _singular_values_of_expert_weight),
}
"""What a class says about itself, the methods that it tells of, and what it says where it overrides one of
these and does not say it anew."""


class PairedTranscoder(Transcoder):
    """A layer y = C^T a + b, a = TopK_k(relu(x W_enc + b_enc)), C = W_dec; and the base of all others.

    Any leading shape. Hook points keep SAELens' meaning: hook_sae_input (x), hook_sae_acts_pre,
    hook_sae_acts_post (a), hook_sae_recons (y); hook_expert_out is the part of y that the experts write,
    before biases and skip connections.
    """

    cfg: PairedTranscoderConfig
    b_enc: nn.Parameter
    unit_rows: ClassVar[bool] = False
    """Whether training keeps the rows of W_dec at unit norm."""
    title: ClassVar[str] = "A transcoder"
    """What it is, as the beginning of a sentence."""
    about: ClassVar[str] = ""
    """What its experts write, in a sentence or two."""
    unit: ClassVar[str] = "feature"
    """What one of its units is called; "expert" where it is more than a direction."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).keys()
        for name, (depends_on, otherwise) in SAYS.items():
            if name not in own and depends_on & own:
                setattr(cls, name, otherwise)

    def __init__(self, cfg: PairedTranscoderConfig) -> None:
        check_metadata(cfg.metadata)
        super().__init__(cfg)
        self._encoded = EncodedInputs()
        self.hook_expert_out = HookPoint()
        self.setup()

    # The formula

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """x W_enc + b_enc, rounded once, as where only the active experts are computed."""
        return F.linear(x, self.W_enc.T, self.b_enc)

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """a of dense pre-activations."""
        return self.activation_fn(pre)

    def coefficients(self, x: Float[Tensor, "*batch d_in"]) -> Coefficients:
        """a of the input x, differentiable; no dense [..., d_sae] is made where k experts are active.

        The same coefficients as `encode`'s, without its hook points.
        """
        if self.cfg.k is None:
            return Dense(self.activate(self.pre_activations(x)))
        return Active(*topk_gate(x, self.W_enc, self.b_enc, self.cfg.k), self.cfg.d_sae)

    def expert_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch s"]:
        """s, all that the experts' outputs depend on beside their coefficients. [..., 1] of ones here."""
        return x.new_ones(*x.shape[:-1], 1)

    def linear_expert_input(
        self, x: Float[Tensor, "*batch d_in"], at: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch s"]:
        """s(x), with every nonlinearity held at the slope output / input that it has at `at`.

        Affine in x, and s(at) at x = at: for attribution. s itself here, which is constant.
        """
        del at
        return self.expert_input(x)

    def mixture(self, a: Coefficients) -> Float[Tensor, "*batch m"]:
        """m, all that the coefficients contribute to the output; linear in a. C^T a here."""
        return a.mix(self.W_dec, unit_rows=self.unit_rows)

    def experts_out(
        self, mixture: Float[Tensor, "*batch m"], expert_input: Float[Tensor, "*batch s"]
    ) -> Float[Tensor, "*batch d_out"]:
        """What the experts write together; linear in the mixture. m * s here, '*' elementwise."""
        return mixture * expert_input

    def skip_out(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | None:  # noqa: ARG002
        """What is written without the experts beside b_dec: a skip connection's output, or None."""
        return None

    def output(
        self, mixture: Float[Tensor, "*batch m"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """y = experts_out(m, s) + b_dec + skip_out(x), from m and the input x."""
        y = self.hook_expert_out(self.experts_out(mixture, self.expert_input(x))) + self.b_dec
        skip = self.skip_out(x)
        return y if skip is None else y + skip

    def written_by(
        self, experts: Int[Tensor, "*batch n"], expert_input: Float[Tensor, "*batch s"]
    ) -> Float[Tensor, "*batch n d_out"]:
        """What some experts write at coefficient 1, for tokens whose `expert_input` is given."""
        one = Active(
            torch.ones(*experts.shape, 1, dtype=self.W_dec.dtype, device=experts.device),
            experts.unsqueeze(-1),
            self.cfg.d_sae,
        )
        return self.experts_out(self.mixture(one), expert_input.unsqueeze(-2))

    # What the layer says about itself

    @property
    def dense_parts(self) -> tuple[str, ...]:
        """What each part is called that every token uses whole."""
        return ()

    def formula(self) -> list[str]:
        """The layer as lines of Python, in the names of its weights; the last line is the output.

        Raises:
            NotImplementedError: a class computes something of its own and does not say what.
        """
        return [self.gate_formula(), "y = a @ W_dec + b_dec"]

    def gate_formula(self) -> str:
        """The line that computes the coefficients."""
        pre = "relu(x @ W_enc + b_enc)"
        return f"a = {pre}" if self.cfg.k is None else f"a = topk({pre}, {self.cfg.k})"

    @property
    def writes_directions(self) -> bool:
        """Whether an expert writes along the same direction at every token, as a transcoder's feature."""
        return type(self).expert_input is PairedTranscoder.expert_input

    def expert_weight(self, n: int) -> Float[Tensor, "d d_out"]:
        """Expert n as a linear map of what it reads; here of its coefficient alone, one row c_n.

        Raises:
            IndexError: there is no expert n.
            NotImplementedError: a class computes something of its own and does not say what.
        """
        return self.W_dec[self.check_expert(n)].unsqueeze(0)

    def singular_values(self, batches: Iterable[Int[Tensor, " n"]]) -> Iterator[Float[Tensor, "n rank"]]:
        """The singular values of experts' `expert_weight`, largest first, in float64, batch by batch."""
        for experts in batches:
            yield self.W_dec[experts].double().norm(dim=-1, keepdim=True)

    def expert_sizes(self) -> Float[Tensor, " d_sae"]:
        """||w_n||, the norm of the weights that expert n alone writes with; here of its row of W_dec."""
        return self.W_dec.reshape(self.cfg.d_sae, -1).norm(dim=-1)

    def check_expert(self, n: int) -> int:
        """n. Raises IndexError or TypeError where there is no expert n."""
        return int(expert_ids(self, n))

    # Weights

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
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
        self.scale_experts(target_scale)
        self.b_dec.mul_(target_scale)

    def scale_experts(self, factor: Float[Tensor, ""]) -> None:
        """Multiplies what the experts write, in place and without gradients."""
        self.W_dec.mul_(factor)

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

    def to_layer(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """x with the layer's dtype and on its device. Raises ValueError if it cannot be its input."""
        self.check_input(x)
        return x.to(self.W_enc)

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return super().process_sae_in(self.to_layer(sae_in))

    @override
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """a = TopK_k(relu(x W_enc + b_enc)), dense.

        The tensor returned carries its input with it: `decode(a)` uses x again as long as `a` lives.
        """
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(self.pre_activations(sae_in))
        feature_acts = self.hook_sae_acts_post(self.activate(hidden_pre))
        self.remember_input(feature_acts, sae_in)
        return feature_acts

    @property
    def decode_needs_input(self) -> bool:
        """Whether the output depends on the input beside the coefficients."""
        cls = type(self)
        return not self.writes_directions or any(
            getattr(cls, name) is not getattr(PairedTranscoder, name) for name in ("skip_out", "output")
        )

    def remember_input(self, feature_acts: Tensor, sae_in: Tensor) -> None:
        """Lets `decode` know the input of `feature_acts`, where it needs one."""
        if self.decode_needs_input:
            self._encoded.remember(feature_acts, sae_in)

    @override
    def decode(
        self,
        feature_acts: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_in"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """y = experts_out(mixture(a), expert_input(x)) + b_dec + skip_out(x).

        Args:
            feature_acts: a, [..., d_sae]: what `encode` returned, or an edited copy of it.
            x: the input, [..., d_in]. May be left out for the activations of an `encode`, and where the
                output does not depend on it, as in a transcoder without a skip connection.

        Raises:
            ValueError: x is left out and it is not certain which input the activations belong to,
                or the shapes do not fit.
        """
        if feature_acts.shape[-1] != self.cfg.d_sae:
            raise ValueError(
                f"expected activations [..., d_sae = {self.cfg.d_sae}], got {tuple(feature_acts.shape)}."
            )
        if x is not None:
            x = self.to_layer(x)
        # Where no input is needed, the activations give the shape.
        needed = x is not None or self.decode_needs_input
        sae_in = self._encoded.resolve(feature_acts, x) if needed else feature_acts
        return self.hook_sae_recons(self.output(self.mixture(Dense(feature_acts)), sae_in))

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """decode(encode(x)), with every hook point fired, on the device of x."""
        return self.hook_sae_output(self.decode(self.encode(x))).to(x.device)

    @override
    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature_acts = self.encode(x)
        return self.decode(feature_acts), feature_acts

    def active_experts(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch n"], Int[Tensor, "*batch n"]]:
        """The coefficients of the active experts and their ids; n is k, or the most that any token has.

        A token with fewer is filled up with experts whose coefficient is 0.
        """
        return self.coefficients(self.to_layer(x)).active()

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
            release: a local folder, a Hugging Face `user/repo`, or a name in SAELens' directory. The files
                may be of another library, as docs/guides/released.md lists them.
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
        if Path(release).expanduser().exists():
            folder, reader = locate(release, sae_id)
            return cls.load_from_disk(folder, device=device, dtype=dtype, converter=reader)
        directory = pretrained_saes_directory.get_pretrained_saes_directory()
        if sae_id is None and release in directory:
            ids = ", ".join(list(directory[str(release)].saes_map)[:5])
            raise FileNotFoundError(
                f"{release} is a release: name the layer too, by its sae_id. It has {ids}."
            )
        if sae_id is None or isinstance(release, Path):
            raise FileNotFoundError(
                f"{release} is not a folder; a release on the hub is named by its release and sae_id."
            )
        if "converter" in kwargs or "/" not in release or release in directory:
            with hub_errors(release):
                return super().from_pretrained(
                    release, sae_id, device, dtype or "float32", force_download, **kwargs
                )
        folder, reader = locate(release, sae_id, revision, force_download)
        return cls.load_from_disk(folder, device=device, dtype=dtype, converter=reader, **kwargs)


class TopK(topk_sae.TopK):
    """SAELens' TopK that chooses the same experts as the sparse gate, ties included."""

    @override
    def forward(self, x: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        rows = x.reshape(-1, x.shape[-1])
        values, experts = largest(rows, self.k)
        return torch.zeros_like(rows).scatter(-1, experts, values.relu()).view(x.shape)


def expert_by_expert(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same matrix, stored column by column: its gradient arises an expert at a time."""
    return W_enc.T.contiguous().T


class Architecture(NamedTuple):
    """An architecture's four classes."""

    layer: type[PairedTranscoder]
    config: type[PairedTranscoderConfig]
    training_layer: type[Any]
    """A `TrainingPairedTranscoder`."""
    training_config: type[Any]
    """A `TrainingPairedTranscoderConfig`."""


ARCHITECTURES: dict[str, Architecture] = {}
"""Every architecture that was registered, by its name."""


def register_architecture(
    layer: type[PairedTranscoder],
    config: type[PairedTranscoderConfig],
    training_layer: type[Any],
    training_config: type[Any],
) -> None:
    """Makes an architecture known here and to SAELens, by the name that its configuration gives it."""
    name = config.architecture()
    ARCHITECTURES[name] = Architecture(layer, config, training_layer, training_config)
    # SAELens' own functions refuse a name twice; assigning lets a module be loaded again.
    SAE_CLASS_REGISTRY[name] = (layer, config)
    SAE_TRAINING_CLASS_REGISTRY[name] = (training_layer, training_config)

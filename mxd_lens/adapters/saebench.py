"""Layers as SAEBench takes them: its evaluations on MxDs and transcoders.

SAEBench evaluates SAEs: it takes activations at one hook point, calls `encode` and `decode` on them and puts
the result back. A layer that reads an MLP's input and writes its output has two hook points, and is shown to
SAEBench at one of them:

"input"   activations are the MLP's input. For evaluations that encode and no more: sparse probing, and
          automatic interpretation.
"output"  activations are the MLP's output y, and `decode(encode(y))` is the layer's output, exactly what it
          puts in the MLP's place. For evaluations that compare, replace or ablate: core, absorption, TPP,
          SCR. `encode` finds the input that y came from by y's values: it was seen when the model ran.

An ordinary SAE has one hook point, and is the same at both.

    from sae_bench.evals.core import main as core

    with for_sae_bench(model, {"mxd": mxd, "transcoder": transcoder}) as selected:
        core.multiple_evals(selected, ..., output_folder="core", device="cpu")

Tested with sae-bench 0.6.0.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, Literal

import jaxtyping
import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE, SkipTranscoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedTransformer
from typing_extensions import Self, override

from mxd_lens.analysis.decomposition import dense_coefficients, expert_directions
from mxd_lens.architectures.inputs import EncodedInputs
from mxd_lens.evals.probing.probing import split
from mxd_lens.evals.probing.tasks import LabelledTexts
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import block_of, hook_point, hook_point_name

Side = Literal["input", "output"]

TOKENS_KEPT = 2**18
"""Tokens of which it is remembered which input an output came from."""


class InputsOfOutputs:
    """Which input each output of an MLP came from, over what a model has run lately.

    Found by value, bit for bit: SAEBench keeps activations, cuts them into other batches and encodes them
    later. Outputs that are equal came from inputs that the MLP does not tell apart.
    """

    def __init__(self, tokens_kept: int = TOKENS_KEPT) -> None:
        self.tokens_kept = tokens_kept
        self._input: Tensor | None = None
        self._input_of: OrderedDict[bytes, Tensor] = OrderedDict()

    def capture_input(self, _module: nn.Module, _args: Any, x: Tensor) -> None:
        self._input = x.detach()

    def capture_output(self, _module: nn.Module, _args: Any, y: Tensor) -> None:
        if self._input is None:
            return
        x, self._input = self._input, None
        for key, row in zip(keys_of(y), x.reshape(-1, x.shape[-1]), strict=True):
            self._input_of[key] = row
            self._input_of.move_to_end(key)
        while len(self._input_of) > self.tokens_kept:
            self._input_of.popitem(last=False)

    def of(self, y: Float[Tensor, "*batch d_out"], d_in: int) -> Float[Tensor, "*batch d_in"]:
        """The inputs of some outputs; zeros for zeros, which SAEBench writes over tokens that do not count.

        Raises:
            ValueError: an output was not seen, or too long ago.
        """
        nothing = y.new_zeros(d_in)
        blank = (y == 0).all(-1).flatten().tolist()
        rows = []
        for key, is_blank in zip(keys_of(y), blank, strict=True):
            row = nothing if is_blank else self._input_of.get(key)
            if row is None:
                raise ValueError(
                    "These activations are no output of the MLP that the model has computed among the last "
                    f"{self.tokens_kept:,} tokens. SAEBench must run the model itself, in float32 and "
                    "without activations saved by an earlier run; or raise tokens_kept."
                )
            rows.append(row)
        return torch.stack(rows).view(*y.shape[:-1], d_in) if rows else y.new_zeros(*y.shape[:-1], d_in)


def keys_of(y: Float[Tensor, "*batch d_out"]) -> list[bytes]:
    """A name for the values of each row."""
    rows = y.detach().reshape(-1, y.shape[-1]).contiguous().view(torch.uint8).cpu().numpy()
    return [np.ascontiguousarray(row).tobytes() for row in rows]


class SAEBenchLayer(nn.Module):
    """A layer as SAEBench takes an SAE; made by `for_sae_bench`.

    Rows of W_dec have unit norm, as SAEBench asks, and activations are larger by as much:
    a_n ||d_n|| and d_n / ||d_n||, where d_n is what a coefficient of 1 writes.
    """

    scale: Tensor
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def __init__(
        self,
        sae: SAE[Any],
        inputs: InputsOfOutputs | None,
        directions: Float[Tensor, "d_sae d_out"] | None = None,
    ) -> None:
        """
        Args:
            sae: the layer.
            inputs: where to find the input of an output; None to take inputs.
            directions: d_n; None for the rows of the layer's W_dec. An MxD's expert writes in another
                direction at every token: `ExpertStatistics.mean_direction()` is its mean.

        Raises:
            ValueError: SAELens' SkipTranscoder, whose decode loses its skip; or directions that do not fit.
        """
        super().__init__()
        if isinstance(sae, SkipTranscoder) and not knows_input(sae):
            raise ValueError(
                f"{type(sae).__name__} of SAELens decodes without its skip connection: load it as "
                f"mxd_lens.{type(sae).__name__}."
            )
        if directions is None:
            directions = expert_directions(sae)
        shape = (sae.cfg.d_sae, len(sae.b_dec))
        if directions.shape != shape:
            raise ValueError(f"expected one direction per expert, {shape}, got {tuple(directions.shape)}.")
        norms = directions.detach().nan_to_num().norm(dim=-1).to(sae.W_dec)
        self.sae = sae
        self.inputs = inputs
        self.register_buffer("scale", torch.where(norms > 0, norms, 1))
        self.register_buffer("W_dec", F.normalize(directions.detach().nan_to_num().to(sae.W_dec), dim=-1))
        self.register_buffer("W_enc", sae.W_enc.detach() * self.scale)
        self.register_buffer("b_enc", getattr(sae, "b_enc", torch.zeros_like(norms)).detach() * self.scale)
        self.register_buffer("b_dec", sae.b_dec.detach())
        # SAEBench writes its own settings into the configuration.
        self.cfg = deepcopy(sae.cfg)
        self._encoded = EncodedInputs()

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @override
    def to(self, *args: Any, **kwargs: Any) -> Self:
        self.sae.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def encode(self, activations: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_sae"]:
        """The experts' coefficients, times the norms of what they write.

        Raises:
            ValueError: at the output, of activations that the model has not computed lately.
        """
        x = activations if self.inputs is None else self.inputs.of(activations, self.sae.W_enc.shape[0])
        a = dense_coefficients(self.sae, x) * self.scale
        self._encoded.remember(a, x)
        return a

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """The layer's output, from what `encode` returned or an edited copy of it."""
        a, x = feature_acts / self.scale, self._encoded.resolve(feature_acts, None)
        return self.sae.decode(a, x) if knows_input(self.sae) else self.sae.decode(a)

    @override
    def forward(self, activations: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(activations))


def knows_input(sae: SAE[Any]) -> bool:
    """Whether the layer's decode takes the input too, as those of this package do."""
    return "x" in inspect.signature(sae.decode).parameters


@contextmanager
def for_sae_bench(
    model: HookedTransformer,
    saes: Mapping[str, SAE[Any]],
    at: Side = "output",
    tasks: Sequence[LabelledTexts] = (),
    directions: Mapping[str, Float[Tensor, "d_sae d_out"]] | None = None,
    tokens_kept: int = TOKENS_KEPT,
) -> Iterator[list[tuple[str, SAEBenchLayer]]]:
    """SAEBench on this model and these layers, while the context lasts.

    Inside, whatever model SAEBench loads is this one; `tasks` are data sets that its sparse probing and TPP
    know by their names; and absorption, which reads the residual stream behind a block, reads where the
    layers are shown instead.

    Args:
        model: a HookedTransformer: SAEBench takes no other.
        saes: the layers by name, of one MLP.
        at: which of a layer's hook points SAEBench sees: see the module.
        tasks: texts to probe on, as `load_task` gives them.
        directions: by name, what an expert writes on average. Absorption compares directions, and rows of
            an MxD's W_dec are none.
        tokens_kept: tokens of which it is remembered which input an output came from.

    Yields:
        What SAEBench calls selected_saes.

    Raises:
        ModuleNotFoundError: sae-bench is not installed.
        ValueError: a layer does not belong to the model, or they are of several MLPs.
    """
    if at not in ("input", "output"):
        raise ValueError(f"layers are shown to SAEBench at their 'input' or 'output', got {at!r}.")
    names = {hook_point_name(model, hook_names(sae)[at == "output"]) for sae in saes.values()}
    if len(names) != 1:
        raise ValueError(f"SAEBench takes layers of one hook point at a time, got {sorted(names)}.")
    for sae in saes.values():
        check_fits(model, sae)
    (shown_at,) = names
    with ExitStack() as stack:
        # Its shape annotations give one name to two sizes, which newer versions of beartype notice.
        stack.enter_context(replaced(jaxtyping.config, "jaxtyping_disable", True))
        # SAEBench keeps what it trains on a layer's activations under the model's name.
        stack.enter_context(replaced(model.cfg, "model_name", f"{model.cfg.model_name}-{shown_at}"))
        memories: dict[tuple[str, str], InputsOfOutputs] = {}
        selected = []
        for name, sae in saes.items():
            hooks = hook_names(sae)
            inputs = None
            if at == "output" and hooks[0] != hooks[1]:
                if hooks not in memories:
                    memories[hooks] = InputsOfOutputs(tokens_kept)
                    captures = memories[hooks].capture_input, memories[hooks].capture_output
                    for hook, capture in zip(hooks, captures, strict=True):
                        handle = hook_point(model, hook).register_forward_hook(capture, prepend=True)
                        stack.callback(handle.remove)
                inputs = memories[hooks]
            layer = SAEBenchLayer(sae, inputs, (directions or {}).get(name))
            metadata = layer.cfg.metadata
            metadata.hook_name, metadata.model_name = shown_at, model.cfg.model_name
            metadata.prepend_bos = metadata.prepend_bos is not False  # SAEBench takes no None
            selected.append((name, layer))
        load = lambda *_args, **_kwargs: model  # noqa: E731
        stack.enter_context(replaced(HookedTransformer, "from_pretrained_no_processing", load))
        stack.enter_context(replaced(model, "run_with_cache", renaming(model, shown_at)))
        if tasks:
            stack.enter_context(known_tasks(tasks))
        yield selected


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value for a while."""
    had_own, own = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, own)
        else:
            delattr(owner, name)


def renaming(model: HookedTransformer, shown_at: str) -> Any:
    """run_with_cache, where the residual stream behind the block means where the layers are shown."""
    run_with_cache = model.run_with_cache
    residual = f"blocks.{block_of(model, shown_at)[0]}.hook_resid_post"

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("names_filter") in (residual, [residual]):
            output, cache = run_with_cache(*args, **kwargs | {"names_filter": [shown_at]})
            cache.cache_dict[residual] = cache.cache_dict[shown_at]
            return output, cache
        return run_with_cache(*args, **kwargs)

    return run


@contextmanager
def known_tasks(tasks: Sequence[LabelledTexts]) -> Iterator[None]:
    """Texts under their names among the data sets that SAEBench knows; a class is an index of `balance`."""
    try:
        from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
        from sae_bench.sae_bench_utils import dataset_info, dataset_utils
    except ImportError as e:
        raise ModuleNotFoundError(
            "SAEBench is not installed, or lacks a package. It pins numpy < 2, and runs with what is here: "
            "pip install --no-deps sae-bench; pip install scikit-learn seaborn tabulate."
        ) from e
    by_name = {task.name: task for task in tasks}
    load = dataset_utils.get_multi_label_train_test_data

    def train_and_test(
        dataset_name: str, train_set_size: int, test_set_size: int, random_seed: int
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if dataset_name not in by_name:
            return load(dataset_name, train_set_size, test_set_size, random_seed)
        task = by_name[dataset_name]
        test = split(task, random_seed)
        # SAEBench sets one class against the rest, half of the texts each.
        return tuple(  # type: ignore[return-value]
            {label: of_class(task, label, test == is_test)[: size // 2] for label in task.balance}
            for is_test, size in ((False, train_set_size), (True, test_set_size))
        )

    with ExitStack() as stack:
        stack.enter_context(replaced(dataset_utils, "get_multi_label_train_test_data", train_and_test))
        for name, task in by_name.items():
            for known, value in (
                (dataset_info.chosen_classes_per_dataset, list(task.balance)),
                (scr_and_tpp.COLUMN2_VALS_LOOKUP, ("", "")),
            ):
                if name in known:
                    raise ValueError(f"SAEBench has a data set named {name!r} already.")
                known[name] = value
                stack.callback(known.pop, name)
        yield


def of_class(task: LabelledTexts, label: str, side: np.ndarray) -> list[str]:
    return [
        text
        for text, other, on_side in zip(task.texts, task.labels, side.tolist(), strict=True)
        if on_side and other == label
    ]

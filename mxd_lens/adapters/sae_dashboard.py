"""SAEDashboard's own pages about a layer's experts, and files in Neuronpedia's format.

SAEDashboard looks at features of an SAE: one hook point, one direction per feature. What it is shown of a
layer here, without anything of the layer being changed:

    activation    a_n as `encode` gives it, k and all, of the layer's input (the MLP's)
    direction     what a coefficient of 1 writes: c_n for a transcoder; for an MxD, whose experts write
                  another direction at every token, the mean of c_n * (D^T z) weighted by a_n
    logits        of that direction with the final norm's weight applied, as in `logit_lens`

What its pages do not show: how much of the output the experts make at all, and what the dense branch, the
skip connection and the bias do.

Its package asks for versions of transformers, transformer-lens, datasets and safetensors older than the ones
SAELens runs on, and for one more package, which it needs for another kind of layer. It runs without them:

    pip install dataclasses-json eindex-callum matplotlib
    pip install --no-deps sae-dashboard==0.8.0
"""

import contextlib
import importlib
import io
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK
from sae_lens.util import extract_layer_from_tlens_hook_name
from torch import Tensor

from mxd_lens.analysis.decomposition import dense_coefficients, expert_directions, writes_directions
from mxd_lens.analysis.firings import input_hook
from mxd_lens.analysis.logit_lens import direction_logits
from mxd_lens.analysis.statistics import ExpertStatistics, expert_statistics
from mxd_lens.architectures.base import expert_ids
from mxd_lens.artifacts.files import write_text
from mxd_lens.hooks.positions import in_slice
from mxd_lens.hooks.site import check_fits, hook_names
from mxd_lens.models import check_tokens, model_first, ordinary_tokens, special_token_ids

INSTALL = (
    "pip install 'dataclasses-json>=0.6.4' eindex-callum 'matplotlib>=3.8' && "
    "pip install --no-deps sae-dashboard==0.8.0"
)


@dataclass(frozen=True)
class SaeDashboard:
    """What `run_sae_dashboard` gathered, and the ways SAEDashboard has to write it down."""

    data: Any
    """SAEDashboard's SaeVisData: `data.feature_data_dict[n]` is everything about expert n."""
    sae: SAE[Any]
    """The layer."""
    n_prompts: int
    """Sequences it was gathered from."""
    n_tokens_in_prompt: int
    """Tokens in each."""

    def write_html(self, path: str | Path) -> Path:
        """Writes SAEDashboard's feature-centric page, with a menu of the experts.

        It draws with d3 and plotly, which the page fetches from the network when it is opened.

        Args:
            path: the file; its name ends in .html.
        """
        write = _imported("data_writing_fns").save_feature_centric_vis
        path = Path(path)
        if path.suffix != ".html":
            raise ValueError(f"SAEDashboard writes files whose name ends in .html, got {path.name!r}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(self.data, path)
        return path

    def write_neuronpedia(self, path: str | Path, sae_set: str, dataset: str = "") -> Path:
        """Writes the experts as one batch of features in Neuronpedia's JSON, by SAEDashboard's converter.

        Args:
            path: the file; Neuronpedia's own runner names them batch-0.json, batch-1.json, ...
            sae_set: the name of the set on Neuronpedia, the part of a source's id after the layer.
            dataset: the name of the text's data set.

        Raises:
            ValueError: the data has windows of the sequences instead of whole ones; or the layer is in no
                block of the model.
        """
        converter = _imported("neuronpedia.neuronpedia_converter").NeuronpediaConverter
        config = _imported("neuronpedia.neuronpedia_runner_config").NeuronpediaRunnerConfig
        if self.data.cfg.feature_centric_layout.seq_cfg.buffer is not None:
            raise ValueError(
                "Neuronpedia counts the positions of a token in the whole sequence: gather the data with "
                "run_sae_dashboard(..., context=None)."
            )
        model = self.data.model
        hook_name_out = hook_names(self.sae)[1]
        layer = extract_layer_from_tlens_hook_name(hook_name_out)
        if layer is None:
            raise ValueError(f"{hook_name_out} is in no block, and Neuronpedia sorts sources by block.")
        text = converter.convert_to_np_json(
            model,
            self.data,
            config(
                sae_set=sae_set,
                sae_path="",
                outputs_dir="",
                model_id=model.cfg.model_name,
                layer=layer,
                n_prompts_total=self.n_prompts,
                n_tokens_in_prompt=self.n_tokens_in_prompt,
                huggingface_dataset_path=dataset,
            ),
            {t: model.tokenizer.decode([t]) for t in range(model.cfg.d_vocab)},
        )
        json.loads(text, parse_constant=_refuse_constant)
        write_text(path, text)
        return Path(path)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"a number of these experts is {name}, which JSON does not have.")


@torch.no_grad()
@model_first
def run_sae_dashboard(
    model: Any,
    sae: SAE[Any],
    tokens: Int[Tensor, "sequences positions"],
    experts: int | Iterable[int] | Int[Tensor, " n"],
    context: int | None = 5,
    statistics: ExpertStatistics | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **settings: Any,
) -> SaeDashboard:
    """Runs SAEDashboard's `SaeVisRunner` on experts of a layer.

        pages = run_sae_dashboard(model, mxd, tokens, [5, 17, 41])
        pages.write_html("experts.html")

    For every layer of this package, attached to the model or not, and for SAELens' own. Tokens that the
    layer's training excluded are shown, and counted as tokens where no expert fires.

    Args:
        model: any hooked model.
        sae: the layer. Nothing of it is changed: its rows are not folded to unit norm either, so that an
            activation is the coefficient.
        tokens: token ids, one sequence a row.
        experts: which experts.
        context: tokens shown on either side of an activation; none is shown that lies nearer to an end of its
            sequence. None: the whole sequence, which `write_neuronpedia` needs.
        statistics: of the layer's use on a text, for an MxD's mean directions. None: of these tokens, in one
            more pass.
        batch_size: sequences in a forward pass.
        progress: whether to show progress bars.
        settings: what else SAEDashboard's SaeVisConfig takes.

    Raises:
        ModuleNotFoundError: sae-dashboard is not installed; the message is the command that installs it.
        IndexError: there is no such expert.
        ValueError: the layer does not belong to the model or reads something else than an MLP's input or the
            residual stream; the tokens are no ids, or too few for the context; an expert of an MxD fires on
            none of them; or the statistics are of another layer.
    """
    runner = _imported("sae_vis_runner").SaeVisRunner
    config = _imported("sae_vis_data").SaeVisConfig
    layout = _imported("layout").SaeVisLayoutConfig.default_feature_centric_layout()
    check_fits(model, sae)
    hook_point = _checked_input(model, sae)
    ids = expert_ids(sae, experts)
    if context is not None and context < 1:
        raise ValueError(f"context must be a positive number of tokens, or None for all, got {context}.")
    layout.seq_cfg.buffer = None if context is None else (context, context)
    settings = {"feature_centric_layout": layout} | settings
    _check_enough(tokens, settings["feature_centric_layout"].seq_cfg)
    if statistics is None and not writes_directions(sae):
        statistics = expert_statistics(model, sae, tokens, batch_size, progress=progress)
    defaults: dict[str, Any] = {
        "hook_point": hook_point,
        "features": ids.tolist(),
        "minibatch_size_tokens": batch_size,
        "device": str(sae.W_dec.device),
        "ignore_tokens": set(special_token_ids(model, sae.cfg.metadata.exclude_special_tokens)),
        "verbose": progress,
    }
    settings = defaults | settings
    seen = (
        SeenLayer(sae, _directions(sae, ids, statistics)),
        SeenModel(model, settings["ignore_tokens"], sae.cfg.metadata.seqpos_slice),
    )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints a table, empty
        warnings.filterwarnings("ignore", category=UserWarning, module="eindex")
        data = runner(config(**settings)).run(*seen, tokens=tokens)
    data.model, data.encoder = model, sae
    return SaeDashboard(data, sae, *tokens.shape)


def _checked_input(model: Any, sae: SAE[Any]) -> str:
    """The hook point of the layer's input, if SAEDashboard takes what the layer writes for what it is.

    It maps a direction into the residual stream by the name of the hook point that the layer reads.
    """
    name = input_hook(model, sae)
    read, written = hook_names(sae)
    if read != written and not re.search(r"mlp\.hook_in|hook_mlp_in|hook_normalized|_out|resid", name):
        raise ValueError(
            f"SAEDashboard would take what this layer writes at {written} for activations at {name}: it "
            "shows layers that read an MLP's input or the residual stream."
        )
    return name


def _check_enough(tokens: Int[Tensor, "sequences positions"], shown: Any) -> None:
    check_tokens(tokens)
    before, after = (shown.buffer[0] + 1, shown.buffer[1]) if shown.buffer else (0, 0)
    eligible = len(tokens) * max(tokens.shape[1] - before - after, 0)
    if eligible < shown.top_acts_group_size:
        raise ValueError(
            f"SAEDashboard shows the {shown.top_acts_group_size} largest activations, and tokens of shape "
            f"{tuple(tokens.shape)} have {eligible} with their context: use more or longer sequences, or a "
            "smaller context."
        )


def _directions(
    sae: SAE[Any], ids: Int[Tensor, " n"], statistics: ExpertStatistics | None
) -> Float[Tensor, "d_sae d_out"]:
    """What a coefficient of 1 writes, for every expert; on average, where that depends on the token."""
    if statistics is None or writes_directions(sae):
        return expert_directions(sae)
    statistics.check_is_of(sae)
    silent = ids[statistics.fired[ids] == 0].tolist()
    if silent:
        raise ValueError(
            f"{len(silent)} of these experts fire on none of the {statistics.n_tokens:,} tokens and have no "
            f"mean direction: {', '.join(map(str, silent[:5]))}{', ...' * (len(silent) > 5)}. Leave out "
            "what has statistics.fired == 0, or give the statistics of a longer text (expert_statistics)."
        )
    return statistics.mean_direction().nan_to_num(nan=0.0)


class SeenLayer:
    """A layer as SAEDashboard's runner reads it."""

    hook_z_reshaping_mode = False

    def __init__(self, sae: SAE[Any], directions: Float[Tensor, "d_sae d_out"]) -> None:
        self.sae = sae
        self.cfg = sae.cfg
        self.device = sae.W_dec.device
        self.W_dec = directions
        # A layer with this activation function is asked for all activations, of which the runner picks. Any
        # other it cuts down to the rows it is interested in, in ways it knows for SAELens' architectures.
        self.activation_fn = TopK(sae.cfg.d_sae)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """a; 0 where the input is, which is at the tokens that `SeenModel` leaves out."""
        return dense_coefficients(self.sae, x.to(self.W_dec)) * x.any(-1, keepdim=True)

    def fold_W_dec_norm(self) -> None:
        """Nothing: the runner asks for it, and a row of an MxD's C is no direction."""


class SeenModel:
    """A model as SAEDashboard's runner reads it.

    Its W_U has the final norm's weight in it: the runner multiplies directions with W_U, which is right where
    the norm is folded into it. And what is read of it is 0 at ignored tokens, and at positions outside the
    slice that the layer was trained on: the runner leaves these tokens out of what it shows and of the
    density, but would count what an expert does there in its correlations, and knows no slice.
    """

    def __init__(
        self, model: Any, ignored: Iterable[int], seqpos_slice: Sequence[int | None] | None = None
    ) -> None:
        self._model = model
        self._seqpos_slice = seqpos_slice
        self._ignored = sorted(ignored)
        self.W_U = direction_logits(model, torch.eye(len(model.W_U), device=model.W_U.device))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_with_hooks(
        self, tokens: Int[Tensor, "sequences positions"], fwd_hooks: list[tuple[str, Any]], **settings: Any
    ) -> Tensor:
        kept = ordinary_tokens(self._model, tokens, self._ignored) & in_slice(tokens, self._seqpos_slice)

        def of_kept(read: Any) -> Any:
            def hook_fn(x: Tensor, hook: Any) -> None:
                read(x * kept.view(*kept.shape, *[1] * (x.ndim - 2)).to(x.device), hook)

            return hook_fn

        hooks = [(name, of_kept(read)) for name, read in fwd_hooks]
        return self._model.run_with_hooks(tokens.to(self._model.cfg.device), fwd_hooks=hooks, **settings)


def _imported(module: str) -> Any:
    """A module of sae_dashboard.

    Raises:
        ModuleNotFoundError: it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(f"sae_dashboard.{module}")
    except ImportError as e:
        raise ModuleNotFoundError(
            f"SAEDashboard cannot be imported ({e}). It is installed with: {INSTALL}", name=e.name
        ) from e

"""Mixtures of Decoders and transcoders for SAELens and TransformerLens.

The names below are loaded when they are first used; the architectures and the bundled releases are
registered with SAELens when both packages are imported, in whichever order.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from mxd_lens.adapters.saelens_metrics import saelens_metrics
    from mxd_lens.analysis.concepts import find_experts
    from mxd_lens.analysis.graph import AttributionGraph, attribution_graph
    from mxd_lens.analysis.logit_lens import logit_lens
    from mxd_lens.analysis.prompt import top_experts
    from mxd_lens.analysis.statistics import ExpertStatistics, expert_statistics
    from mxd_lens.architectures import (
        MOLT,
        AffineMxD,
        AffineMxDConfig,
        AffineSkipMxD,
        AffineSkipMxDConfig,
        BatchTopKTranscoder,
        BatchTopKTranscoderConfig,
        JumpReLUSkipTranscoder,
        JumpReLUSkipTranscoderConfig,
        JumpReLUTranscoder,
        JumpReLUTranscoderConfig,
        MOLTConfig,
        MxD,
        MxDConfig,
        SkipMxD,
        SkipMxDConfig,
        SkipTranscoder,
        SkipTranscoderConfig,
        TopKSkipTranscoder,
        TopKSkipTranscoderConfig,
        TopKTranscoder,
        TopKTranscoderConfig,
        TrainingAffineMxD,
        TrainingAffineMxDConfig,
        TrainingAffineSkipMxD,
        TrainingAffineSkipMxDConfig,
        TrainingBatchTopKTranscoder,
        TrainingBatchTopKTranscoderConfig,
        TrainingJumpReLUSkipTranscoder,
        TrainingJumpReLUSkipTranscoderConfig,
        TrainingJumpReLUTranscoder,
        TrainingJumpReLUTranscoderConfig,
        TrainingMOLT,
        TrainingMOLTConfig,
        TrainingMxD,
        TrainingMxDConfig,
        TrainingSkipMxD,
        TrainingSkipMxDConfig,
        TrainingSkipTranscoder,
        TrainingSkipTranscoderConfig,
        TrainingTopKSkipTranscoder,
        TrainingTopKSkipTranscoderConfig,
        TrainingTopKTranscoder,
        TrainingTopKTranscoderConfig,
        matched_n_experts,
        matched_n_features,
    )
    from mxd_lens.dashboards.render import build_dashboard
    from mxd_lens.evals.ablation import AblationReport, ablation_study, what_experts_carry
    from mxd_lens.evals.check import LayerCheck, check_layer
    from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate
    from mxd_lens.evals.frontier import frontier
    from mxd_lens.evals.probing.probing import sparse_probing
    from mxd_lens.evals.replacement import ReplacementReport, evaluate_replacement
    from mxd_lens.evals.stability import stability
    from mxd_lens.hooks.positions import trained_positions
    from mxd_lens.hooks.replace import replacement_hooks
    from mxd_lens.hooks.replacement_model import ReplacementModel
    from mxd_lens.hooks.steer import ablate, steer
    from mxd_lens.lens import Lens
    from mxd_lens.models import load_model
    from mxd_lens.pretrained.formats.paper import load_reference_checkpoint
    from mxd_lens.pretrained.hub import push_to_hub
    from mxd_lens.pretrained.load import load_layer
    from mxd_lens.pretrained.registry import list_pretrained, register_release
    from mxd_lens.training.activations import PairedActivationsStore
    from mxd_lens.training.runner import TranscoderRunnerConfig, TranscoderTrainingRunner

__version__ = "0.1.0"

_MODULES = (
    "architectures",
    "models",
    "hooks.positions",
    "hooks.replace",
    "hooks.replacement_model",
    "hooks.steer",
    "pretrained.hub",
    "pretrained.formats.paper",
    "pretrained.load",
    "pretrained.registry",
    "analysis.prompt",
    "analysis.concepts",
    "analysis.statistics",
    "analysis.logit_lens",
    "analysis.card",
    "analysis.graph",
    "training.activations",
    "training.config",
    "training.runner",
    "evals.check",
    "evals.faithfulness",
    "evals.frontier",
    "evals.ablation",
    "evals.stability",
    "evals.replacement",
    "adapters.saelens_metrics",
    "dashboards.render",
    "lens",
    "evals.probing.probing",
)

__all__ = [
    "MOLT",
    "AblationReport",
    "AffineMxD",
    "AffineMxDConfig",
    "AffineSkipMxD",
    "AffineSkipMxDConfig",
    "AttributionGraph",
    "BatchTopKTranscoder",
    "BatchTopKTranscoderConfig",
    "ExpertStatistics",
    "FaithfulnessReport",
    "JumpReLUSkipTranscoder",
    "JumpReLUSkipTranscoderConfig",
    "JumpReLUTranscoder",
    "JumpReLUTranscoderConfig",
    "LayerCheck",
    "Lens",
    "MOLTConfig",
    "MxD",
    "MxDConfig",
    "PairedActivationsStore",
    "ReplacementModel",
    "ReplacementReport",
    "SkipMxD",
    "SkipMxDConfig",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "TopKSkipTranscoder",
    "TopKSkipTranscoderConfig",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingAffineMxD",
    "TrainingAffineMxDConfig",
    "TrainingAffineSkipMxD",
    "TrainingAffineSkipMxDConfig",
    "TrainingBatchTopKTranscoder",
    "TrainingBatchTopKTranscoderConfig",
    "TrainingJumpReLUSkipTranscoder",
    "TrainingJumpReLUSkipTranscoderConfig",
    "TrainingJumpReLUTranscoder",
    "TrainingJumpReLUTranscoderConfig",
    "TrainingMOLT",
    "TrainingMOLTConfig",
    "TrainingMxD",
    "TrainingMxDConfig",
    "TrainingSkipMxD",
    "TrainingSkipMxDConfig",
    "TrainingSkipTranscoder",
    "TrainingSkipTranscoderConfig",
    "TrainingTopKSkipTranscoder",
    "TrainingTopKSkipTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
    "TranscoderRunnerConfig",
    "TranscoderTrainingRunner",
    "ablate",
    "ablation_study",
    "attribution_graph",
    "build_dashboard",
    "check_layer",
    "evaluate",
    "evaluate_replacement",
    "expert_card",
    "expert_statistics",
    "find_experts",
    "frontier",
    "list_pretrained",
    "load_layer",
    "load_model",
    "load_reference_checkpoint",
    "logit_lens",
    "matched_n_experts",
    "matched_n_features",
    "push_to_hub",
    "register_release",
    "replacement_hooks",
    "saelens_metrics",
    "sparse_probing",
    "stability",
    "steer",
    "top_experts",
    "trained_positions",
    "what_experts_carry",
]


_RENAMED = {"CarryReport": "AblationReport"}
"""Former public names, which work for one more version."""
_RETIRED = {
    "autointerp": "Explanations are scored by mxd_lens.evals.detection, or by delphi, for which "
    "mxd_lens.adapters.delphi writes the files."
}
"""Public names of the version before that have gone, and what to use instead."""


def __getattr__(name: str) -> Any:
    if name in _RETIRED:
        raise ImportError(f"mxd_lens.{name} is gone. {_RETIRED[name]}")
    if name in _RENAMED:
        warnings.warn(
            f"mxd_lens.{name} is called {_RENAMED[name]} now; the old name ends with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        name = _RENAMED[name]
    if name in __all__:
        for module_name in _MODULES:
            module = importlib.import_module(f"{__name__}.{module_name}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _tell_saelens(_: Any) -> None:
    importlib.import_module("mxd_lens.architectures")
    importlib.import_module("mxd_lens.pretrained.registry").register_with_saelens()
    importlib.import_module("mxd_lens.pretrained.saelens_loaders").register_with_saelens()


# `SAE.load_from_disk` and `SAE.from_pretrained` must know the architectures and the releases, and
# `mxd-lens --help` must not wait for SAELens: they are registered now if SAELens is there, else when it is.
wrapt.register_post_import_hook(_tell_saelens, "sae_lens")

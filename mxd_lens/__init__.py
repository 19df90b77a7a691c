"""Mixtures of Decoders and transcoders for SAELens and TransformerLens.

The names below are loaded when they are first used; the architectures are registered with SAELens
when both packages are imported, in whichever order.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from mxd_lens.architectures import (
        MxD,
        MxDConfig,
        SkipMxD,
        SkipMxDConfig,
        TopKSkipTranscoder,
        TopKSkipTranscoderConfig,
        TopKTranscoder,
        TopKTranscoderConfig,
        TrainingMxD,
        TrainingMxDConfig,
        TrainingSkipMxD,
        TrainingSkipMxDConfig,
        TrainingTopKSkipTranscoder,
        TrainingTopKSkipTranscoderConfig,
        TrainingTopKTranscoder,
        TrainingTopKTranscoderConfig,
        matched_n_experts,
        matched_n_features,
    )
    from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate
    from mxd_lens.evals.frontier import frontier
    from mxd_lens.hooks import replacement_hooks
    from mxd_lens.models import load_model
    from mxd_lens.pretrained.reference import load_reference_checkpoint
    from mxd_lens.training.activations import PairedActivationsStore
    from mxd_lens.training.runner import TranscoderRunnerConfig, TranscoderTrainingRunner

__version__ = "0.1.0"

_MODULES = (
    "architectures",
    "models",
    "hooks",
    "pretrained.reference",
    "training.activations",
    "training.runner",
    "evals.faithfulness",
    "evals.frontier",
)

__all__ = [
    "FaithfulnessReport",
    "MxD",
    "MxDConfig",
    "PairedActivationsStore",
    "SkipMxD",
    "SkipMxDConfig",
    "TopKSkipTranscoder",
    "TopKSkipTranscoderConfig",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingMxD",
    "TrainingMxDConfig",
    "TrainingSkipMxD",
    "TrainingSkipMxDConfig",
    "TrainingTopKSkipTranscoder",
    "TrainingTopKSkipTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
    "TranscoderRunnerConfig",
    "TranscoderTrainingRunner",
    "evaluate",
    "frontier",
    "load_model",
    "load_reference_checkpoint",
    "matched_n_experts",
    "matched_n_features",
    "replacement_hooks",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module_name in _MODULES:
            module = importlib.import_module(f"{__name__}.{module_name}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# `SAE.load_from_disk` must know the architectures, and `mxd-lens --help` must not wait for SAELens:
# they are registered now if SAELens is there, else when it is.
wrapt.register_post_import_hook(lambda _: importlib.import_module("mxd_lens.architectures"), "sae_lens")

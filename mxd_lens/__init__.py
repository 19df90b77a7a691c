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
        TopKSkipTranscoder,
        TopKSkipTranscoderConfig,
        TopKTranscoder,
        TopKTranscoderConfig,
        TrainingMxD,
        TrainingMxDConfig,
        TrainingTopKSkipTranscoder,
        TrainingTopKSkipTranscoderConfig,
        TrainingTopKTranscoder,
        TrainingTopKTranscoderConfig,
        matched_n_experts,
    )
    from mxd_lens.evals.faithfulness import FaithfulnessReport, evaluate
    from mxd_lens.hooks import replacement_hooks
    from mxd_lens.models import load_model
    from mxd_lens.training.activations import PairedActivationsStore
    from mxd_lens.training.runner import TranscoderRunnerConfig, TranscoderTrainingRunner

__version__ = "0.1.0"

_MODULE_OF = {
    "MxD": "architectures",
    "MxDConfig": "architectures",
    "TopKSkipTranscoder": "architectures",
    "TopKSkipTranscoderConfig": "architectures",
    "TopKTranscoder": "architectures",
    "TopKTranscoderConfig": "architectures",
    "TrainingTopKSkipTranscoder": "architectures",
    "TrainingTopKSkipTranscoderConfig": "architectures",
    "TrainingTopKTranscoder": "architectures",
    "TrainingTopKTranscoderConfig": "architectures",
    "TrainingMxD": "architectures",
    "TrainingMxDConfig": "architectures",
    "matched_n_experts": "architectures",
    "FaithfulnessReport": "evals.faithfulness",
    "evaluate": "evals.faithfulness",
    "replacement_hooks": "hooks",
    "load_model": "models",
    "PairedActivationsStore": "training.activations",
    "TranscoderRunnerConfig": "training.runner",
    "TranscoderTrainingRunner": "training.runner",
}

__all__ = [
    "FaithfulnessReport",
    "MxD",
    "MxDConfig",
    "PairedActivationsStore",
    "TopKSkipTranscoder",
    "TopKSkipTranscoderConfig",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "TrainingMxD",
    "TrainingMxDConfig",
    "TrainingTopKSkipTranscoder",
    "TrainingTopKSkipTranscoderConfig",
    "TrainingTopKTranscoder",
    "TrainingTopKTranscoderConfig",
    "TranscoderRunnerConfig",
    "TranscoderTrainingRunner",
    "evaluate",
    "load_model",
    "matched_n_experts",
    "replacement_hooks",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# `SAE.load_from_disk` must know the architectures, and `mxd-lens --help` must not wait for SAELens:
# they are registered now if SAELens is there, else when it is.
wrapt.register_post_import_hook(lambda _: importlib.import_module("mxd_lens.architectures"), "sae_lens")

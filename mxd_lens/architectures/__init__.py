"""The architectures, registered with SAELens when this module is imported."""

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from mxd_lens.architectures.mxd import (
    MxD,
    MxDConfig,
    TrainingMxD,
    TrainingMxDConfig,
    matched_n_experts,
)
from mxd_lens.architectures.released import JumpReLUSkipTranscoder, SkipTranscoder
from mxd_lens.architectures.skip_mxd import (
    SkipMxD,
    SkipMxDConfig,
    TrainingSkipMxD,
    TrainingSkipMxDConfig,
)
from mxd_lens.architectures.topk_skip_transcoder import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TrainingTopKSkipTranscoder,
    TrainingTopKSkipTranscoderConfig,
    matched_n_features,
)
from mxd_lens.architectures.topk_transcoder import (
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
)

ARCHITECTURES = (
    (MxD, MxDConfig, TrainingMxD, TrainingMxDConfig),
    (SkipMxD, SkipMxDConfig, TrainingSkipMxD, TrainingSkipMxDConfig),
    (TopKTranscoder, TopKTranscoderConfig, TrainingTopKTranscoder, TrainingTopKTranscoderConfig),
    (
        TopKSkipTranscoder,
        TopKSkipTranscoderConfig,
        TrainingTopKSkipTranscoder,
        TrainingTopKSkipTranscoderConfig,
    ),
)

# SAELens' own functions refuse a name twice; assigning lets this module be reloaded.
for inference, inference_config, training, training_config in ARCHITECTURES:
    SAE_CLASS_REGISTRY[inference_config.architecture()] = (inference, inference_config)
    SAE_TRAINING_CLASS_REGISTRY[training_config.architecture()] = (training, training_config)

__all__ = [
    "ARCHITECTURES",
    "JumpReLUSkipTranscoder",
    "MxD",
    "MxDConfig",
    "SkipMxD",
    "SkipMxDConfig",
    "SkipTranscoder",
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
    "matched_n_experts",
    "matched_n_features",
]

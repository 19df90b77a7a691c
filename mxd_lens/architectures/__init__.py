"""The architectures, registered with SAELens when this module is imported."""

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from mxd_lens.architectures.mxd import (
    MxD,
    MxDConfig,
    TrainingMxD,
    TrainingMxDConfig,
    matched_n_experts,
)

# SAELens' own functions refuse a name twice; assigning lets this module be reloaded.
for inference, training in [((MxD, MxDConfig), (TrainingMxD, TrainingMxDConfig))]:
    SAE_CLASS_REGISTRY[inference[1].architecture()] = inference
    SAE_TRAINING_CLASS_REGISTRY[training[1].architecture()] = training

__all__ = ["MxD", "MxDConfig", "TrainingMxD", "TrainingMxDConfig", "matched_n_experts"]

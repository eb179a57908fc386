"""Every knob of a run with its unit and its reason, as strict frozen models.

No class path and no code stands in a config; a component receives its own section only. Numbers that follow
from others (micro-batches, DeepSpeed's JSON, latent sizes) are computed, never set. Reading files, overrides
and error lines are `pipeline.config_file`'s job.
"""

from pipeline.config.cluster import ClusterConfig
from pipeline.config.data import DataConfig, MixedSet
from pipeline.config.ema import EmaConfig
from pipeline.config.encode import EncodeConfig, FilterRule
from pipeline.config.engine import EngineConfig, OptimizerConfig
from pipeline.config.first_stage import (
    AdversarialConfig,
    AutoencoderConfig,
    ClipConfig,
    FirstStageConfig,
    PerceptualConfig,
)
from pipeline.config.health import HealthConfig
from pipeline.config.model import UNetConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.outcome import EvaluateConfig, SampleConfig, TrackingConfig
from pipeline.config.run import RunConfig
from pipeline.config.train import TrainConfig
from pipeline.config.warm_start import WarmStartConfig

__all__ = [
    "AdversarialConfig",
    "AutoencoderConfig",
    "ClipConfig",
    "ClusterConfig",
    "DataConfig",
    "EmaConfig",
    "EncodeConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FilterRule",
    "FirstStageConfig",
    "HealthConfig",
    "MixedSet",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PerceptualConfig",
    "RunConfig",
    "SampleConfig",
    "TrackingConfig",
    "TrainConfig",
    "UNetConfig",
    "WarmStartConfig",
]

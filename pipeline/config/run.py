"""One run: all sections together."""

from pydantic import Field

from pipeline.config.base import Count, Name, Section
from pipeline.config.cluster import ClusterConfig
from pipeline.config.data import DataConfig
from pipeline.config.ema import EmaConfig
from pipeline.config.encode import EncodeConfig
from pipeline.config.engine import EngineConfig, OptimizerConfig
from pipeline.config.first_stage import FirstStageConfig
from pipeline.config.model import UNetConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.outcome import EvaluateConfig, SampleConfig, TrackingConfig
from pipeline.config.train import TrainConfig


class RunConfig(Section):
    """One run, from source images to pictures. Paths are relative to the folder the command runs in."""

    name: Name
    seed: Count = 0
    runs: str = Field("runs", description="folder of the run folders")
    data: DataConfig = DataConfig()
    encode: EncodeConfig
    first_stage: FirstStageConfig | None = Field(
        None, description="null = both encoders come from local folders"
    )
    model: UNetConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig
    ema: EmaConfig = EmaConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

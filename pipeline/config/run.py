"""One run: all sections together."""

from typing import Self

from pydantic import Field, model_validator

from pipeline.config.base import Count, Name, Section
from pipeline.config.cluster import ClusterConfig
from pipeline.config.data import DataConfig
from pipeline.config.ema import EmaConfig
from pipeline.config.encode import EncodeConfig
from pipeline.config.engine import EngineConfig, OptimizerConfig
from pipeline.config.first_stage import FirstStageConfig
from pipeline.config.health import HealthConfig
from pipeline.config.model import UNetConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.outcome import EvaluateConfig, SampleConfig, TrackingConfig, sampler_problem
from pipeline.config.train import TrainConfig
from pipeline.config.warm_start import WarmStartConfig


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
    warm_start: WarmStartConfig | None = Field(
        None, description="weights to begin with; null = drawn at random"
    )
    train: TrainConfig
    health: HealthConfig = HealthConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def autoencoder_source(self) -> EncodeConfig:
        """`encode` with the filters of the autoencoder's own pictures: it may learn from more than the run trains on."""
        filters = self.first_stage.autoencoder.filters if self.first_stage else None
        return self.encode if filters is None else self.encode.model_copy(update={"filters": filters})

    @property
    def first_stage_threads(self) -> int:
        """CPU threads of each of `first_stage.processes`: together they take the cores that the U-Net will have."""
        processes = self.first_stage.processes if self.first_stage else 1
        return max(1, self.engine.processes * self.engine.threads // processes)

    @model_validator(mode="after")
    def _sampler_runs_the_objective(self) -> Self:
        problem = sampler_problem(self.sample.sampler, self.objective)
        if problem:
            raise ValueError(f"sample.sampler: {problem}")
        return self

    @model_validator(mode="after")
    def _frozen_weights_come_from_somewhere(self) -> Self:
        if self.train.freeze and self.warm_start is None:
            raise ValueError(
                "train.freeze keeps weights as they come from warm_start, which is null: set warm_start.source"
            )
        return self

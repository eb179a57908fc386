"""Weights to begin with."""

from typing import Self

from pydantic import Field, model_validator

from pipeline.config.base import Count, Section


class WarmStartConfig(Section):
    """Where the first weights of a run come from. Once the run has a checkpoint of its own this is not read again."""

    source: str = Field(description="a run folder, one of its checkpoints, or a diffusers pipeline or U-Net")
    weights: str = Field("ema", description="of a run: ema, another average it keeps, or raw")
    step: Count | None = Field(None, description="of a run: the checkpoint to take; null = its newest")
    optimizer: bool = Field(
        False, description="go on as that run would: Adam's moments, averages, step and place in the data too"
    )

    @model_validator(mode="after")
    def _moments_belong_to_raw_weights(self) -> Self:
        if self.optimizer and self.weights != "raw":
            raise ValueError(
                f"optimizer true needs weights raw, not {self.weights}: Adam's moments are those of the raw weights"
            )
        return self

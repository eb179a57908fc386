"""The length of a training and what happens between its steps."""

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Positive, Section


class TrainConfig(Section):
    """Length of the training and what happens between steps."""

    steps: Positive = Field(description="optimizer steps")
    freeze: tuple[str, ...] = Field(
        (), description="patterns such as down_blocks.*: weights that stay as warm_start brought them"
    )
    log_every: Positive = Field(10, description="steps between records")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints")
    checkpoint_every_seconds: float | None = Field(
        None, gt=0.0, description="a checkpoint also this long after the last one; null = by steps alone"
    )
    keep_last: Annotated[int, Field(ge=2)] = Field(
        3, description="checkpoints kept; two, so that one may be damaged"
    )
    keep_every: Positive | None = Field(
        None, description="steps between checkpoints that are kept for good beside the last ones; null = none"
    )
    max_seconds: float | None = Field(
        None, gt=0.0, description="save and leave with exit code 75 after this long"
    )

"""The length of a training and what happens between its steps."""

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Positive, Section


class TrainConfig(Section):
    """Length of the training and what happens between steps."""

    steps: Positive = Field(description="optimizer steps")
    log_every: Positive = Field(10, description="steps between records")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints")
    keep_last: Annotated[int, Field(ge=2)] = Field(
        3, description="checkpoints kept; two, so that one may be damaged"
    )
    max_seconds: float | None = Field(
        None, gt=0.0, description="save and leave with exit code 75 after this long"
    )
    max_skipped_in_a_row: Positive = Field(
        5, description="non-finite steps before the run ends with exit code 5"
    )

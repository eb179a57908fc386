"""The averages of the weights."""

from pydantic import Field

from pipeline.config.base import Section


class EmaConfig(Section):
    """The moving average of the fp32 masters that sampling uses."""

    decay: float = Field(0.9999, gt=0.0, lt=1.0, description="d after the ramp")
    ramp: bool = Field(True, description="min(d, (1 + s) / (10 + s)): short runs forget their start")

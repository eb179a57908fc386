"""The averages of the weights."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Positive, Section

Decay = Annotated[float, Field(gt=0.0, lt=1.0)]
# Above 12^-1/2 = 0.2887, the width of the plain mean, no power function with a positive exponent is that wide.
Width = Annotated[float, Field(gt=0.0, lt=0.28)]


class PosthocConfig(Section):
    """Power-function averages whose snapshots let `ldm ema` make an average of any length after the training."""

    sigma_rel: tuple[Width, ...] = Field(
        (0.05, 0.10),
        min_length=1,
        description="widths, as a part of the training so far; each costs 4 B/param",
    )
    snapshot_every: Positive = Field(
        description="steps between snapshots; each keeps 4 B/param a width for good"
    )


class EmaConfig(Section):
    """The moving averages of the fp32 masters that sampling uses."""

    decay: Decay = Field(0.9999, description='of "ema", after the ramp, for one applied step')
    more_decays: tuple[Decay, ...] = Field(
        (), description='further averages, named "ema-0.999"; 4 B/param each'
    )
    ramp: Literal["none", "ldm", "power"] = Field(
        "ldm",
        description="ldm: at most (1 + s) / (10 + s), power: at most 1 - (1 + s)^(-2/3): short runs forget their start",
    )
    every: Positive = Field(1, description="applied steps between updates; the decay is raised to that power")
    posthoc: PosthocConfig | None = Field(None, description="null = no snapshots")

    @field_validator("ramp", mode="before")
    @classmethod
    def _name_the_ramp(cls, ramp: Any) -> Any:
        """Read what the first checkpoints say: there was one ramp, on or off."""
        return {True: "ldm", False: "none"}[ramp] if isinstance(ramp, bool) else ramp

    @model_validator(mode="after")
    def _refuse_doubles(self) -> Self:
        decays = (self.decay, *self.more_decays)
        widths = self.posthoc.sigma_rel if self.posthoc else ()
        for name, values in (("decay and more_decays", decays), ("posthoc.sigma_rel", widths)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} hold the same value twice: {values}")
        return self

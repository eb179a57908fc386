"""What the network predicts, of which noise."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Fraction, Positive, Section


class ObjectiveConfig(Section):
    """What the network predicts, and the noise schedule shared by training and sampling."""

    prediction: Literal["epsilon", "v_prediction"] = Field(
        "epsilon", description="DDPM's noise, or Salimans' v"
    )
    schedule: Literal["scaled_linear", "linear"] = Field(
        "scaled_linear", description="LDM's betas: linear in sqrt"
    )
    timesteps: Positive = Field(1000, description="T of the discrete schedule")
    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)
    timestep_draw: Literal["uniform", "stratified"] = Field(
        "stratified",
        description="stratified over each global batch lowers the variance of the loss for nothing",
    )
    caption_dropout: Fraction = Field(
        0.1, description="share of captions replaced by the null text, for guidance"
    )

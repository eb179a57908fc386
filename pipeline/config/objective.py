"""What the network predicts, of which noise."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Fraction, Positive, Section


class ObjectiveConfig(Section):
    """What the network predicts, and the noise schedule shared by training and sampling."""

    prediction: Literal["epsilon", "v_prediction", "x0", "flow"] = Field(
        "epsilon", description="DDPM's noise, Salimans' v, the clean latents, or rectified flow's velocity"
    )
    schedule: Literal["scaled_linear", "linear", "cosine"] = Field(
        "scaled_linear",
        description="LDM's betas are linear in sqrt; a flow has straight lines and ignores it",
    )
    timesteps: Positive = Field(1000, description="T of the discrete schedule")
    beta_start: float = Field(0.00085, gt=0.0, lt=1.0)
    beta_end: float = Field(0.012, gt=0.0, lt=1.0)
    zero_terminal_snr: bool = Field(
        False, description="the last step is pure noise, so that very dark and bright pictures can be painted"
    )
    flow_shift: float = Field(1.0, gt=0.0, description="flow only: above 1 trains and samples at more noise")
    flow_shift_side: Positive | None = Field(
        None,
        description="latent side at which flow_shift holds; it grows with the side of the latents (SD3: 32)",
    )
    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased"] = Field(
        "none", description="how much each noise level counts; min_snr with gamma 5 learns faster"
    )
    snr_gamma: float = Field(5.0, gt=0.0, description="gamma of min_snr and soft_min_snr")
    offset_noise: float = Field(
        0.0, ge=0.0, le=1.0, description="std of noise that is constant over a channel; about 0.05 if used"
    )
    input_perturbation: float = Field(
        0.0, ge=0.0, le=1.0, description="extra noise in the input but not in the target; about 0.1 if used"
    )
    timestep_draw: Literal["uniform", "stratified"] = Field(
        "stratified",
        description="stratified over each global batch lowers the variance of the loss for nothing",
    )
    timestep_density: Literal["uniform", "logit_normal", "mode"] = Field(
        "uniform", description="which times are trained more often; SD3 found logit_normal best for flow"
    )
    logit_mean: float = Field(0.0, description="of timestep_density logit_normal; negative = less noise")
    logit_std: float = Field(1.0, gt=0.0, description="of timestep_density logit_normal")
    mode_scale: float = Field(1.29, ge=-1.0, le=1.75, description="of timestep_density mode; SD3's value")
    caption_dropout: Fraction = Field(
        0.1, description="share of captions replaced by the null text, for guidance"
    )

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        if self.zero_terminal_snr and self.prediction in ("epsilon", "flow"):
            raise ValueError(
                f"zero_terminal_snr goes with v_prediction or x0, not with {self.prediction}: "
                "the noise says nothing of the picture where there is only noise, and a flow ends there by itself"
            )
        if self.prediction != "flow" and (self.flow_shift != 1.0 or self.flow_shift_side is not None):
            raise ValueError(f"flow_shift goes with prediction flow, not with {self.prediction}")
        return self

"""The models that are trained before the data is encoded."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Count, Positive, Section
from pipeline.config.encode import FilterRule


class PerceptualConfig(Section):
    """The distance in the features of a frozen network, as a term of the autoencoder's loss."""

    weight: float = Field(
        0.0, ge=0.0, description="against L1 (LDM: 1.0); 0 = off: no network is trained or read"
    )
    network: str | None = Field(
        None,
        description="local folder of a feature network (docs/first_stage.md says its layout); null = one is trained "
        "here, to tell the pictures apart",
    )
    width: Positive = Field(32, description="channels of the first of three halvings; the others double it")
    batch: Positive = Field(64, description="pictures a step, two views each")
    steps: Positive = Field(300, description="optimizer steps of the network trained here")


class AdversarialConfig(Section):
    """A patch discriminator, as a term of the autoencoder's loss."""

    weight: float = Field(
        0.0, ge=0.0, description="times the ratio of the gradients at the last layer (LDM: 0.5); 0 = off"
    )
    start: Count = Field(
        1000, description="steps before the discriminator learns and counts (LDM: 50001 steps of batch 12)"
    )
    width: Positive = Field(32, description="channels of the first halving; the others double it (LDM: 64)")
    layers: Positive = Field(3, description="halvings: 3 = patches of 46 pixels")
    learning_rate: float = Field(5e-4, gt=0.0, description="AdamW of the discriminator, same schedule")


class AutoencoderConfig(Section):
    """The first stage: a KL autoencoder trained on the source images, then frozen."""

    filters: tuple[FilterRule, ...] | None = Field(
        None, description="conditions on columns, for its pictures alone; null = those of encode.filters"
    )
    latent_channels: Positive = Field(4, description="channels of the latent")
    block_out_channels: tuple[Positive, ...] = Field(
        (128, 256, 512, 512), description="widths; each but one halves"
    )
    layers_per_block: Positive = Field(2, description="residual blocks a level")
    norm_num_groups: Positive = Field(32, description="groups of GroupNorm")
    mid_block_attention: bool = Field(True, description="self-attention at the lowest resolution")
    kl_weight: float = Field(1e-6, ge=0.0, description="weight of the KL term against L1 (LDM: 1e-6)")
    gradient_weight: float = Field(
        0.0, ge=0.0, description="weight of the L1 between pixel differences against L1: edges"
    )
    perceptual: PerceptualConfig = Field(
        default_factory=PerceptualConfig, description="distance in the features of a network"
    )
    adversarial: AdversarialConfig = Field(
        default_factory=AdversarialConfig, description="patch discriminator"
    )
    crop: Positive | None = Field(
        None,
        description="pixels of the random square that a step sees of a picture; null = the whole picture",
    )
    ema_decay: float = Field(
        0.999, ge=0.0, lt=1.0, description="of the published weights' average, after a ramp; 0 = off"
    )
    learning_rate: float = Field(1e-3, gt=0.0, description="AdamW, cosine to zero")
    batch: Positive = Field(8, description="images a step over all processes")
    steps: Positive = Field(description="optimizer steps")
    warmup_steps: Count = Field(50, description="linear warm-up steps")
    clip_grad_norm: float = Field(1.0, gt=0.0, description="bound of the gradient's norm")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast type of the training")
    checkpoint_every: Positive = Field(200, description="steps between resumable checkpoints")
    log_every: Positive = Field(20, description="steps between records")

    @property
    def downsampling(self) -> int:
        """Pixels of the image side per latent side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @model_validator(mode="after")
    def _crop_is_whole_latents(self) -> Self:
        if self.crop is not None and self.crop % self.downsampling:
            raise ValueError(f"crop {self.crop} is not a multiple of the downsampling {self.downsampling}")
        return self


class ClipConfig(Section):
    """A small CLIP trained on the source pairs, whose text tower conditions the U-Net."""

    width: Positive = Field(
        128, description="width of both towers and of the text states the U-Net attends to"
    )
    vision_layers: Positive = Field(3, description="transformer layers over patches")
    text_layers: Positive = Field(2, description="transformer layers over tokens")
    heads: Positive = Field(4, description="attention heads; divides the width")
    patch: Positive = Field(16, description="pixels of a patch side")
    vocabulary: Positive = Field(
        2048, description="entries of the byte-pair encoding trained on the captions"
    )
    max_tokens: Positive = Field(24, description="text length L with start and end tokens")
    learning_rate: float = Field(1e-3, gt=0.0, description="AdamW, cosine to zero")
    batch: Positive = Field(96, description="pairs a step: the contrastive negatives")
    steps: Positive = Field(description="optimizer steps")
    warmup_steps: Count = Field(50, description="linear warm-up steps")
    checkpoint_every: Positive = Field(200, description="steps between resumable checkpoints")
    log_every: Positive = Field(20, description="steps between records")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class FirstStageConfig(Section):
    """Models trained before the data is encoded, for those who have none for their domain."""

    processes: Positive = Field(
        1,
        description="processes that `ldm train-autoencoder` and `ldm train-clip` start by themselves on this machine; they "
        "share a step's batch",
    )
    autoencoder: AutoencoderConfig
    clip: ClipConfig

    def batch_problems(self) -> list[str]:
        """Return a line for each batch that the processes cannot share evenly."""
        batches = {"autoencoder": self.autoencoder.batch, "clip": self.clip.batch}
        if self.autoencoder.perceptual.weight and self.autoencoder.perceptual.network is None:
            batches["autoencoder.perceptual"] = self.autoencoder.perceptual.batch
        return [
            f"first_stage.{name}.batch {batch} is not a multiple of first_stage.processes {self.processes}; choose one"
            for name, batch in batches.items()
            if batch % self.processes
        ]

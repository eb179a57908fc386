"""From image-caption shards to a latent data set."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Fraction, Positive, Section


class EncodeConfig(Section):
    """Image-caption shards in, latent data set out."""

    source: str = Field(
        description="folder of img2dataset shards, or of images with .txt captions beside them"
    )
    autoencoder: str | None = Field(
        None, description="diffusers AutoencoderKL folder; null = RUN/autoencoder"
    )
    text_encoder: str | None = Field(None, description="transformers text folder; null = RUN/text_encoder")
    image_size: Positive = Field(description="pixels of the square side after resize and centre crop")
    latent: Literal["moments", "mean"] = Field(
        "moments", description="moments re-sample the posterior each visit"
    )
    text: Literal["embeddings", "tokens"] = Field(
        "embeddings",
        description="embeddings cost 118 KB a caption (CLIP-L), tokens 154 B and 0.5-2.5 % of a step",
    )
    max_captions: Positive = Field(1, description="captions kept a sample; surplus is counted")
    batch: Positive = Field(16, description="images encoded at once; part of the fingerprint")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute type of the frozen encoders")
    validation_samples: Count = Field(
        64, description="pairs with the smallest key hash are kept from training, so the choice never moves"
    )
    background: tuple[int, int, int] = Field(
        (255, 255, 255), description="RGB 0-255 under transparent pixels"
    )
    min_side: Positive = Field(1, description="pixels; smaller originals are rejected(too_small)")
    max_aspect: float = Field(4.0, ge=1.0, description="longer over shorter side; beyond is rejected(aspect)")
    max_pixels: Positive = Field(64_000_000, description="pixels; larger are rejected before decoding")
    max_failed_fraction: Fraction = Field(0.01, description="failed(error) above this share stops the job")

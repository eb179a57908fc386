"""From image-caption shards to a latent data set."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Count, Fraction, Positive, Section

Value = str | int | float | bool
Side = Positive


class FilterRule(Section):
    """One condition on a column of the input's json or tables; a sample that breaks it is rejected(reason)."""

    column: str = Field(description="name in the sample's json, or in the table beside the pictures")
    reason: str = Field(
        pattern=r"^[a-z][a-z0-9_]{0,39}$", description="what the counts call it, as low_aesthetic"
    )
    min: float | None = Field(None, description="smallest number that is kept")
    max: float | None = Field(None, description="largest number that is kept")
    equals: Value | None = Field(None, description="the only value that is kept")
    one_of: tuple[Value, ...] | None = Field(None, description="the values that are kept")
    absent: Literal["reject", "keep", "error"] = Field(
        "reject",
        description="without the column (or null): rejected(absent_column), kept, or the shard is refused",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(bound is None for bound in (self.min, self.max, self.equals, self.one_of)):
            raise ValueError(f"filter on {self.column!r} has no condition: give min, max, equals or one_of")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"filter on {self.column!r} keeps nothing: min {self.min:g} is above max {self.max:g}"
            )
        return self


class EncodeConfig(Section):
    """Image-caption shards in, latent data set out."""

    source: str = Field(
        description="folder or s3:// URL of img2dataset shards, parquet shards, or pictures with captions"
    )
    autoencoder: str | None = Field(None, description="diffusers autoencoder folder; null = RUN/autoencoder")
    text_encoder: str | None = Field(None, description="transformers text folder; null = RUN/text_encoder")
    text_encoder_2: str | None = Field(
        None,
        description="SDXL's second text folder: its states are laid beside the first's, its pooled text is stored",
    )
    text_layer: Literal["last", "penultimate"] = Field(
        "last", description="last after the final norm (SD 1, SD 2), or the one before it without norm (SDXL)"
    )
    max_tokens: Positive | None = Field(
        None,
        description="tokens a caption, for text models without a length of their own; null = the model's",
    )
    image_size: Positive = Field(description="pixels of the square side after resize and centre crop")
    buckets: tuple[tuple[Side, Side], ...] | None = Field(
        None,
        description="(height, width) of the shapes pictures are cropped to; null = one square of image_size",
    )
    bucket_step: Positive | None = Field(
        None,
        description="instead of a list: all shapes of about image_size^2 pixels with sides a multiple of this",
    )
    bucket_tolerance: Fraction = Field(
        0.2, description="largest share of a picture that the crop to its best bucket may cut away"
    )
    bucket_overflow: Literal["reject", "crop"] = Field(
        "reject", description="beyond the tolerance: rejected(bucket), or cropped all the same and counted"
    )
    latent: Literal["moments", "mean"] = Field(
        "moments", description="moments re-sample the posterior each visit"
    )
    text: Literal["embeddings", "tokens"] = Field(
        "embeddings",
        description="embeddings cost 118 KB a caption (CLIP-L), tokens 154 B and 0.5-2.5 % of a step",
    )
    max_captions: Positive = Field(1, description="captions kept a sample; surplus is counted")
    caption_columns: tuple[str, ...] = Field(
        ("caption", "text"),
        description="first of these in json or table is the caption where there is no .txt",
    )
    empty_caption: Literal["reject", "unconditional"] = Field(
        "reject", description="missing or empty captions: rejected, or kept as the empty caption and counted"
    )
    filters: tuple[FilterRule, ...] = Field((), description="conditions on columns, in this order")
    image_column: str | None = Field(
        None, description="column of image bytes in parquet shards; null = jpg, png, webp, image, ..."
    )
    unfinished_shards: Literal["refuse", "leave_out"] = Field(
        "refuse", description="shards that img2dataset did not finish (no _stats.json beside them)"
    )
    batch: Positive = Field(16, description="images encoded at once; part of the fingerprint")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="compute type of the frozen encoders; what is not finite is done again in fp32"
    )
    tile_size: Positive | None = Field(
        None,
        description="pixels; larger pictures are encoded in overlapping tiles; null = whole, the exact result",
    )
    validation_samples: Count = Field(
        64, description="pairs with the smallest key hash are kept from training, so the choice never moves"
    )
    background: tuple[int, int, int] = Field(
        (255, 255, 255), description="RGB 0-255 under transparent pixels"
    )
    draft: bool = Field(
        True,
        description="decode JPEG at 1/2, 1/4 or 1/8 where that still covers the target: 2 to 4 times faster",
    )
    min_side: Positive = Field(1, description="pixels; smaller originals are rejected(too_small)")
    max_aspect: float = Field(4.0, ge=1.0, description="longer over shorter side; beyond is rejected(aspect)")
    max_pixels: Positive = Field(64_000_000, description="pixels; larger are rejected before decoding")
    decode_processes: Count = Field(
        0,
        description="processes that decode with the two limits below; 0 = decode in the worker, limits by header",
    )
    decode_seconds: float = Field(
        30.0, gt=0.0, description="CPU seconds a picture may take in a decode process; beyond it has failed"
    )
    decode_memory_mb: Positive = Field(
        2048, description="address space of a decode process in MB; what does not fit has failed"
    )
    processes: Positive | None = Field(
        None, description="workers that `ldm encode` alone starts on this machine; null = one a GPU, or one"
    )
    decode_threads: Positive | None = Field(
        None,
        description="threads a worker decodes with while its encoder runs; null = its share of the cores",
    )
    shards_at_once: Positive = Field(
        2,
        description="shards a worker has under way: one is read or published while the encoder works on another",
    )
    lease_seconds: float = Field(
        120.0,
        gt=0.0,
        description="a worker that shows no sign of life for so long loses its shards to others",
    )
    max_failed_fraction: Fraction = Field(0.01, description="failed(error) above this share stops the job")

    @model_validator(mode="after")
    def _one_way_to_buckets(self) -> Self:
        if self.buckets is not None and self.bucket_step is not None:
            raise ValueError("buckets and bucket_step: give the list or the step, not both")
        if self.buckets is not None and len(set(self.buckets)) != len(self.buckets):
            raise ValueError("buckets: a shape stands there twice")
        return self

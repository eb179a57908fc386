"""What training reads and in which order."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Positive, Section


class DataConfig(Section):
    """The latent data set that training reads, and the order it is read in."""

    dataset: str | None = Field(None, description="folder with manifest.json; null = RUN/latents")
    order: Literal["global"] = Field("global", description="uniform over everything: for local disks")
    threads: Positive = Field(
        2, description="reader threads a rank; latents need no decoding, so few suffice"
    )
    prefetch: Positive = Field(4, description="micro-batches kept ready a rank")
    verify: Literal["off", "sample", "all"] = Field("sample", description="checksums looked at on opening")

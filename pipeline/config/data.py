"""What training reads and in which order."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Positive, Section


class MixedSet(Section):
    """One of several data sets that a run trains on."""

    dataset: str = Field(description="folder with manifest.json, or s3://BUCKET/FOLDER")
    weight: float = Field(1.0, gt=0.0, description="share of the samples relative to the other sets")


class DataConfig(Section):
    """The latent data sets that training reads, and the order they are read in."""

    dataset: str | None = Field(
        None, description="folder with manifest.json, or s3://BUCKET/FOLDER; null = RUN/latents"
    )
    mix: tuple[MixedSet, ...] = Field(
        (), description="several data sets instead of one; each set has epochs of its own", strict=False
    )
    order: Literal["auto", "lanes", "global"] = Field(
        "auto",
        description="global: uniform over everything, for local disks; lanes: few shards at a time on each node; "
        "auto: lanes above 1,000 shards",
    )
    lanes: Positive = Field(
        64, description="of order lanes; part of the order: fix it for a run. Best a multiple of the nodes"
    )
    lane_window: Positive = Field(4096, description="samples that a lane shuffles among; part of the order")
    threads: Positive = Field(
        2, description="reader threads a rank; latents need no decoding, so few suffice"
    )
    prefetch: Positive = Field(4, description="micro-batches kept ready a rank")
    verify: Literal["off", "sample", "all"] = Field(
        "sample",
        description="off: sizes and headers; sample: also the checksum of a few samples on opening; all: of every "
        "sample as it is read (about 30 us for 126 KB)",
    )
    on_bad_sample: Literal["stop", "substitute"] = Field(
        "stop",
        description="substitute: another sample of the same shape takes its place; logged, and kept in checkpoints",
    )
    flip: bool = Field(
        False, description="mirror every second latent; an approximation, since encoders are not symmetric"
    )
    cache: str | None = Field(
        None,
        description="folder on this node for what comes from s3://; null = the system's temporary folder",
    )
    cache_gib: float = Field(
        50.0, gt=0.0, description="most that the cache may hold, shared by the node's ranks"
    )
    remote_reads: Literal["shard", "range"] = Field(
        "shard",
        description="shard: fetch whole shards into the cache; range: fetch each sample, keep nothing",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.mix:
            raise ValueError(
                "dataset and mix exclude each other: list the data set in mix too, with its weight"
            )
        return self

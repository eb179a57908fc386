"""What one stored sample holds: the members of its tar entry with dtype and shape.

Latents are stored UNSCALED, as posterior moments or their mean: scaling, posterior sampling, caption choice,
flips and caption dropout are decided at training time and never frozen into the data.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pipeline.errors import DataError

Bucket = tuple[int, int]
"""(height, width) of the prepared picture in pixels."""


@dataclass(frozen=True)
class Member:
    """One array of a sample: `KEY.{name}.npy` with a fixed numpy dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the array itself, without the npy header."""
        item_bytes = {"<f2": 2, "<u2": 2}[self.dtype]
        return item_bytes * math.prod(self.shape)


@dataclass(frozen=True)
class LatentSpec:
    """The shape of a data set: equal specs mean interchangeable samples."""

    latent: Literal["moments", "mean"]
    channels: int
    downsampling: int
    scaling_factor: float
    shift_factor: float
    text: Literal["embeddings", "tokens"]
    text_tokens: int
    text_width: int
    pooled_width: int | None
    max_captions: int

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Return (channels stored, height, width) of the latent member for pictures of `bucket` pixels."""
        height, width = (side // self.downsampling for side in bucket)
        return (2 * self.channels if self.latent == "moments" else self.channels, height, width)

    def members(self, bucket: Bucket) -> tuple[Member, ...]:
        """Return the array members in tar order; the json member follows them."""
        members = [Member("latent", "<f2", self.latent_shape(bucket))]
        return tuple(members + list(self.text_members(self.max_captions)))

    def text_members(self, captions: int) -> tuple[Member, ...]:
        """Return the members that depend on the caption, for `captions` captions a sample."""
        members = []
        if self.text == "embeddings":
            members.append(Member("text", "<f2", (captions, self.text_tokens, self.text_width)))
        if self.pooled_width is not None:
            members.append(Member("pooled", "<f2", (captions, self.pooled_width)))
        members.append(Member("tokens", "<u2", (captions, self.text_tokens)))
        return tuple(members)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "LatentSpec":
        """Return the spec stored as `data`.

        Raises:
            DataError: when a field is missing or unknown; `where` names the file.
        """
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            raise DataError(
                f"{where}: spec has the fields {sorted(data)}, format 1 has {sorted(known)}; "
                "was it written by another version?"
            )
        return cls(**data)

"""One finished shard: its three files, and the commit marker that is written last.

A shard counts only when its marker `NN/STEM.json` exists: tar and parquet were published before it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

FORMAT = 1
SHARDS_PER_FOLDER = 1000
SPLITS = ("train", "validation")


def shard_path(dataset: Path, stem: str, suffix: str) -> Path:
    """Return `DATASET/NN/STEM{suffix}`: at most 1000 numbered shards a folder, other stems by hash."""
    number = (
        f"{int(stem) // SHARDS_PER_FOLDER:02d}"
        if stem.isdecimal()
        else hashlib.sha256(stem.encode()).hexdigest()[:2]
    )
    return dataset / number / f"{stem}{suffix}"


@dataclass(frozen=True)
class Counts:
    """What became of the input: read = written + all rejected + all failed, or something was lost."""

    read: int = 0
    written: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def unaccounted(self) -> int:
        """Samples read that ended nowhere: 0 unless there is a bug or damage."""
        return self.read - self.written - sum(self.rejected.values()) - sum(self.failed.values())

    def plus(self, other: "Counts") -> "Counts":
        """Return the sum of both, reason by reason."""
        return Counts(
            self.read + other.read,
            self.written + other.written,
            _summed(self.rejected, other.rejected),
            _summed(self.failed, other.failed),
        )


def _summed(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {reason: left.get(reason, 0) + right.get(reason, 0) for reason in sorted({*left, *right})}


@dataclass(frozen=True)
class ChannelStatistics:
    """Sums over all latent positions of a shard, per channel, in float64: they merge without reading a tar.

    `total` and `total_of_squares` are of the posterior mean; `variance_total` of the posterior variance
    (empty when only means are stored). `positions` counts latent pixels.
    """

    positions: int
    total: list[float]
    total_of_squares: list[float]
    variance_total: list[float]

    def plus(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Return the statistics of both shards together."""
        return ChannelStatistics(
            self.positions + other.positions,
            _added(self.total, other.total),
            _added(self.total_of_squares, other.total_of_squares),
            _added(self.variance_total, other.variance_total),
        )


def _added(left: list[float], right: list[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


@dataclass(frozen=True)
class Segment:
    """`rows` samples of one split and bucket in one shard, `stride` bytes apart from `first_offset` on."""

    shard: int
    split: str
    height: int
    width: int
    json_bytes: int
    first_row: int
    rows: int
    stride: int
    first_offset: int


@dataclass(frozen=True)
class ShardRecord:
    """The commit marker of one shard."""

    stem: str
    counts: Counts
    tar_bytes: int
    tar_digest: str
    parquet_digest: str
    fingerprint: dict[str, Any]
    segments: list[Segment]
    statistics: ChannelStatistics
    extra: dict[str, Any]
    """Facts that may differ between two runs that made equal bytes: device type, seconds, truncated captions."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data for the marker file."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> "ShardRecord":
        """Return the marker stored at `path`.

        Raises:
            DataError: when it is missing, not JSON, or of another format.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT or set(data) != {entry.name for entry in fields(cls)}:
                raise DataError(f"{path}: not a shard marker of format {FORMAT}; encode this shard again")
            return cls(
                **{
                    **data,
                    "counts": Counts(**data["counts"]),
                    "segments": [Segment(**segment) for segment in data["segments"]],
                    "statistics": ChannelStatistics(**data["statistics"]),
                }
            )
        except FileNotFoundError:
            raise DataError(f"{path}: no such shard marker; run `ldm encode` to make it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: damaged shard marker ({error}); remove it and encode the shard again"
            ) from None


def fingerprint_difference(found: dict[str, Any], wanted: dict[str, Any], at: str = "") -> list[str]:
    """Return one line `field: found, wanted` for each field in which two fingerprints differ."""
    lines = []
    for name in sorted({*found, *wanted}):
        left, right, dotted = found.get(name), wanted.get(name), f"{at}{name}"
        if isinstance(left, dict) and isinstance(right, dict):
            lines += fingerprint_difference(left, right, f"{dotted}.")
        elif left != right:
            lines.append(f"{dotted}: {left!r} on disk, {right!r} wanted")
    return lines

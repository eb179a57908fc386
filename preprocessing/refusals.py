"""What ends the encoding of a data set: a disk that refuses, a shard made with something else, too many failures."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, PipelineError
from pipeline.latents.shard import Counts, ShardRecord, fingerprint_difference, shard_path

STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})


class OtherFingerprintError(DataError):
    """A finished shard was made with other settings, weights, versions or input."""


@contextlib.contextmanager
def storage_complaint(dataset: Path) -> Iterator[None]:
    """Turn what the file system refuses for good into one line that says what to do.

    Raises:
        PipelineError: for a full, read-only or forbidden disk. Any other error goes through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        where = error.filename or dataset
        raise PipelineError(
            f"{where}: {os.strerror(error.errno)}{_free_bytes(dataset)}; mend that and run the same command again: "
            "finished shards stay, the others are encoded anew"
        ) from None


def _free_bytes(folder: Path) -> str:
    with contextlib.suppress(OSError):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        return f" ({shutil.disk_usage(there).free / 1e6:,.0f} MB free)"
    return ""


def refuse_other_fingerprint(dataset: Path, record: ShardRecord, wanted: dict[str, Any]) -> None:
    """Do nothing if the shard was made with `wanted`.

    Raises:
        OtherFingerprintError: naming every field that differs with both values.
    """
    lines = fingerprint_difference(record.fingerprint, wanted)
    if lines:
        path = shard_path(dataset, record.stem, ".json")
        raise OtherFingerprintError(
            f"{path}: this shard is finished, but made with something else: {'; '.join(lines)}; set it back, or "
            "encode into a new folder"
        )


def refuse_other_size(tar: Path, size_bytes: int) -> None:
    """Do nothing if a finished tar is as long as its marker says: that is cheap to see.

    Raises:
        DataError: with both sizes.
    """
    if (found := tar.stat().st_size) != size_bytes:
        raise DataError(
            f"{tar}: finished, but has {found} bytes instead of the {size_bytes} in its marker; remove the shard's three "
            "files and encode again"
        )


def check_failures(counts: Counts, max_failed_fraction: float) -> None:
    """Do nothing while the share of failed samples is within bounds.

    Raises:
        DataError: with the errors and how often each came.
    """
    failed = sum(counts.failed.values())
    if failed > max_failed_fraction * counts.read:
        raise DataError(
            f"{failed} of {counts.read} samples failed ({_listed(counts.failed)}), encode.max_failed_fraction allows "
            f"{max_failed_fraction:g}; the parquet files name them; mend or remove them, or raise the limit"
        )


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())

"""img2dataset's own marker of a finished shard, `STEM_stats.json`: what it promises, and which shards lack it.

img2dataset writes a shard under its final name from the start and the marker last, so a shard without one may be
a part of a shard. Where the folder was made by img2dataset such a shard is refused, or left out and counted.
"""

import json
import logging
from collections.abc import Collection, Sequence

from pipeline import storage
from pipeline.errors import DataError

STATS_SUFFIX = "_stats.json"
LISTED = 20
LOG = logging.getLogger(__name__)


def finished_shards(source: str, shards: Sequence[str], names: Collection[str], policy: str) -> list[str]:
    """Return the shard files that may be read; `names` are all files of the folder.

    `policy` is encode.unfinished_shards: "refuse" is an error, "leave_out" warns with their names and number.

    Raises:
        DataError: when shards lack their marker in a folder that img2dataset wrote.
    """
    unfinished = unfinished_shards(shards, names)
    if not unfinished:
        return list(shards)
    more = f" and {len(unfinished) - LISTED} more" if len(unfinished) > LISTED else ""
    said = (
        f"{source}: {len(unfinished)} of {len(shards)} shards without {STATS_SUFFIX}, which img2dataset writes when "
        f"a shard is done: {', '.join(unfinished[:LISTED])}{more}"
    )
    if policy == "refuse":
        raise DataError(
            f"{said}; finish the download, move these out of the folder, or set encode.unfinished_shards: leave_out"
        )
    LOG.warning("%s; left out (encode.unfinished_shards)", said)
    return [name for name in shards if marker_name(name) in names]


def unfinished_shards(shards: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the shard files without marker in a folder that img2dataset wrote; none elsewhere."""
    by_img2dataset = any(name.endswith(STATS_SUFFIX) for name in names) or (
        any(name.endswith(".tar") for name in shards) and any(name.endswith(".parquet") for name in names)
    )
    return [name for name in shards if marker_name(name) not in names] if by_img2dataset else []


def marker_name(shard: str) -> str:
    """Return the marker's file name beside the shard file."""
    return shard.rpartition(".")[0] + STATS_SUFFIX


def promised_samples(place: str) -> int:
    """Return the number of samples that the marker at `place` promises.

    Raises:
        DataError: when it is not img2dataset's.
    """
    try:
        successes = json.loads(storage.read_file(place))["successes"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: not img2dataset's marker ({error!r}); fetch the shard again or move it away"
        ) from None
    if not isinstance(successes, int) or isinstance(successes, bool) or successes < 0:
        raise DataError(f"{place}: successes is {successes!r}, not a count")
    return successes


def lost(expected: int | None, read: int) -> str:
    """Return how many samples are lost where `read` were found, in words."""
    if expected is None:
        return f"{read} samples before that, how many are lost is not known (no {STATS_SUFFIX} beside it)"
    missing = expected - read
    return f"{expected} samples expected, {read} found, " + (
        f"{missing} lost" if missing >= 0 else f"{-missing} too many"
    )


REMEDY = "none of it is used: fetch the shard again, or move it and its side files out of the folder"

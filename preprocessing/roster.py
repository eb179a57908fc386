"""Who encodes which shard, and when a shard counts as done. No worker talks to another.

Worker `i` of `n` takes the shards `i::n` of the sorted list, then whatever is still without a marker. Publishing is
first-wins and the bytes do not depend on the worker, so two workers on one shard waste time and nothing else.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import EncodeConfig
from pipeline.errors import DataError
from pipeline.latents.shard import Counts, ShardRecord, fingerprint_difference, shard_path
from pipeline.progress import Progress, progress_bar
from preprocessing.claims import remove_dead_temporaries
from preprocessing.encoded import Encoder
from preprocessing.filters import Rules
from preprocessing.sources import InputShard
from preprocessing.worker import ShardJob, encode_shard

CODE_VERSION = 1
"""Raised whenever this package would make other bytes of the same input."""


@dataclass(frozen=True)
class EncodeCounts:
    """What one worker did: shards it encoded, shards of its own that were finished before, and their samples."""

    encoded: int
    finished_before: int
    counts: Counts

    def __str__(self) -> str:
        """Return one line for people."""
        counts = self.counts
        return (
            f"{self.encoded} shards encoded, {self.finished_before} finished before: {counts.read} read = "
            f"{counts.written} written + {sum(counts.rejected.values())} rejected {counts.rejected} + "
            f"{sum(counts.failed.values())} failed {counts.failed}"
        )


@dataclass(frozen=True)
class Work:
    """This worker's part of the job."""

    shards: Sequence[InputShard]
    dataset: Path
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.worker < self.workers, (self.worker, self.workers)

    def own(self) -> range:
        """Return the numbers of the shards that are this worker's."""
        return range(self.worker, len(self.shards), self.workers)

    def others(self) -> list[int]:
        """Return the other shards, from behind and beginning at another place for each worker."""
        rest = [number for number in range(len(self.shards)) if number % self.workers != self.worker]
        start = len(rest) * self.worker // self.workers
        return (rest[start:] + rest[:start])[::-1]


def validation_shares(shards: int, validation_samples: int) -> list[int]:
    """Return how many samples of each shard are kept for validation: even, the first shards take the remainder."""
    return [validation_samples // shards + (number < validation_samples % shards) for number in range(shards)]


def shard_fingerprint(
    encoder: Encoder, encode: EncodeConfig, shard: InputShard, validation_samples: int
) -> dict[str, Any]:
    """Return all that decides the bytes of one output shard, as plain JSON data."""
    return {
        "code": CODE_VERSION,
        "spec": encoder.spec.as_dict(),
        **encoder.fingerprint(),
        "preprocessing": {**Rules.from_config(encode).as_dict(), "batch": encode.batch},
        "input": {**shard.identity(), "validation_samples": validation_samples},
    }


def encode_shards(work: Work, encoder: Encoder, encode: EncodeConfig) -> EncodeCounts:
    """Encode this worker's shards, then help with the others; return what was done.

    A damaged shard is left out and the others go on; the error comes at the end and names all of them.

    Raises:
        DataError: for damaged shards, for a finished shard with another fingerprint (at once), or when more
            than `encode.max_failed_fraction` of the samples failed (after they were recorded).
    """
    remove_dead_temporaries(work.dataset)
    shares = validation_shares(len(work.shards), encode.validation_samples)
    total, encoded, finished_before, damaged = Counts(), 0, 0, []
    with _meter(work) as meter:
        for number in [*work.own(), *work.others()]:
            shard, is_own = work.shards[number], number in work.own()
            if not is_own and _is_finished(work.dataset, shard.stem):
                continue
            claim = _Claim(shard, shares[number], work.dataset)
            try:
                record, was_finished = claim.settle(encoder, encode, meter.samples if is_own else _ignore)
            except OtherFingerprintError:
                raise
            except DataError as error:
                damaged.append(str(error))
                continue
            finally:
                meter.shard_done(is_own)
            finished_before += was_finished
            encoded += not was_finished
            total = total.plus(record.counts)
            check_failures(total, encode.max_failed_fraction)
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(work.shards)} shards could not be encoded, the others are done: "
            + "; ".join(damaged)
        )
    return EncodeCounts(encoded, finished_before, total)


class OtherFingerprintError(DataError):
    """A finished shard was made with other settings, weights, versions or input."""


@dataclass(frozen=True)
class _Claim:
    shard: InputShard
    validation_samples: int
    dataset: Path

    def settle(
        self, encoder: Encoder, encode: EncodeConfig, advance: Callable[[int], None]
    ) -> tuple[ShardRecord, bool]:
        """Return the shard's marker and whether it was there before; encode the shard if it was not."""
        wanted = shard_fingerprint(encoder, encode, self.shard, self.validation_samples)
        if _is_finished(self.dataset, self.shard.stem):
            record = ShardRecord.load(shard_path(self.dataset, self.shard.stem, ".json"))
            refuse_other_fingerprint(self.dataset, record, wanted)
            advance(record.counts.read)
            return record, True
        job = ShardJob(self.shard, self.validation_samples, wanted)
        return encode_shard(job, encoder, Rules.from_config(encode), self.dataset, advance), False


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


def _is_finished(dataset: Path, stem: str) -> bool:
    """Return whether all three files stand: a marker whose tar somebody removed is no reason to skip the shard."""
    return all(shard_path(dataset, stem, suffix).is_file() for suffix in (".json", ".tar", ".parquet"))


@dataclass(frozen=True)
class _Meter:
    """Progress over this worker's own samples, or over its shards where the samples are not known beforehand."""

    progress: Progress
    counts_samples: bool

    def samples(self, count: int) -> None:
        if self.counts_samples:
            self.progress.advance(count)

    def shard_done(self, is_own: bool) -> None:
        if is_own and not self.counts_samples:
            self.progress.advance(1)


@contextlib.contextmanager
def _meter(work: Work) -> Iterator[_Meter]:
    if work.worker != 0:  # one bar for the job
        yield _Meter(Progress(0), counts_samples=True)
        return
    estimates = [work.shards[number].estimate for number in work.own()]
    known = [estimate for estimate in estimates if estimate is not None]
    counts_samples = len(known) == len(estimates)
    total, unit = (sum(known), "sample") if counts_samples else (len(estimates), "shard")
    with progress_bar(total, "encode", unit=unit) as progress:
        yield _Meter(progress, counts_samples)


def _ignore(count: int) -> None:
    return None

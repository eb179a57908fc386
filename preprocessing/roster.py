"""Who encodes which shard, and when a shard counts as done. No worker talks to another.

Worker `i` of `n` begins with the shards `i::n` of the sorted list, then takes whatever is without a marker and not
leased by a living worker, and leaves when every shard is finished. Publishing is first-wins and the bytes do not
depend on the worker, so two workers on one shard waste time and nothing else.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import EncodeConfig
from pipeline.errors import DataError
from pipeline.latents.shard import Counts, ShardRecord, shard_path
from pipeline.progress import Progress, progress_bar
from preprocessing.ahead import Decoders
from preprocessing.claims import remove_dead_temporaries
from preprocessing.encoded import Encoder
from preprocessing.filters import Rules
from preprocessing.isolation import Limits, open_decoder
from preprocessing.leases import Leases, note_work
from preprocessing.refusals import (
    OtherFingerprintError,
    check_failures,
    refuse_other_fingerprint,
    refuse_other_size,
    storage_complaint,
)
from preprocessing.sources import InputShard
from preprocessing.worker import INPUT_VERSION, EncoderTurn, ShardJob, encode_shard, with_digest

CODE_VERSION = 4
"""Raised whenever this package would make other bytes of the same input."""
WAIT = -1
POLLS, POLL_SECONDS = 20, 2.0
"""The leases of others are looked at so often within the life of a lease, and every two seconds at least."""


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
    """The job, and which worker of how many this process is."""

    shards: Sequence[InputShard]
    dataset: Path
    worker: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.worker < self.workers, (self.worker, self.workers)

    def own(self) -> range:
        """Return the numbers of the shards that this worker begins with, and whose settings it checks."""
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
    """Return all that decides the bytes of one output shard but the digest of its samples, as plain JSON data."""
    return {
        "code": CODE_VERSION,
        "spec": encoder.spec.as_dict(),
        **encoder.fingerprint(),
        "preprocessing": {**Rules.from_config(encode).as_dict(), "batch": encode.batch},
        "input": {
            "name": shard.name,
            "bytes": shard.size_bytes(),
            "validation_samples": validation_samples,
        },
    }


def encode_shards(work: Work, encoder: Encoder, encode: EncodeConfig) -> EncodeCounts:
    """Encode until every shard is finished, by this worker or another; return what this one did.

    A damaged shard is left out and the others go on; the error comes at the end and names all of them.

    Raises:
        DataError: for damaged shards, for a finished shard with another fingerprint (at once), or when more
            than `encode.max_failed_fraction` of the samples failed (after they were recorded).
        PipelineError: when the disk is full, read-only or forbidden; finished shards stay.
    """
    with storage_complaint(work.dataset):
        remove_dead_temporaries(work.dataset)
        note_work(work.dataset, len(work.shards))
        threads = encode.decode_threads or max(cores_for(1), encode.decode_processes)
        limits = Limits(encode.decode_seconds, encode.decode_memory_mb << 20)
        with (
            Leases(work.dataset, encode.lease_seconds) as leases,
            open_decoder(encode.decode_processes, Rules.from_config(encode), limits) as processes,
            Decoders(
                threads, threads + 2 * encode.batch, processes.decode if processes else None
            ) as decoders,
            _meter(work) as meter,
        ):
            job = _Job(work, encoder, encode, leases, decoders, meter)
            job.run(encode.shards_at_once)
        if job.damaged:
            raise DataError(
                f"{len(job.damaged)} of {len(work.shards)} shards could not be encoded, the others are done: "
                + "; ".join(job.damaged)
            )
    return EncodeCounts(job.encoded, job.finished_before, job.total)


def cores_for(processes: int) -> int:
    """Return how many cores each of `processes` on this machine may use for decoding, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


class _StoppedError(Exception):
    """Another thread of this worker has failed: its error is the one to tell."""


class _Job:
    """What the threads of one worker share: the shards that are left, and the sums of what was done."""

    def __init__(
        self,
        work: Work,
        encoder: Encoder,
        encode: EncodeConfig,
        leases: Leases,
        decoders: Decoders,
        meter: "_Meter",
    ) -> None:
        self.total, self.encoded, self.finished_before = Counts(), 0, 0
        self.damaged: list[str] = []
        self._work, self._encoder, self._encode = work, encoder, encode
        self._leases, self._decoders, self._meter = leases, decoders, meter
        self._turn, self._rules = EncoderTurn(encoder), Rules.from_config(encode)
        self._shares = validation_shares(len(work.shards), encode.validation_samples)
        self._left = [*work.own(), *work.others()]
        self._choice, self._sums, self._stop = threading.Lock(), threading.Lock(), threading.Event()

    def run(self, shards_at_once: int) -> None:
        """Work on so many shards at once until none is left; the first error ends all of it."""
        with ThreadPoolExecutor(shards_at_once, thread_name_prefix="shard") as crew:
            threads = [crew.submit(self._work_on_shards) for _ in range(shards_at_once)]
            try:
                wait(threads, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
        errors = [error for thread in threads if (error := thread.exception()) is not None]
        told = [error for error in errors if not isinstance(error, _StoppedError)]
        if told:
            raise told[0]

    def _work_on_shards(self) -> None:
        while not self._stop.is_set():
            with self._choice:
                number = self._choose()
            if number is None:
                return
            if number == WAIT:
                self._stop.wait(min(POLL_SECONDS, self._encode.lease_seconds / POLLS))
                continue
            self._settle(number)

    def _choose(self) -> int | None:
        """Return a shard that is ours now or was finished before, WAIT while others hold all that is left, or None."""
        own = self._work.own()
        for number in list(self._left):
            stem = self._work.shards[number].stem
            finished = _is_finished(self._work.dataset, stem)
            if finished:
                self._leases.tidy(stem)
            if finished and number not in own:
                self._left.remove(number)
            elif finished or self._leases.take(stem):
                self._left.remove(number)
                return number
        return WAIT if self._left else None

    def _settle(self, number: int) -> None:
        shard, is_own = self._work.shards[number], number in self._work.own()
        try:
            record, was_finished = self._finish(shard, self._shares[number], is_own)
        except OtherFingerprintError:
            raise
        except DataError as error:
            with self._sums:
                self.damaged.append(str(error))
            return
        finally:
            self._leases.release(shard.stem)
            self._meter.shard_done(is_own)
        with self._sums:
            self.finished_before += was_finished
            self.encoded += not was_finished
            self.total = self.total.plus(record.counts)
            check_failures(self.total, self._encode.max_failed_fraction)

    def _finish(self, shard: InputShard, validation_samples: int, is_own: bool) -> tuple[ShardRecord, bool]:
        """Return the shard's marker and whether it was there before; encode the shard if it was not."""
        wanted = shard_fingerprint(self._encoder, self._encode, shard, validation_samples)
        dataset = self._work.dataset

        def advance(count: int) -> None:
            if self._stop.is_set():
                raise _StoppedError
            if is_own:
                self._meter.samples(count)

        if _is_finished(dataset, shard.stem):
            record = ShardRecord.load(shard_path(dataset, shard.stem, ".json"))
            unchanged = record.extra.get(INPUT_VERSION) == shard.version()
            sha256 = record.fingerprint["input"].get("sha256") if unchanged else shard.digest()
            refuse_other_fingerprint(dataset, record, with_digest(wanted, sha256))
            refuse_other_size(shard_path(dataset, shard.stem, ".tar"), record.tar_bytes)
            advance(record.counts.read)
            return record, True
        job = ShardJob(shard, validation_samples, wanted)
        return encode_shard(job, self._turn, self._decoders, self._rules, dataset, advance), False


def _is_finished(dataset: Path, stem: str) -> bool:
    """Return whether all three files stand: a marker whose tar somebody removed is no reason to skip the shard."""
    return all(shard_path(dataset, stem, suffix).is_file() for suffix in (".json", ".tar", ".parquet"))


@dataclass(frozen=True)
class _Meter:
    """Progress over this worker's own samples, or over its shards where the samples are not known beforehand."""

    progress: Progress
    counts_samples: bool
    lock: threading.Lock = field(default_factory=threading.Lock)

    def samples(self, count: int) -> None:
        if self.counts_samples:
            with self.lock:
                self.progress.advance(count)

    def shard_done(self, is_own: bool) -> None:
        if is_own and not self.counts_samples:
            with self.lock:
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

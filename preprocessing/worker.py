"""One input shard from bytes to its published output: read top to bottom.

Reads = written + rejected(reason) + failed(error) holds at the end or the shard is not published. What is
written is a function of the input shard, the settings and the weights: never of the worker, the clock, or how
often it was tried.
"""

import contextlib
import dataclasses
import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, PipelineError
from pipeline.latents.record import LatentSample
from pipeline.latents.shard import ChannelStatistics, Counts, ShardRecord, shard_path
from pipeline.latents.spec import LatentSpec
from pipeline.publish import publish_first
from preprocessing.ahead import Decoders
from preprocessing.batches import Batches
from preprocessing.claims import claimed_temporary
from preprocessing.encoded import EncodedBatch, Encoder
from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.samples import InputShard, RawSample, SamplesDigest
from preprocessing.writer import Spool, WrittenShard, arrange, write_shard

INPUT_VERSION = "input_version"
"""In a marker's `extra`: what the input's files were told by when they were read."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to encode: how many of its samples go to validation, and all else that decides its bytes."""

    shard: InputShard
    validation_samples: int
    fingerprint: dict[str, Any]


def with_digest(fingerprint: Mapping[str, Any], sha256: str | None) -> dict[str, Any]:
    """Return the fingerprint of a shard whose samples have that digest."""
    return {**fingerprint, "input": {**fingerprint["input"], "sha256": sha256}}


@dataclass
class _Ledger:
    """What became of every sample so far."""

    read: int = 0
    input: SamplesDigest = field(default_factory=SamplesDigest)
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the samples that were not written, in input order."""

    def note(self, raw: RawSample) -> None:
        """Note a sample that was read."""
        self.read += 1
        self.input.add(raw)

    def refuse(self, sample: RawSample | PreparedSample, outcome: Rejection | Failure) -> None:
        """Note a sample that is not written."""
        rejected = isinstance(outcome, Rejection)
        reason = outcome.reason if isinstance(outcome, Rejection) else outcome.error
        (self.rejected if rejected else self.failed)[reason] += 1
        row: dict[str, Any] = {
            "key": sample.source_key,
            "status": "rejected" if rejected else "failed",
            "reason": reason,
            "source": sample.source,
        }
        if isinstance(sample, PreparedSample):
            row |= sample.facts() | sample.measures()
        self.rows.append(row)

    def counts(self, written: int) -> Counts:
        """Return the counts in the order that the marker stores."""
        return Counts(
            self.read, written, dict(sorted(self.rejected.items())), dict(sorted(self.failed.items()))
        )


class ChannelSums:
    """Float64 sums per channel over what is stored, merged sample by sample in input order."""

    def __init__(self, spec: LatentSpec) -> None:
        self._spec = spec
        self._positions = 0
        self._total, self._squares, self._variance = (np.zeros(spec.channels) for _ in range(3))
        self._values = np.empty((0, 0))  # float64 of one sample, kept: fresh memory costs more than the sums

    def add(self, latent: np.ndarray) -> None:
        """Take the stored latent member [2C or C, h, w] of one sample."""
        if self._values.size != latent.size:
            self._values = np.empty((len(latent), latent[0].size))
        self._values[...] = latent.reshape(len(latent), -1)
        mean, logvar = self._values[: self._spec.channels], self._values[self._spec.channels :]
        self._positions += mean.shape[1]
        self._total += mean.sum(axis=1)
        self._squares += np.square(mean, out=mean).sum(axis=1)
        if self._spec.latent == "moments":
            self._variance += np.exp(logvar, out=logvar).sum(axis=1)

    def statistics(self) -> ChannelStatistics:
        """Return the sums as the marker stores them."""
        variance = self._variance.tolist() if self._spec.latent == "moments" else []
        return ChannelStatistics(self._positions, self._total.tolist(), self._squares.tolist(), variance)


class EncoderTurn:
    """The encoder of this process: the shards under way take turns, a batch each."""

    def __init__(self, encoder: Encoder) -> None:
        self.spec, self.batch = encoder.spec, encoder.batch
        self._encoder, self._turn, self._room = encoder, threading.Lock(), threading.local()

    def encode(self, samples: Sequence[PreparedSample]) -> tuple[EncodedBatch, int]:
        """Return the encoded batch and how often memory ran out before it worked: 0 or 1.

        The second attempt is of the same batch with all caches given back: a smaller one would round differently,
        and the bytes would tell how full the device was.

        Raises:
            PipelineError: when memory runs out again.
        """
        images = self._stacked(samples)
        captions = [sample.captions for sample in samples]
        with self._turn:
            try:
                return self._encoder.encode(images, captions), 0
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._encoder.release_memory()
            try:
                return self._encoder.encode(images, captions), 1
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise PipelineError(
                    f"out of memory twice on a batch of {self.batch} pictures of {images.shape[1]}x{images.shape[2]}; "
                    "lower encode.batch (and encode into a new folder: it is part of the fingerprint)"
                ) from None

    def _stacked(self, samples: Sequence[PreparedSample]) -> np.ndarray:
        """Return uint8 [B,H,W,3] in memory that this thread's next batch takes again."""
        pixels = [sample.picture.pixels for sample in samples]
        shape = (self.batch, *pixels[0].shape)
        room: np.ndarray | None = getattr(self._room, "images", None)
        if room is None or room.shape != shape:
            room = self._room.images = np.empty(shape, np.uint8)
        return np.stack(pixels, out=room[: len(pixels)])


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that memory ran out: Python's, CUDA's, or that of torch's allocator on a CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


@dataclass
class _Encoding:
    """One shard under way: where its encoded samples go."""

    turn: EncoderTurn
    spool: Spool
    ledger: _Ledger
    sums: ChannelSums
    batches: Batches
    out_of_memory_retries: int = 0

    def take(self, sample: PreparedSample) -> None:
        """Encode the batch of the sample's shape if it is full now."""
        batch = self.batches.add(sample)
        if batch is not None:
            self._encode(batch)

    def finish(self) -> None:
        """Encode what is left."""
        for batch in self.batches.rest():
            self._encode(batch)

    def _encode(self, samples: Sequence[PreparedSample]) -> None:
        encoded, retries = self.turn.encode(samples)
        self.out_of_memory_retries += retries
        for place, sample in enumerate(samples):
            self.ledger.remarks.update(sample.remarks)
            problem = encoded.problems[place]
            if problem is not None:
                self.ledger.refuse(sample, Rejection(problem))
                continue
            self.ledger.remarks.update(encoded.remarks(place))
            remarks = [*sample.remarks, *encoded.remarks(place)]
            arrays = {name: array[place] for name, array in encoded.arrays.items()}
            height, width = sample.bucket
            facts = sample.facts() | {"height": height, "width": width}
            row = {"key": sample.key, "status": "written", "reason": None, "source": sample.source, **facts}
            row |= sample.measures() | {"remarks": remarks}
            self.sums.add(arrays["latent"])
            self.spool.add(LatentSample(sample.key, arrays, _json_record(sample, facts)), sample.bucket, row)


def encode_shard(
    job: ShardJob,
    turn: EncoderTurn,
    decoders: Decoders,
    rules: Rules,
    dataset: Path,
    advance: Callable[[int], None],
) -> ShardRecord:
    """Encode and publish one shard below the folder `dataset` and return its marker; `advance` counts samples.

    Raises:
        DataError: when the input is damaged (nothing is published), or other bytes have the output's name.
    """
    started, version = time.monotonic(), job.shard.version()
    ledger, sums = _Ledger(), ChannelSums(turn.spec)
    with Spool(shard_path(dataset, job.shard.stem, ".tar").parent, turn.spec) as spool:
        encoding = _Encoding(turn, spool, ledger, sums, Batches(turn.batch))
        prepare = functools.partial(prepare_sample, rules=rules, decode=decoders.decode)
        with contextlib.closing(decoders.outcomes(job.shard.samples(), prepare)) as outcomes:
            for raw, outcome in outcomes:
                ledger.note(raw)
                advance(1)
                if isinstance(outcome, PreparedSample):
                    encoding.take(outcome)
                else:
                    ledger.refuse(raw, outcome)
        encoding.finish()
        stretches = arrange(spool.samples, job.validation_samples)
        written = write_shard(dataset, job.shard.stem, spool, stretches, ledger.rows)
        counts = ledger.counts(len(spool.samples))
    extra = {
        "seconds": round(time.monotonic() - started, 3),
        "remarks": dict(sorted(ledger.remarks.items())),
        "out_of_memory_retries": encoding.out_of_memory_retries,
        INPUT_VERSION: version,
    }
    fingerprint = with_digest(job.fingerprint, ledger.input.hexdigest())
    record = _record(job.shard.stem, fingerprint, written, counts, sums, extra)
    _publish_marker(shard_path(dataset, job.shard.stem, ".json"), record)
    return record


def _json_record(sample: PreparedSample, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the json member: `captions` holds the real ones, however often the text members repeat them."""
    record = {"key": sample.key, "num_captions": len(sample.captions), **facts}
    return record if sample.key == sample.source_key else {**record, "source_key": sample.source_key}


def _record(
    stem: str,
    fingerprint: dict[str, Any],
    written: WrittenShard,
    counts: Counts,
    sums: ChannelSums,
    extra: dict[str, Any],
) -> ShardRecord:
    assert counts.unaccounted == 0 and len(written.rows) == counts.read, counts
    return ShardRecord(
        stem=stem,
        counts=counts,
        tar_bytes=written.tar_bytes,
        tar_digest=written.tar_digest,
        parquet_digest=written.parquet_digest,
        fingerprint=fingerprint,
        segments=written.segments,
        statistics=sums.statistics(),
        extra=extra,
    )


def _publish_marker(path: Path, record: ShardRecord) -> None:
    """Commit the shard; a marker that another worker published first must say the same but for `extra`.

    Raises:
        DataError: when it does not.
    """
    with claimed_temporary(path) as beside:
        text = json.dumps(record.to_json(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        beside.write_bytes((text + "\n").encode())
        if publish_first(beside, path):
            return
    theirs = ShardRecord.load(path)
    if dataclasses.replace(theirs, extra=record.extra) != record:
        raise DataError(
            f"{path}: another worker committed this shard with other content at the same time; make sure that "
            "all workers run the same code and settings, remove the shard's three files and encode again"
        )

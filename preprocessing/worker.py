"""One input shard from bytes to its published output: read top to bottom.

Reads = written + rejected(reason) + failed(error) holds at the end or the shard is not published. What is
written is a function of the input shard, the settings and the weights: never of the worker, the clock, or how
often it was tried.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.latents.record import LatentSample
from pipeline.latents.shard import ChannelStatistics, Counts, ShardRecord, shard_path
from pipeline.latents.spec import LatentSpec
from pipeline.publish import publish_first
from preprocessing.claims import claimed_temporary
from preprocessing.encoded import Encoder
from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.sources import InputShard, RawSample
from preprocessing.writer import Spool, WrittenShard, arrange, write_shard


@dataclass(frozen=True)
class ShardJob:
    """One shard to encode: how many of its samples go to validation, and all that decides its bytes."""

    shard: InputShard
    validation_samples: int
    fingerprint: dict[str, Any]


@dataclass
class _Ledger:
    """What became of every sample so far."""

    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the samples that were not written, in input order."""

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
            row |= _facts(sample)
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

    def add(self, latent: np.ndarray) -> None:
        """Take the stored latent member [2C or C, h, w] of one sample."""
        values = latent.astype(np.float64).reshape(len(latent), -1)
        mean = values[: self._spec.channels]
        self._positions += mean.shape[1]
        self._total += mean.sum(axis=1)
        self._squares += np.square(mean).sum(axis=1)
        if self._spec.latent == "moments":
            self._variance += np.exp(values[self._spec.channels :]).sum(axis=1)

    def statistics(self) -> ChannelStatistics:
        """Return the sums as the marker stores them."""
        variance = self._variance.tolist() if self._spec.latent == "moments" else []
        return ChannelStatistics(self._positions, self._total.tolist(), self._squares.tolist(), variance)


def encode_shard(
    job: ShardJob, encoder: Encoder, rules: Rules, dataset: Path, advance: Callable[[int], None]
) -> ShardRecord:
    """Encode and publish one shard below the folder `dataset` and return its marker; `advance` counts samples.

    Raises:
        DataError: when the input is damaged (nothing is published), or other bytes have the output's name.
    """
    started = time.monotonic()
    ledger, sums = _Ledger(), ChannelSums(encoder.spec)
    with Spool(shard_path(dataset, job.shard.stem, ".tar").parent, encoder.spec) as spool:
        pending: list[PreparedSample] = []
        for raw in job.shard.samples():
            ledger.read += 1
            advance(1)
            outcome = prepare_sample(raw, rules)
            if not isinstance(outcome, PreparedSample):
                ledger.refuse(raw, outcome)
                continue
            pending.append(outcome)
            if len(pending) == encoder.batch:
                _encode_batch(pending, encoder, spool, ledger, sums)
                pending = []
        if pending:
            _encode_batch(pending, encoder, spool, ledger, sums)
        stretches = arrange(spool.samples, job.validation_samples)
        written = write_shard(dataset, job.shard.stem, spool, stretches, ledger.rows)
        counts = ledger.counts(len(spool.samples))
    extra = {"seconds": round(time.monotonic() - started, 3), "remarks": dict(sorted(ledger.remarks.items()))}
    record = _record(job, written, counts, sums, extra)
    _publish_marker(shard_path(dataset, job.shard.stem, ".json"), record)
    return record


def _encode_batch(
    samples: Sequence[PreparedSample], encoder: Encoder, spool: Spool, ledger: _Ledger, sums: ChannelSums
) -> None:
    images = np.stack([sample.square.pixels for sample in samples])
    encoded = encoder.encode(images, [sample.captions for sample in samples])
    for place, sample in enumerate(samples):
        ledger.remarks.update(sample.remarks)
        problem = encoded.problems[place]
        if problem is not None:
            ledger.refuse(sample, Rejection(problem))
            continue
        if encoded.truncated[place]:
            ledger.remarks["truncated_caption"] += 1
        arrays = {name: array[place] for name, array in encoded.arrays.items()}
        size = images.shape[1:3]
        facts = _facts(sample) | {"height": size[0], "width": size[1]}
        row = {"key": sample.key, "status": "written", "reason": None, "source": sample.source, **facts}
        sums.add(arrays["latent"])
        spool.add(LatentSample(sample.key, arrays, _json_record(sample, facts)), size, row)


def _facts(sample: PreparedSample) -> dict[str, Any]:
    return {
        "captions": list(sample.captions),
        "original_height": sample.square.original_height,
        "original_width": sample.square.original_width,
        "crop": list(sample.square.crop),
        "source_sha256": sample.source_sha256,
    }


def _json_record(sample: PreparedSample, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the json member: `captions` holds the real ones, however often the text members repeat them."""
    record = {"key": sample.key, "num_captions": len(sample.captions), **facts}
    return record if sample.key == sample.source_key else {**record, "source_key": sample.source_key}


def _record(
    job: ShardJob, written: WrittenShard, counts: Counts, sums: ChannelSums, extra: dict[str, Any]
) -> ShardRecord:
    assert counts.unaccounted == 0 and len(written.rows) == counts.read, counts
    return ShardRecord(
        stem=job.shard.stem,
        counts=counts,
        tar_bytes=written.tar_bytes,
        tar_digest=written.tar_digest,
        parquet_digest=written.parquet_digest,
        fingerprint=job.fingerprint,
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

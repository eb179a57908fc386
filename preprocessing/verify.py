"""Re-read a finished data set and list every problem: nothing here trusts what was written.

Whole: each tar is hashed and walked header by header, each sample is read at its computed offset and held against
its checksum, its row and the sums in the marker. With `samples` a number of samples, evenly spaced, is read by
position, as training does, and tables and sizes are checked only.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import DataError
from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import LatentSample, member_bytes, member_offsets, parse_sample
from pipeline.latents.rows import ROW_SCHEMA, SHARD_SCHEMA, read_table
from pipeline.latents.segments import SPLITS, Segment, load_segments, segments_array
from pipeline.latents.shard import ChannelStatistics, Counts, ShardRecord, shard_path
from pipeline.latents.spec import LatentSpec
from pipeline.models.autoencoder import FrozenAutoencoder
from pipeline.progress import followed
from pipeline.publish import file_digest
from preprocessing.encoded import LOGVAR_RANGE
from preprocessing.strict_tar import Member, walk_tar
from preprocessing.worker import ChannelSums

DECODED_SAMPLES = 8


@dataclass
class VerifyResult:
    """How many samples were re-read, and one line for each problem."""

    checked: int = 0
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, where: object, said: str) -> None:
        """Note a problem unless it holds."""
        if not holds:
            self.problems.append(f"{where}: {said}")


def verify_dataset(out: Path, *, samples: int | None, decode_with: Path | None) -> VerifyResult:
    """Return what re-reading the data set in `out` found: all of it, or `samples` of each split.

    `decode_with` names an autoencoder folder; a few latents are then decoded to pictures.
    """
    result = VerifyResult()
    try:
        manifest = Manifest.load(out)
        _check_totals(out, manifest, result)
        if samples is None:
            records = list(_markers(out, manifest, result))
            for number, record in enumerate(followed(records, f"verify {out}", unit="shard")):
                _check_shard(out, number, record, manifest.spec, result)
        for split in SPLITS:
            _read_by_position(out, split, samples, result)
        if decode_with is not None:
            _decode(out, FrozenAutoencoder.load(decode_with), samples or DECODED_SAMPLES, result)
    except DataError as error:  # the readers' own complaint: nothing further can be trusted
        result.problems.append(str(error))
    return result


def _check_totals(out: Path, manifest: Manifest, result: VerifyResult) -> None:
    """Hold the tables, the markers and the null members against the manifest."""
    for name in (SHARDS_NAME, SEGMENTS_NAME):
        path = out / name
        same = path.is_file() and file_digest(path) == manifest.tables[name]
        result.expect(same, path, "missing or not the one in the manifest")
    counts = manifest.counts
    result.expect(
        counts.unaccounted == 0, out, f"{counts.unaccounted} of {counts.read} samples ended nowhere"
    )
    segments = load_segments(out / SEGMENTS_NAME)
    for place, split in enumerate(SPLITS):
        rows = int(segments[segments["split"] == place]["rows"].sum())
        result.expect(
            rows == manifest.splits[split],
            out,
            f"{rows} {split} samples in the segments, {manifest.splits[split]} in the manifest",
        )
    result.expect(
        sum(manifest.splits.values()) == counts.written, out, f"splits {manifest.splits} against {counts}"
    )
    for member in manifest.spec.text_members(1):
        path = out / "null" / f"{member.name}.npy"
        found = path.read_bytes() if path.is_file() else b""
        result.expect(
            len(found) == member_bytes(member) and file_digest(path) == manifest.null[member.name],
            path,
            "missing or not the one in the manifest",
        )


def _markers(out: Path, manifest: Manifest, result: VerifyResult) -> Iterator[ShardRecord]:
    """Yield the marker of every shard in the table, after holding all of them against the manifest."""
    table = read_table(out / SHARDS_NAME, SHARD_SCHEMA).to_pylist()
    records = [ShardRecord.load(shard_path(out, row["name"], ".json")) for row in table]
    counts = Counts()
    for record in records:
        counts = counts.plus(record.counts)
    result.expect(counts == manifest.counts, out, f"markers add up to {counts}, manifest {manifest.counts}")
    for row, record in zip(table, records, strict=True):
        ours = {
            "name": record.stem,
            "samples": record.counts.written,
            "bytes": record.tar_bytes,
            "digest": record.tar_digest,
        }
        result.expect(row == ours, out / SHARDS_NAME, f"{row} against the marker's {ours}")
    yield from records


def _check_shard(out: Path, number: int, record: ShardRecord, spec: LatentSpec, result: VerifyResult) -> None:
    """Re-read one shard's three files."""
    tar, parquet = (shard_path(out, record.stem, suffix) for suffix in (".tar", ".parquet"))
    stored = load_segments(out / SEGMENTS_NAME)
    stored = stored[stored["shard"] == number]
    numbered = [Segment(**{**vars(segment), "shard": number}) for segment in record.segments]
    result.expect(
        np.array_equal(stored, segments_array(numbered)), tar, "its segments are not those of its marker"
    )
    if not tar.is_file() or not parquet.is_file():
        result.problems.append(f"{tar}: the tar or its parquet is missing")
        return
    result.expect(file_digest(tar) == record.tar_digest, tar, "its sha256 is not the one in its marker")
    result.expect(
        file_digest(parquet) == record.parquet_digest, parquet, "its sha256 is not the one in its marker"
    )
    try:
        rows = read_table(parquet, ROW_SCHEMA).to_pylist()
        _check_rows(parquet, rows, record, result)
        _check_samples(tar, [row for row in rows if row["status"] == "written"], record, spec, result)
    except DataError as error:
        result.problems.append(str(error))


def _check_rows(
    path: Path, rows: Sequence[dict[str, Any]], record: ShardRecord, result: VerifyResult
) -> None:
    """Hold the rows' statuses and reasons against the marker's counts: written ones first."""
    counts = record.counts
    statuses = [row["status"] for row in rows]
    result.expect(len(rows) == counts.read, path, f"{len(rows)} rows, {counts.read} samples read")
    result.expect(
        statuses[: counts.written] == ["written"] * counts.written
        and statuses.count("written") == counts.written,
        path,
        f"{statuses.count('written')} written rows, or not in front; the marker counts {counts.written}",
    )
    for status, expected in (("rejected", counts.rejected), ("failed", counts.failed)):
        found = Counter(row["reason"] for row in rows if row["status"] == status)
        result.expect(
            found == Counter(expected), path, f"{status} {dict(found)}, the marker counts {expected}"
        )


def _check_samples(
    tar: Path, rows: Sequence[dict[str, Any]], record: ShardRecord, spec: LatentSpec, result: VerifyResult
) -> None:
    """Read every sample at its computed offset; hold headers, row, checksum and statistics against it."""
    members = walk_tar(tar)
    sums = ChannelSums(spec)
    place = 0
    with tar.open("rb") as stream:
        for segment in record.segments:
            layout = spec.members((segment.height, segment.width))
            for row_number in range(segment.rows):
                where = f"{tar}: row {segment.first_row + row_number}"
                offset = segment.first_offset + row_number * segment.stride
                stream.seek(offset)
                block = stream.read(segment.stride)
                try:
                    sample = parse_sample(block, layout, segment.json_bytes, where)
                except DataError as error:
                    result.problems.append(str(error))
                    place += 1
                    continue
                found = members[place * (len(layout) + 1) : (place + 1) * (len(layout) + 1)]
                expected = _expected_members(sample.key, segment, spec, offset)
                result.expect(found == expected, where, f"members {found} instead of {expected}")
                row = rows[place] if place < len(rows) else {}
                _check_row(where, sample, row, segment, result)
                result.expect(
                    row.get("offset") == offset, where, f"the table says offset {row.get('offset')}"
                )
                result.expect(row.get("crc32") == zlib.crc32(block), where, "its checksum is another one")
                _check_values(where, sample, spec, result)
                sums.add(sample.arrays["latent"])
                place += 1
    result.checked += place
    expected_members = sum((len(spec.members((s.height, s.width))) + 1) * s.rows for s in record.segments)
    result.expect(
        len(members) == expected_members, tar, f"{len(members)} members, {expected_members} by its segments"
    )
    _check_sums(tar, sums.statistics(), record.statistics, result)


def _expected_members(key: str, segment: Segment, spec: LatentSpec, offset: int) -> list[Member]:
    layout = spec.members((segment.height, segment.width))
    offsets = member_offsets(layout, segment.json_bytes)
    arrays = [
        Member(f"{key}.{member.name}.npy", offset + offsets[member.name], member_bytes(member))
        for member in layout
    ]
    return [*arrays, Member(f"{key}.json", offset + offsets["json"], segment.json_bytes)]


def _check_row(
    where: str, sample: LatentSample, row: dict[str, Any], segment: Segment, result: VerifyResult
) -> None:
    said = {"key": sample.key, "split": segment.split, "height": segment.height, "width": segment.width}
    said |= {name: sample.record.get(name) for name in ("captions", "crop", "source_sha256")}
    said |= {name: sample.record.get(name) for name in ("original_height", "original_width")}
    differing = [name for name, value in said.items() if row.get(name) != value]
    result.expect(not differing, where, f"the table and the sample disagree in {differing}")


def _check_values(where: str, sample: LatentSample, spec: LatentSpec, result: VerifyResult) -> None:
    for name, array in sample.arrays.items():
        result.expect(bool(np.isfinite(array).all()), where, f"{name} is not finite")
    if spec.latent == "moments":
        logvar = sample.arrays["latent"][spec.channels :]
        inside = bool((logvar >= LOGVAR_RANGE[0]).all() and (logvar <= LOGVAR_RANGE[1]).all())
        result.expect(inside, where, f"logvar outside {LOGVAR_RANGE}")


def _check_sums(tar: Path, found: ChannelStatistics, stored: ChannelStatistics, result: VerifyResult) -> None:
    """Sums were made in input order, here in tar order: equal up to float64 rounding."""
    result.expect(
        found.positions == stored.positions, tar, f"{found.positions} positions, not {stored.positions}"
    )
    for name in ("total", "total_of_squares", "variance_total"):
        ours, theirs = getattr(found, name), getattr(stored, name)
        same = len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-9, atol=1e-6)
        result.expect(same, tar, f"{name} {ours} instead of {theirs}")


def _read_by_position(out: Path, split: str, samples: int | None, result: VerifyResult) -> None:
    """Read samples as training does: a few of each split when everything was read already, else `samples`."""
    dataset = LatentDataset(out, split)
    tables: dict[int, list[dict[str, Any]]] = {}
    try:
        for index in spaced(len(dataset), DECODED_SAMPLES if samples is None else samples):
            where = f"{out}: {split} {index}"
            _check_values(where, dataset.read(index), dataset.spec, result)
            if samples is not None:
                result.checked += 1
                place = dataset.table.place(index)
                stem = dataset.shard_names[place.shard]
                if place.shard not in tables:
                    tables[place.shard] = read_table(
                        shard_path(out, stem, ".parquet"), ROW_SCHEMA
                    ).to_pylist()
                row = tables[place.shard][place.row]
                with shard_path(out, stem, ".tar").open("rb") as stream:
                    block = os.pread(stream.fileno(), place.stride, place.offset)
                same = (row["offset"], row["crc32"]) == (place.offset, zlib.crc32(block))
                result.expect(same, where, "its place or checksum is not the one in the table")
    finally:
        dataset.close()


def spaced(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` places in [0, count), evenly spaced, the first and the last among them."""
    return (
        sorted({int(place) for place in np.linspace(0, count - 1, min(count, wanted)).round()})
        if count
        else []
    )


def _decode(out: Path, autoencoder: FrozenAutoencoder, samples: int, result: VerifyResult) -> None:
    """Decode a few latents of each split, with the autoencoder that made them, to finite pictures."""
    for split in SPLITS:
        dataset = LatentDataset(out, split)
        result.expect(
            autoencoder.digest == dataset.manifest.encoder["autoencoder"],
            out,
            f"decoding with autoencoder {autoencoder.digest}, encoded with {dataset.manifest.encoder['autoencoder']}",
        )
        for index in spaced(len(dataset), samples):
            mean = dataset.read(index).arrays["latent"][: dataset.spec.channels]
            picture = autoencoder.decode(torch.from_numpy(mean.astype(np.float32))[None])
            good = bool(torch.isfinite(picture).all())
            result.expect(good, f"{out}: {split} {index}", "decodes to a picture that is not finite")
        dataset.close()

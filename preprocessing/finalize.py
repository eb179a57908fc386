"""From finished shards to a data set: check that all is there and adds up, write the tables, the manifest last.

Nothing here depends on the clock or the machine: running it twice gives the same digest.
"""

import dataclasses
import io
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EncodeConfig, RunConfig
from pipeline.errors import DataError
from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.record import npy_bytes
from pipeline.latents.rows import SHARD_SCHEMA, read_table, write_table
from pipeline.latents.segments import SPLITS, Segment, segments_array
from pipeline.latents.shard import (
    ChannelStatistics,
    Counts,
    ShardRecord,
    fingerprint_difference,
    shard_path,
)
from pipeline.latents.spec import LatentSpec
from pipeline.models.text_pair import load_text_encoder
from pipeline.paths import RunPaths, text_encoder_folder
from pipeline.progress import followed
from pipeline.publish import file_digest, whole_file, write_bytes
from preprocessing.claims import remove_dead_temporaries
from preprocessing.encoded import stored_tokens
from preprocessing.encoder import TextEncoder
from preprocessing.filters import Rules
from preprocessing.leases import remove_leases
from preprocessing.refusals import check_failures
from preprocessing.roster import validation_shares
from preprocessing.sources import InputShard, left_out_shards, list_shards

LOG = logging.getLogger(__name__)
LISTED = 20
FP16_FRACTION_BITS = 10


def finalize_dataset(
    config: RunConfig, out: Path, source: Path | str, *, text_encoder: TextEncoder | None = None
) -> Manifest:
    """Write tables, null text and manifest of the data set in `out`, made from `source`; return the manifest.

    `text_encoder` is loaded from the config's folder unless given.

    Raises:
        DataError: when a shard is missing or foreign, counts do not add up, shards were made with different
            settings or others than the config's, or the text encoder is not the one that was used.
    """
    shards = list_shards(source, config.encode)
    records = _records(out, shards)
    _check_files(out, records)
    common = _common_fingerprint(out, records, shards, config.encode)
    counts = _conserved_counts(out, records, config.encode)
    spec = LatentSpec.from_dict(common["spec"], str(out))
    if text_encoder is None:
        folder = text_encoder_folder(config, RunPaths(Path(config.runs) / config.name))
        text_encoder = load_text_encoder(config.encode, folder)
    _check_text_encoder(text_encoder, common["encoder"])
    segments = [
        dataclasses.replace(segment, shard=number)
        for number, record in enumerate(records)
        for segment in record.segments
    ]
    splits = {name: sum(s.rows for s in segments if s.split == name) for name in SPLITS}
    if not splits["train"]:
        raise DataError(
            f"{out}: no sample left to train on: {counts.written} written, {splits['validation']} of them for "
            f"validation (encode.validation_samples {config.encode.validation_samples}); "
            f"rejected {counts.rejected}, failed {counts.failed}"
        )
    _refuse_small_buckets(out, segments, config.engine.global_batch)
    remove_dead_temporaries(out)
    remove_leases(out)
    manifest = Manifest(
        spec=spec,
        counts=counts,
        splits=splits,
        buckets=_buckets(segments),
        encoder=common["encoder"],
        preprocessing={**common["preprocessing"], "versions": common["versions"], "code": common["code"]},
        statistics=_statistics(records, len(left_out_shards(source))),
        tables=_write_tables(out, records, segments),
        null=_write_null(out, spec, text_encoder),
    ).save(out)
    _tell(manifest)
    return manifest


def _records(out: Path, shards: Sequence[InputShard]) -> list[ShardRecord]:
    """Return the marker of every input shard, in the order of the input."""
    stems = {shard.stem for shard in shards}
    missing = [shard.stem for shard in shards if not shard_path(out, shard.stem, ".json").is_file()]
    if missing:
        raise DataError(
            f"{out}: {len(missing)} of {len(shards)} input shards are not encoded: {_listed(missing)}; run "
            "`ldm encode` again, or move input shards that cannot be read out of the source folder"
        )
    foreign = sorted(str(path.relative_to(out)) for path in out.glob("*/*.tar") if path.stem not in stems)
    if foreign:
        raise DataError(
            f"{out}: {len(foreign)} shards have no input shard in the source: {_listed(foreign)}; remove them, "
            "or bring their input back"
        )
    return [ShardRecord.load(shard_path(out, shard.stem, ".json")) for shard in shards]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _check_files(out: Path, records: Sequence[ShardRecord]) -> None:
    """Refuse a shard whose own counts do not add up or whose files are not the ones it committed."""
    wrong = []
    for record in followed(records, f"finalize {out}", unit="shard"):
        tar, parquet = (shard_path(out, record.stem, suffix) for suffix in (".tar", ".parquet"))
        found = tar.stat().st_size if tar.is_file() else None
        in_segments = sum(segment.rows for segment in record.segments)
        if record.counts.unaccounted or in_segments != record.counts.written:
            wrong.append(f"{record.stem} does not add up ({record.counts}, {in_segments} in its segments)")
        if found != record.tar_bytes:
            wrong.append(f"{tar} has {found} bytes instead of {record.tar_bytes}")
        if not parquet.is_file() or file_digest(parquet) != record.parquet_digest:
            wrong.append(f"{parquet} is missing or not the one that was committed")
    if wrong:
        raise DataError(f"{out}: {_listed(wrong)}; remove these shards' files and run `ldm encode` again")


def _common_fingerprint(
    out: Path, records: Sequence[ShardRecord], shards: Sequence[InputShard], encode: EncodeConfig
) -> dict[str, Any]:
    """Return what all shards have in common, which is everything but their input."""
    common = {name: value for name, value in records[0].fingerprint.items() if name != "input"}
    wanted = {
        **common,
        "spec": {**common["spec"], "latent": encode.latent, "text": encode.text},
        "encoder": {**common["encoder"], "precision": encode.precision},
        "preprocessing": {**Rules.from_config(encode).as_dict(), "batch": encode.batch},
    }
    shares = validation_shares(len(shards), encode.validation_samples)
    lines = []
    for record, shard, share in zip(records, shards, shares, strict=True):
        # Size only: hashing all the input once more would read it all once more.
        known = {"bytes": shard.size_bytes(), "validation_samples": share}
        expected = {**wanted, "input": {**record.fingerprint["input"], **known}}
        lines += [f"{record.stem}: {line}" for line in fingerprint_difference(record.fingerprint, expected)]
    if lines:
        raise DataError(
            f"{out}: shards were made with other settings or input than the config names, or than each other: "
            f"{_listed(lines)}; set them back, or encode into a new folder"
        )
    return common


def _conserved_counts(out: Path, records: Sequence[ShardRecord], encode: EncodeConfig) -> Counts:
    """Return the counts of all shards; nothing may be missing from them, and few may have failed."""
    counts = Counts()
    for record in records:
        counts = counts.plus(record.counts)
    if counts.unaccounted:
        raise DataError(f"{out}: {counts.unaccounted} of {counts.read} samples ended nowhere: {counts}")
    check_failures(counts, encode.max_failed_fraction)
    return counts


def _check_text_encoder(text_encoder: TextEncoder, used: dict[str, str]) -> None:
    found = {"text_encoder": text_encoder.digest, "tokenizer": text_encoder.tokenizer_digest}
    lines = fingerprint_difference({name: used[name] for name in found}, found)
    if lines:
        raise DataError(
            f"encode.text_encoder: not the one that the shards were encoded with: {'; '.join(lines)}; give that one"
        )


def _write_null(out: Path, spec: LatentSpec, text_encoder: TextEncoder) -> dict[str, str]:
    """Write the members of the empty caption, so that caption dropout needs no encoder; return their digests."""
    tokens, _ = text_encoder.tokenize([""])
    arrays = {"tokens": stored_tokens(tokens.cpu().numpy())}
    states, pooled = text_encoder.encode_pooled(tokens)
    for name, found in (("text", states if spec.text == "embeddings" else None), ("pooled", pooled)):
        if found is not None:
            arrays[name] = found.float().cpu().numpy().astype(np.float16)
            if not np.isfinite(arrays[name]).all():
                raise DataError(
                    f"encode.text_encoder: {name} of the empty caption is not finite in fp16; set encode.precision: fp32"
                )
    digests = {}
    for member in spec.text_members(1):
        array = arrays[member.name]
        assert (array.dtype.str, array.shape) == (member.dtype, member.shape), (member, array.shape)
        path = out / "null" / f"{member.name}.npy"
        write_bytes(path, npy_bytes(array))
        digests[member.name] = file_digest(path)
    return digests


def _write_tables(out: Path, records: Sequence[ShardRecord], segments: list[Segment]) -> dict[str, str]:
    """Write shards.parquet and segments.npy and return their digests."""
    rows = [
        {"name": r.stem, "samples": r.counts.written, "bytes": r.tar_bytes, "digest": r.tar_digest}
        for r in records
    ]
    if not _holds(out / SHARDS_NAME, rows):
        with whole_file(out / SHARDS_NAME) as beside:
            write_table(beside, rows, SHARD_SCHEMA)
    stream = io.BytesIO()
    np.save(stream, segments_array(segments), allow_pickle=False)
    write_bytes(out / SEGMENTS_NAME, stream.getvalue())
    return {name: file_digest(out / name) for name in (SHARDS_NAME, SEGMENTS_NAME)}


def _holds(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Return whether the table has these rows: parquet files name the pyarrow release that wrote them.

    Kept as it is, the data set keeps its digest, and a training goes on, after an upgrade of pyarrow.
    """
    try:
        return bool(read_table(path, SHARD_SCHEMA).to_pylist() == rows)
    except DataError:
        return False


def _buckets(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    rows = Counter[tuple[int, int, str]]()
    for segment in segments:
        rows[segment.height, segment.width, segment.split] += segment.rows
    sizes = sorted({(segment.height, segment.width) for segment in segments})
    return [
        {"height": height, "width": width, **{split: rows[height, width, split] for split in SPLITS}}
        for height, width in sizes
    ]


def _refuse_small_buckets(out: Path, segments: Sequence[Segment], global_batch: int) -> None:
    """Refuse shapes among several that cannot fill one batch: their samples would be seen too rarely, or never."""
    buckets = _buckets(segments)
    small = [bucket for bucket in buckets if bucket["train"] < global_batch]
    if len(buckets) > 1 and small:
        named = [f"{bucket['height']}x{bucket['width']} ({bucket['train']})" for bucket in small]
        raise DataError(
            f"{out}: {len(small)} of {len(buckets)} buckets have fewer training samples than engine.global_batch "
            f"{global_batch}: {_listed(named)}; encode into a new folder without them in encode.buckets (a wider "
            "bucket_tolerance merges them into their neighbours), or train with a smaller batch"
        )


def _statistics(records: Sequence[ShardRecord], left_out: int) -> dict[str, Any]:
    """Return what is counted beside the samples' ends, with the input shards that were left out, and the channels."""
    sums = records[0].statistics
    for record in records[1:]:
        sums = sums.plus(record.statistics)
    remarks = Counter[str]()
    for record in records:
        remarks.update(record.extra.get("remarks", {}))
    if left_out:
        remarks["unfinished_shards"] = left_out
    return {"remarks": dict(sorted(remarks.items())), **channel_statistics(sums)}


def channel_statistics(sums: ChannelStatistics) -> dict[str, Any]:
    """Return per channel mean and std of the latents, and how the posterior compares with fp16.

    `posterior_std` is the root mean of the posterior variance; `fp16_rounding` the rms error of storing values as
    large as the latents' rms. Where the posterior is hardly wider than the rounding, moments add nothing to means.
    """
    count = sums.positions
    mean = [total / count for total in sums.total]
    squares = [total / count for total in sums.total_of_squares]
    std = [math.sqrt(max(0.0, square - value**2)) for square, value in zip(squares, mean, strict=True)]
    overall = math.sqrt(max(0.0, sum(squares) / len(squares) - (sum(mean) / len(mean)) ** 2))
    statistics: dict[str, Any] = {
        "positions": count,
        "mean": mean,
        "std": std,
        "std_overall": overall,
        "scaling_factor_for_unit_std": 1.0 / overall if overall else None,
    }
    if sums.variance_total:
        posterior = [math.sqrt(total / count) for total in sums.variance_total]
        rounding = [fp16_rounding(math.sqrt(square)) for square in squares]
        wider = any(p > 2 * r for p, r in zip(posterior, rounding, strict=True))
        statistics |= {
            "posterior_std": posterior,
            "fp16_rounding": rounding,
            "recommended_latent": "moments" if wider else "mean",
        }
    return statistics


def fp16_rounding(size: float) -> float:
    """Return the rms error of rounding a value of this size to fp16: its last place over the root of 12."""
    exponent = max(-14, math.floor(math.log2(size))) if size > 0 else -14
    return float(2.0 ** (exponent - FP16_FRACTION_BITS) / math.sqrt(12))


def _tell(manifest: Manifest) -> None:
    counts, statistics = manifest.counts, manifest.statistics
    LOG.info(
        "%d read = %d written + %d rejected %s + %d failed %s; train %d, validation %d",
        counts.read,
        counts.written,
        sum(counts.rejected.values()),
        counts.rejected,
        sum(counts.failed.values()),
        counts.failed,
        manifest.splits["train"],
        manifest.splits["validation"],
    )
    squared = statistics["remarks"].get("squared", 0)
    if squared > counts.written / 2:
        LOG.warning(
            "%d of %d pictures were made square before they came here (img2dataset's resize_mode border pads with white "
            "bars, center_crop cuts): look at the gallery of `ldm report`",
            squared,
            counts.written,
        )
    if "recommended_latent" in statistics:
        LOG.info(
            "posterior std %s against fp16 rounding %s: encode.latent=%s recommended",
            [f"{value:.2g}" for value in statistics["posterior_std"]],
            [f"{value:.2g}" for value in statistics["fp16_rounding"]],
            statistics["recommended_latent"],
        )

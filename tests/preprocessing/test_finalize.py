"""A manifest is written for a complete, consistent set of shards and for nothing else."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.latents.manifest import SHARDS_NAME, Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.latents.rows import SHARD_SCHEMA, read_table
from pipeline.latents.shard import ChannelStatistics, Segment
from preprocessing.finalize import _refuse_small_buckets, channel_statistics, finalize_dataset, fp16_rounding
from preprocessing.verify import verify_dataset
from tests.builders import tiny_config
from tests.preprocessing.builders import (
    POISON,
    NumpyEncoder,
    image_file,
    noise,
    pair,
    pairs,
    solid,
    write_input,
)
from tests.preprocessing.conftest import Prepared
from tests.preprocessing.torch_stubs import StubTextEncoder


def edit_marker(prepared: Prepared, stem: str, change: Any) -> None:
    path = prepared.out / "00" / f"{stem}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_twice_is_the_same_digest(prepared: Prepared) -> None:
    before = {path: path.read_bytes() for path in prepared.out.rglob("*") if path.is_file()}
    digest = Manifest.load(prepared.out).digest
    assert prepared.finalize() == digest
    assert {path: path.read_bytes() for path in prepared.out.rglob("*") if path.is_file()} == before


def test_another_run_of_the_whole_chain_has_the_same_digest(prepared: Prepared) -> None:
    digest = Manifest.load(prepared.out).digest
    prepared.out = prepared.root / "again"
    prepared.encode()
    assert prepared.finalize() == digest


def test_another_pyarrow_does_not_change_the_digest(prepared: Prepared) -> None:
    """The same rows in other bytes, as another release writes them, stay; other rows do not."""
    path, digest = prepared.out / SHARDS_NAME, Manifest.load(prepared.out).digest
    rows = read_table(path, SHARD_SCHEMA)
    changed = rows.set_column(1, "samples", [[1] * len(rows)])
    pq.write_table(changed, path)
    assert prepared.finalize() == digest
    pq.write_table(rows, path, compression="gzip")
    (prepared.out / "manifest.json").unlink()
    other = prepared.finalize()
    assert other != digest and prepared.finalize() == other
    assert len(LatentDataset(prepared.out)) == 14


def test_what_the_manifest_says(prepared: Prepared) -> None:
    manifest = Manifest.load(prepared.out)
    assert manifest.spec == NumpyEncoder().spec
    assert (manifest.counts.read, manifest.counts.written, manifest.counts.unaccounted) == (18, 18, 0)
    assert manifest.splits == {"train": 14, "validation": 4}
    assert manifest.buckets == [{"height": 16, "width": 16, "train": 14, "validation": 4}]
    assert manifest.encoder == NumpyEncoder().fingerprint()["encoder"]
    assert manifest.preprocessing["image_size"] == 16 and manifest.preprocessing["batch"] == 4
    assert manifest.statistics["remarks"] == {"truncated_caption": 18}


def test_statistics_are_those_of_all_stored_latents(prepared: Prepared) -> None:
    latents = []
    for split in ("train", "validation"):
        dataset = LatentDataset(prepared.out, split)
        latents += [dataset.read(index).arrays["latent"].astype(np.float64) for index in range(len(dataset))]
    stored = np.stack(latents)
    statistics = Manifest.load(prepared.out).statistics
    assert np.allclose(statistics["mean"], stored[:, :3].mean(axis=(0, 2, 3)))
    assert np.allclose(statistics["std"], stored[:, :3].std(axis=(0, 2, 3)))
    assert np.isclose(statistics["std_overall"], stored[:, :3].std())
    assert np.allclose(statistics["posterior_std"], np.sqrt(np.exp(stored[:, 3:]).mean(axis=(0, 2, 3))))
    assert statistics["recommended_latent"] == "moments"


def test_null_text_is_that_of_the_empty_caption(prepared: Prepared) -> None:
    null, encoder = LatentDataset(prepared.out).null_text(), NumpyEncoder()
    assert null["tokens"].tolist() == [encoder.tokens("").tolist()]
    assert np.array_equal(null["text"][0], encoder.text_states(encoder.tokens("")).astype(np.float16))


def test_validation_samples_are_spread_over_the_shards(prepared: Prepared) -> None:
    validation = LatentDataset(prepared.out, "validation")
    keys = [validation.read(index).key for index in range(len(validation))]
    assert [sum(key.startswith(stem) for key in keys) for stem in ("00000", "00001", "00002")] == [2, 1, 1]
    train = LatentDataset(prepared.out, "train")
    assert not {train.read(index).key for index in range(len(train))} & set(keys)


def test_missing_shards_are_listed(prepared: Prepared) -> None:
    for stem in ("00000", "00002"):
        (prepared.out / "00" / f"{stem}.json").unlink()
    with pytest.raises(
        DataError, match="2 of 3 input shards are not encoded: 00000, 00002; run `ldm encode`"
    ):
        prepared.finalize()


def test_shards_of_another_source_are_refused(prepared: Prepared) -> None:
    (prepared.source / "00001.tar").unlink()
    (prepared.source / "00001_stats.json").unlink()
    with pytest.raises(DataError, match=r"1 shards have no input shard in the source: 00/00001\.tar"):
        prepared.finalize()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["counts"].update(read=8), "00000 does not add up"),
        (lambda m: m["counts"].update(read=6, written=6), "7 in its segments"),
        (lambda m: m.update(tar_bytes=5), "bytes instead of 5"),
        (lambda m: m.update(parquet_digest="0"), "not the one that was committed"),
        (
            lambda m: m["fingerprint"]["versions"].update(numpy="1"),
            "versions.numpy: '1' on disk, '2' wanted|versions.numpy: '2' on disk, '1' wanted",
        ),
        (
            lambda m: m["fingerprint"]["encoder"].update(precision="bf16"),
            "encoder.precision: 'bf16' on disk, 'fp32' wanted",
        ),
        (
            lambda m: m["fingerprint"]["input"].update(validation_samples=0),
            "input.validation_samples: 0 on disk, 2 wanted",
        ),
        (lambda m: m["fingerprint"]["encoder"].update(text_encoder="x"), "encoder.text_encoder: "),
    ],
)
def test_shards_that_do_not_fit_are_named(prepared: Prepared, change: Any, said: str) -> None:
    edit_marker(prepared, "00000", change)
    with pytest.raises(DataError, match=said) as caught:
        prepared.finalize()
    assert "0000" in str(caught.value)


def test_a_missing_or_short_tar_is_found(prepared: Prepared) -> None:
    tar = prepared.out / "00/00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"00001\.tar has \d+ bytes instead of"):
        prepared.finalize()
    tar.unlink()
    with pytest.raises(DataError, match=r"00001\.tar has None bytes"):
        prepared.finalize()


def test_an_input_that_changed_since_is_refused(prepared: Prepared) -> None:
    tar = prepared.source / "00001.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"00001: input\.bytes: \d+ on disk, \d+ wanted"):
        prepared.finalize()


def test_the_config_must_be_the_one_of_the_shards(prepared: Prepared) -> None:
    prepared.config = tiny_config(
        prepared.root / "runs",
        encode={"source": str(prepared.source), "image_size": 32, "batch": 4, "latent": "mean"},
    )
    with pytest.raises(DataError, match=r"image_size: 16 on disk, 32 wanted") as caught:
        prepared.finalize()
    assert "spec.latent: 'moments' on disk, 'mean' wanted" in str(caught.value)


def test_another_text_encoder_is_refused(prepared: Prepared) -> None:
    with pytest.raises(DataError, match=r"encode\.text_encoder: not the one .* text_encoder: .* tokenizer: "):
        finalize_dataset(prepared.config, prepared.out, prepared.source, text_encoder=StubTextEncoder("b"))


def test_nothing_to_train_on(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    poison = [("nan.png", image_file(solid(POISON))), ("nan.txt", b"x")]
    write_input(
        prepared.source, {"00000": [*pair("only", 1), *poison], "00001": [("x.png", b""), ("x.txt", b"x")]}
    )
    prepared.encode()
    with pytest.raises(
        DataError, match=r"no sample left to train on: 1 written, 1 of them for validation"
    ) as caught:
        prepared.finalize()
    assert "{'empty': 1, 'nonfinite_latent': 1}" in str(caught.value)
    assert not (prepared.out / "manifest.json").exists()


def test_failures_are_bounded_over_the_whole_set(prepared: Prepared) -> None:
    edit_marker(prepared, "00000", lambda m: m["counts"].update(read=10, failed={"OSError": 3}))
    with pytest.raises(DataError, match="3 of 21 samples failed"):
        prepared.finalize()


def test_empty_shards_are_part_of_the_set(tmp_path: Path) -> None:
    prepared = Prepared(tmp_path)
    write_input(
        prepared.source,
        {"00000": pairs([str(k) for k in range(8)]), "00001": [("x.png", b""), ("x.txt", b"x")]},
    )
    prepared.encode()
    prepared.finalize()
    manifest = Manifest.load(prepared.out)
    assert manifest.splits == {"train": 6, "validation": 2} and manifest.counts.rejected == {"empty": 1}
    assert [LatentDataset(prepared.out).read(index).key for index in range(6)]


def test_leftovers_of_dead_workers_go(prepared: Prepared) -> None:
    left = prepared.out / "00" / ".00000.tar.tmp-1-x"
    left.write_bytes(b"half a tar")
    prepared.finalize()
    assert not left.exists()


@pytest.mark.parametrize("size", [1e-3, 0.7, 1.0, 1.9, 30.0])
def test_rounding_of_fp16(size: float) -> None:
    """A uniform error of one last place: measured on values close to `size`."""
    values = np.random.default_rng(0).uniform(size, size * 1.01, 20_000)
    values = values[values < 2.0 ** (math.floor(math.log2(size)) + 1)]
    measured = np.sqrt(np.mean(np.square(values.astype(np.float16).astype(np.float64) - values)))
    assert np.isclose(fp16_rounding(size), measured, rtol=0.05)


@pytest.mark.parametrize(("variance", "expected"), [(1e-8, "mean"), (1e-2, "moments")])
def test_recommendation(variance: float, expected: str) -> None:
    sums = ChannelStatistics(10, [0.0, 0.0], [10.0, 40.0], [10 * variance, 10 * variance])
    statistics = channel_statistics(sums)
    assert statistics["std"] == [1.0, 2.0] and statistics["recommended_latent"] == expected
    assert np.isclose(statistics["scaling_factor_for_unit_std"], 1 / math.sqrt(2.5))


def test_a_bucket_that_cannot_fill_a_batch_is_refused_by_name() -> None:
    def segment(height: int, rows: int, split: str = "train") -> Segment:
        return Segment(0, split, height, 64, 256, 0, rows, 1024, 0)

    segments = [segment(32, 7), segment(64, 5), segment(64, 3), segment(32, 4, "validation")]
    _refuse_small_buckets(Path("set"), segments, 7)
    _refuse_small_buckets(
        Path("set"), segments[:1], 100
    )  # one shape: training itself compares, with both values
    with pytest.raises(
        DataError, match=r"set: 1 of 2 buckets .* engine\.global_batch 8: 32x64 \(7\); encode into"
    ):
        _refuse_small_buckets(Path("set"), segments, 8)


def test_no_tar_is_read(prepared: Prepared) -> None:
    """Zeros of the same length in place of every tar: the statistics come from the markers alone."""
    before = Manifest.load(prepared.out)
    for tar in prepared.out.glob("*/*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    (prepared.out / "manifest.json").unlink()
    assert prepared.finalize() == before.digest


def test_what_fp16_leaves_of_the_posterior_is_said(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        prepared.finalize()
    assert "18 read = 18 written + 0 rejected {} + 0 failed {}; train 14, validation 4" in caplog.text
    assert "against fp16 rounding" in caplog.text and "encode.latent=moments recommended" in caplog.text


def test_shards_that_were_left_out_are_counted(prepared: Prepared) -> None:
    digest = Manifest.load(prepared.out).digest
    (prepared.source / "00009.tar").write_bytes(b"a part of a shard")
    encode = {"source": str(prepared.source), "image_size": 16, "batch": 4, "validation_samples": 4}
    prepared.config = tiny_config(prepared.root / "runs", encode={**encode, "unfinished_shards": "leave_out"})
    assert prepared.finalize() != digest
    assert Manifest.load(prepared.out).statistics["remarks"]["unfinished_shards"] == 1


def test_pictures_that_img2dataset_padded_to_squares_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = Prepared(tmp_path)
    sizes = json.dumps({"width": 20, "height": 20, "original_width": 60, "original_height": 40}).encode()
    files = [file for k in range(8) for file in [*pair(f"k{k}", k), (f"k{k}.json", sizes)]]
    write_input(prepared.source, {"00000": files})
    prepared.encode()
    prepared.finalize()
    assert "8 of 8 pictures were made square before they came here" in caplog.text
    assert Manifest.load(prepared.out).statistics["remarks"]["squared"] == 8


def with_buckets(root: Path, counts: dict[tuple[int, int], int], global_batch: int) -> Prepared:
    """Return a data set of so many pictures of each shape, encoded into buckets of 16 x 16 and 8 x 32."""
    prepared = Prepared(root)
    files, number = [], 0
    for (height, width), count in counts.items():
        for _ in range(count):
            files += [(f"k{number}.png", image_file(noise(number, height, width))), (f"k{number}.txt", b"x")]
            number += 1
    write_input(prepared.source, {"00000": files[: number // 2 * 2], "00001": files[number // 2 * 2 :]})
    encode = {"source": str(prepared.source), "image_size": 16, "batch": 4, "validation_samples": 0}
    shapes = {"buckets": [[16, 16], [8, 32]], "bucket_tolerance": 0.1}
    engine = {"global_batch": global_batch, "micro_batch": 1}
    prepared.config = tiny_config(root / "runs", encode=encode | shapes, engine=engine)
    prepared.encode()
    return prepared


def test_a_small_bucket_stops_finalize_and_a_smaller_batch_mends_it(tmp_path: Path) -> None:
    """Through the whole stage: shapes by picture, segments by shape, rejected where the crop would cost too much."""
    counts = {(20, 20): 7, (10, 40): 3, (20, 40): 2}
    prepared = with_buckets(tmp_path / "large", counts, global_batch=4)
    with pytest.raises(DataError, match=r"1 of 2 buckets have fewer .* engine\.global_batch 4: 8x32 \(3\)"):
        prepared.finalize()
    assert not (prepared.out / "manifest.json").exists()
    prepared = with_buckets(tmp_path / "small", counts, global_batch=3)
    prepared.finalize()
    manifest = Manifest.load(prepared.out)
    assert manifest.counts.rejected == {"bucket": 2}
    assert [(b["height"], b["width"], b["train"]) for b in manifest.buckets] == [(8, 32, 3), (16, 16, 7)]
    dataset = LatentDataset(prepared.out)
    shapes = Counter(dataset.read(index).arrays["latent"].shape for index in range(len(dataset)))
    assert shapes == {(6, 4, 4): 7, (6, 2, 8): 3}
    assert verify_dataset(prepared.out, samples=None, decode_with=None).problems == []

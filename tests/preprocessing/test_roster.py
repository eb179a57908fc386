"""Any number of workers, killed at any moment: the same bytes; other settings: refused by name."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.latents.shard import Counts
from preprocessing.refusals import OtherFingerprintError, check_failures
from preprocessing.roster import Work, encode_shards, validation_shares
from preprocessing.samples import FileShard, RawSample
from preprocessing.sources import list_shards
from tests.preprocessing.builders import (
    NumpyEncoder,
    encode_config,
    pair,
    pairs,
    tar_bytes,
    three_shards,
    write_input,
)
from tests.preprocessing.encode_process import contents

ROOT = Path(__file__).parents[2]


def encode(
    source: Path,
    out: Path,
    encoder: NumpyEncoder | None = None,
    worker: int = 0,
    workers: int = 1,
    **changes: Any,
) -> Any:
    return encode_shards(
        Work(list_shards(source), out, worker, workers), encoder or NumpyEncoder(), encode_config(**changes)
    )


def process(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.preprocessing.encode_process", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_shares_are_even_and_complete() -> None:
    assert validation_shares(3, 7) == [3, 2, 2]
    assert validation_shares(3, 0) == [0, 0, 0]
    assert validation_shares(5, 3) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_every_worker_reaches_every_shard_its_own_first(workers: int) -> None:
    shards = list(range(7))
    works = [Work(shards, Path(), worker, workers) for worker in range(workers)]  # type: ignore[arg-type]
    assert sorted(number for work in works for number in work.own()) == shards
    for work in works:
        assert sorted([*work.own(), *work.others()]) == shards


def test_again_is_skipped_and_equal(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    first = encode(source, tmp_path / "a")
    encode(source, tmp_path / "b")
    assert (first.encoded, first.finished_before, first.counts.read) == (3, 0, 18)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    encoder = NumpyEncoder()
    again = encode(source, tmp_path / "a", encoder)
    assert (again.encoded, again.finished_before, again.counts) == (0, 3, first.counts)
    assert encoder.batches == []
    assert "18 read = 18 written" in str(again)


def test_a_shard_whose_tar_was_removed_is_made_again(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out/00/00001.tar").unlink()
    assert encode(source, tmp_path / "out").encoded == 1
    assert contents(tmp_path / "out") == before


def test_a_finished_tar_of_another_size_is_not_skipped_over(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out")
    tar = tmp_path / "out/00/00001.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    with pytest.raises(
        DataError, match=rf"00001\.tar: finished, but has {size - 512} bytes instead of the {size}"
    ):
        encode(source, tmp_path / "out")


def test_a_folder_of_pictures_is_encoded_like_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.sources.SHARD_IMAGES", 4)
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    for name, content in [*pairs([f"p{k}" for k in range(5)]), *pair("deep/q", 9), ("notes.md", b"x")]:
        (source / name).write_bytes(content)
    done = encode(source, tmp_path / "out")
    assert (done.encoded, done.counts.written, done.counts.rejected) == (2, 6, {"orphan": 1})
    assert encode(source, tmp_path / "out").finished_before == 2
    (source / "p9.txt").write_bytes(b"a new file moves everything after it")
    with pytest.raises(OtherFingerprintError, match=r"00001\.json: .*input\.bytes"):
        encode(source, tmp_path / "out")


def test_a_helper_takes_what_is_left(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    done = encode(source, tmp_path / "out", worker=1, workers=3)
    assert (done.encoded, done.counts.read) == (3, 18)
    late = encode(source, tmp_path / "out", worker=0, workers=3)
    assert (late.encoded, late.finished_before, late.counts.read) == (0, 1, 7)


def test_three_processes_make_the_same_bytes_as_one(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "one")
    workers = [process("encode", source, tmp_path / "three", worker, 3, 0.05) for worker in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.faults
def test_killed_at_every_durable_call(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", {"00000": pairs(["a", "b", "c"]), "00001": pairs(["d"], 9)})
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as work:
        worker = process("sweep", source, work)
        said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0
    found = json.loads(said)
    assert found["kills"] >= 24 and 0 < found["leftovers"] < found["kills"]


@pytest.mark.faults
def test_killed_at_random_moments(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "straight")
    draw = random.Random(0)
    for _ in range(3):
        worker = process("encode", source, tmp_path / "out", 0, 1, 0.1)
        deadline = time.monotonic() + 60
        while not (tmp_path / "out").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        worker.kill()
        worker.wait(60)
        for name, content in contents(tmp_path / "out").items():
            assert content == contents(tmp_path / "straight")[name]
    encode(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({"image_size": 32}, "preprocessing.image_size", ("16 on disk", "32 wanted")),
        (
            {"background": [0, 0, 0]},
            "preprocessing.background",
            ("[255, 255, 255] on disk", "[0, 0, 0] wanted"),
        ),
        ({"batch": 3}, "preprocessing.batch", ("4 on disk", "3 wanted")),
        ({"validation_samples": 9}, "input.validation_samples", ("1 on disk", "3 wanted")),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], field: str, values: tuple[str, str]
) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out")
    with pytest.raises(OtherFingerprintError) as caught:
        encode(source, tmp_path / "out", **changes)
    assert f"{field}: {values[0]}, {values[1]}" in str(caught.value) and "00000.json" in str(caught.value)


def test_other_weights_and_other_input_are_refused(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out")
    with pytest.raises(OtherFingerprintError, match=r"encoder\.autoencoder: .* encoder\.text_encoder: "):
        encode(source, tmp_path / "out", NumpyEncoder(weights="b"))
    with pytest.raises(OtherFingerprintError, match=r"spec\.latent: 'moments' on disk, 'mean' wanted"):
        encode(source, tmp_path / "out", NumpyEncoder(latent="mean"))
    write_input(source, {"00000": pairs(["changed"])})
    with pytest.raises(OtherFingerprintError, match=r"input\.bytes: .* input\.sha256: "):
        encode(source, tmp_path / "out")


def test_going_on_reads_only_input_that_was_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out")
    read: list[str] = []
    samples = FileShard.samples

    def noted(shard: FileShard, only: Container[str] | None = None) -> Iterator[RawSample]:
        read.append(shard.stem)
        return samples(shard, only)

    monkeypatch.setattr(FileShard, "samples", noted)
    assert encode(source, tmp_path / "out").finished_before == 3 and read == []
    os.utime(source / "00001.tar")
    assert encode(source, tmp_path / "out").finished_before == 3 and read == ["00001"]


def test_a_tar_without_marker_with_other_bytes_is_an_error(tmp_path: Path) -> None:
    """Left by a killed worker that had other weights: nobody may take it for ours."""
    source = three_shards(tmp_path / "in")
    encode(source, tmp_path / "out", NumpyEncoder(latent="mean"))
    (tmp_path / "out/00/00000.json").unlink()
    for stem in ("00001", "00002"):
        for path in (tmp_path / "out/00").glob(f"{stem}*"):
            path.unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards could not be encoded, .*00000\.tar: there already"):
        encode(source, tmp_path / "out")


def test_damaged_shards_are_left_out_and_all_named(tmp_path: Path) -> None:
    source = three_shards(tmp_path / "in")
    for stem in ("00000", "00002"):
        (source / f"{stem}.tar").write_bytes((source / f"{stem}.tar").read_bytes()[:5000])
    with pytest.raises(DataError) as caught:
        encode(source, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("2 of 3 shards could not be encoded")
    assert (
        "00000.tar" in said
        and "7 samples expected" in said
        and "00002.tar" in said
        and "00001.tar" not in said
    )
    assert set(contents(tmp_path / "out")) == {
        f"00/00001{suffix}" for suffix in (".tar", ".parquet", ".json")
    }


def test_too_many_failures_stop_after_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(payload: bytes, rules: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("preprocessing.images.prepare_image", broken)
    source = three_shards(tmp_path / "in")
    with pytest.raises(DataError, match=r"7 of 7 samples failed \(ZeroDivisionError 7\).*allows 0\.01"):
        encode(source, tmp_path / "out", shards_at_once=1)
    assert "00/00000.json" in contents(tmp_path / "out") and "00/00001.json" not in contents(tmp_path / "out")
    with pytest.raises(DataError, match="7 of 7 samples failed"):
        encode(source, tmp_path / "out", shards_at_once=1)
    assert encode(source, tmp_path / "out", max_failed_fraction=1.0).counts.failed == {
        "ZeroDivisionError": 18
    }


def test_the_failure_limit_is_a_share() -> None:
    check_failures(Counts(100, 98, {"aspect": 1}, {"x": 1}), 0.01)
    check_failures(Counts(), 0.0)
    with pytest.raises(DataError):
        check_failures(Counts(100, 98, {}, {"x": 2}), 0.01)


def test_progress_counts_shards_where_samples_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LDM_QUIET", raising=False)
    for stem in ("a", "b"):
        (tmp_path / f"{stem}.tar").write_bytes(tar_bytes(pair(stem, 1)))
    encode(tmp_path, tmp_path / "out")
    assert "encode: 2/2 shard" in capsys.readouterr().err
    encode(three_shards(tmp_path / "in"), tmp_path / "out2")
    assert "encode: 18/18 sample" in capsys.readouterr().err

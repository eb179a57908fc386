"""Training data from a real S3 server on loopback that is slow, fails, and cuts connections inside a sample."""

import os
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.data.sets import open_dataset
from pipeline.errors import ConfigError, DataError
from tests.pipeline.data.datasets import square_shards, write_dataset
from tests.services.proxy import Proxy, proxy_to
from tests.services.test_s3 import s3_server as s3_server
from tests.services.test_s3 import upload_folder

pytestmark = pytest.mark.services
BUCKET = "latents"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("local") / "set", square_shards(20, 20, 20))


@pytest.fixture(scope="module")
def url(s3_server: str, folder: Path) -> str:
    return upload_folder(BUCKET, folder)


@pytest.fixture
def proxy(s3_server: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    port = urllib.parse.urlsplit(s3_server).port
    assert port is not None
    with proxy_to(port) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
        _fresh_client()
        yield running
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    _fresh_client()


def _fresh_client() -> None:
    storage._system.cache_clear()
    storage.fsspec.get_filesystem_class("s3").clear_instance_cache()


def batches(place: str, cache: Path, steps: int = 6, **data: Any) -> list[LatentBatch]:
    config = DataConfig(cache=str(cache), threads=1, prefetch=1, **data)
    dataset = open_dataset(place, config)
    engine = EngineConfig(global_batch=10, micro_batch=10)
    loader = LatentLoader(
        dataset, seed=0, engine=engine, objective=ObjectiveConfig(), data=config, rank=0, world_size=1
    )
    with closing(loader.steps(0)) as stream:
        return [batch for _, step in zip(range(steps), stream, strict=False) for batch in step]


def assert_same(found: list[LatentBatch], expected: list[LatentBatch]) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.indices, two.indices) and torch.equal(one.moments, two.moments)
        assert one.text is not None and two.text is not None and torch.equal(one.text, two.text)


@pytest.mark.parametrize("reads", ["shard", "range"])
def test_the_same_batches_as_from_a_disk(url: str, folder: Path, tmp_path: Path, reads: str) -> None:
    assert_same(batches(url, tmp_path, remote_reads=reads, verify="all"), batches(str(folder), tmp_path))
    cached = len(list((tmp_path / "files").iterdir())) if reads == "shard" else 0
    assert cached == (3 if reads == "shard" else 0)


@pytest.mark.covers("F40")
@pytest.mark.parametrize("reads", ["shard", "range"])
def test_a_store_that_is_slow_fails_and_cuts(
    proxy: Proxy, url: str, folder: Path, tmp_path: Path, reads: str
) -> None:
    config = DataConfig(cache=str(tmp_path), remote_reads=reads)
    dataset = open_dataset(url, config)
    # Inside the second sample of a whole shard, inside the payload of a ranged one, behind the answer's headers.
    stride = dataset.table.place(0).stride
    proxy.cut_after_bytes = 1200 + (stride if reads == "shard" else 0)
    proxy.pause_seconds, proxy.refuse, proxy.cuts = 0.0005, 2, 3
    _fresh_client()
    assert_same(batches(url, tmp_path, remote_reads=reads, verify="off"), batches(str(folder), tmp_path))
    assert proxy.done.count("refused") == 2 and proxy.done.count("cut") == 3


@pytest.mark.covers("F40")
def test_a_store_that_stays_away_is_no_damage(
    proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.latents.reader.PAUSES_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    _fresh_client()
    config = DataConfig(cache=str(tmp_path), remote_reads="range")
    dataset = open_dataset(url, config)
    proxy.refuse = 10**6
    _fresh_client()
    began = time.monotonic()
    failed = dataset.read_batch(np.array([0]), dataset.empty_arrays((8, 8), 1)).failed
    assert isinstance(failed[0], OSError) and "s3://latents/data/00/00000.tar: row 0" in str(failed[0])
    # The client pauses between its attempts, for random times; the point is that it comes to an end.
    assert time.monotonic() - began < 300


def test_what_the_store_lacks_is_listed_and_another_content_is_refused(
    s3_server: str, folder: Path, tmp_path: Path
) -> None:
    place = upload_folder("damaged", folder)
    system, _ = storage._open_system(place)
    content = bytearray((folder / "00/00001.tar").read_bytes())
    content[1000] ^= 1
    system.pipe_file("damaged/data/00/00001.tar", bytes(content))
    with pytest.raises(DataError, match=r"s3://damaged/data/00/00001.tar: sha256 .* the manifest's is"):
        batches(place, tmp_path / "one", verify="off")
    for name in ("00000", "00002"):
        system.rm(f"damaged/data/00/{name}.tar")
    with pytest.raises(
        DataError, match=r"2 damaged or missing shards: s3://damaged/data/00/00000.tar \(missing\), .*00002"
    ):
        batches(place, tmp_path / "two")
    with pytest.raises(DataError, match=r"s3://damaged/nowhere: the data set has no manifest"):
        batches("s3://damaged/nowhere", tmp_path)


def test_a_cache_of_one_shard_serves_all(url: str, folder: Path, tmp_path: Path) -> None:
    """Eviction under the reader's feet: descriptors stay valid, the folder stays within its limit."""
    shard_bytes = os.path.getsize(folder / "00/00000.tar")
    gib = 1.5 * shard_bytes / 2**30
    found = batches(url, tmp_path, cache_gib=gib)
    assert_same(found, batches(str(folder), tmp_path))
    assert sum(path.stat().st_size for path in (tmp_path / "files").iterdir()) <= 1.5 * shard_bytes
    with pytest.raises(ConfigError, match=r"data.cache_gib"):
        batches(url, tmp_path / "small", cache_gib=gib / 10)

"""Data sets of format 1 stay readable: a committed one is opened by today's code, and made again by it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import webdataset

from pipeline.latents.manifest import Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import LatentSample
from preprocessing.verify import verify_dataset
from tests.golden.build import FOLDER, build
from tests.preprocessing.builders import NumpyEncoder

EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def stored(folder: Path) -> dict[str, LatentSample]:
    found: dict[str, LatentSample] = {}
    for split, count in (("train", 5), ("validation", 3)):
        dataset = LatentDataset(folder, split)
        assert len(dataset) == count
        found |= {(s := dataset.read(index)).key: s for index in range(count)}
    return found


def check(folder: Path) -> None:
    found = stored(folder)
    assert set(found) == set(EXPECTED["samples"])
    for key, expected in EXPECTED["samples"].items():
        sample = found[key]
        assert sample.record["captions"] == expected["captions"]
        assert sample.record["source_key"] == expected["source_key"]
        digests = {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in sample.arrays.items()}
        assert digests == expected["arrays"]


def test_the_golden_data_set_is_read() -> None:
    check(FOLDER)
    manifest = Manifest.load(FOLDER)
    assert (manifest.format, manifest.digest) == (1, EXPECTED["digest"])
    assert (manifest.counts.read, manifest.counts.written, manifest.counts.rejected) == (
        9,
        8,
        {"no_caption": 1},
    )
    null, encoder = LatentDataset(FOLDER).null_text(), NumpyEncoder()
    assert np.array_equal(null["tokens"][0], encoder.tokens(""))
    assert verify_dataset(FOLDER, samples=None, decode_with=None).problems == []


def test_stock_webdataset_reads_it() -> None:
    shards = sorted(str(path) for path in FOLDER.glob("*/*.tar"))
    found = {s["__key__"]: s for s in webdataset.WebDataset(shards, shardshuffle=False).decode()}
    for key, expected in EXPECTED["samples"].items():
        assert hashlib.sha256(found[key]["text.npy"].tobytes()).hexdigest() == expected["arrays"]["text"]


def test_today_s_code_still_writes_it(tmp_path: Path) -> None:
    """The tars byte for byte; the parquet files also name the pyarrow release that wrote them."""
    build(tmp_path / "format1")
    check(tmp_path / "format1")
    for path in FOLDER.glob("*/*.tar"):
        assert (tmp_path / "format1" / path.relative_to(FOLDER)).read_bytes() == path.read_bytes()
    for name in ("segments.npy", "null/text.npy", "null/tokens.npy"):
        assert (tmp_path / "format1" / name).read_bytes() == (FOLDER / name).read_bytes()


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 100_000

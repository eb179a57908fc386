"""Both directions of the contract: what preprocessing wrote is what training reads, and stock readers agree."""

import io
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline.errors import DataError
from pipeline.latents import reader
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import LatentSample
from preprocessing.sources import list_shards
from tests.preprocessing.builders import NumpyEncoder, pairs, three_shards, write_input
from tests.preprocessing.conftest import Prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    prepared = Prepared(tmp_path_factory.mktemp("data"))
    three_shards(prepared.source)
    prepared.encode()
    prepared.finalize()
    return prepared


def everything(out: Path) -> dict[str, LatentSample]:
    samples: dict[str, LatentSample] = {}
    for split in ("train", "validation"):
        dataset = LatentDataset(out, split)
        samples |= {(s := dataset.read(index)).key: s for index in range(len(dataset))}
    return samples


def test_written_is_read(data: Prepared) -> None:
    encoder, found = NumpyEncoder(), everything(data.out)
    for shard in list_shards(data.source):
        for raw in shard.samples():
            sample = found.pop(raw.key)
            assert raw.text is not None
            caption = raw.text.decode()
            assert sample.record["captions"] == [caption] and sample.record["num_captions"] == 1
            tokens = encoder.tokens(caption)
            assert np.array_equal(sample.arrays["tokens"][0], tokens)
            assert np.array_equal(sample.arrays["text"][0], encoder.text_states(tokens).astype(np.float16))
            assert sample.arrays["latent"].shape == (6, 4, 4) and sample.arrays["latent"].dtype == np.float16
    assert found == {}


def test_stock_webdataset_reads_equal_arrays(data: Prepared) -> None:
    ours = everything(data.out)
    shards = sorted(str(path) for path in data.out.glob("*/*.tar"))
    count = 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        mine = ours[sample["__key__"]]
        assert {name for name in sample if not name.startswith("__")} == {
            "latent.npy",
            "text.npy",
            "tokens.npy",
            "json",
        }
        assert sample["json"] == mine.record
        for name, array in mine.arrays.items():
            theirs = sample[f"{name}.npy"]
            assert theirs.dtype == array.dtype and np.array_equal(theirs, array)
        count += 1
    assert count == len(ours) == 18


def test_members_are_plain_ustar_in_fixed_order(data: Prepared) -> None:
    """One 512-byte header a member, no clock in it: the stride is constant and a second run gives equal bytes."""
    for path in data.out.glob("*/*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert all(m.isreg() and m.mtime == 0 and m.pax_headers == {} for m in members)
        assert all(m.offset_data - m.offset == 512 for m in members)
        suffixes = [m.name.partition(".")[2] for m in members]
        assert suffixes == ["latent.npy", "text.npy", "tokens.npy", "json"] * (len(members) // 4)


def test_odd_names_keep_the_stride(tmp_path: Path) -> None:
    """Dots, slashes, spaces, non-ASCII and long names would merge samples or add pax headers."""
    data = Prepared(tmp_path)
    keys = ["img1.0", "img1.5", "a/b/c", "mit Leerzeichen", "猫", "x" * 200, "plain", "0", "1", "2"]
    (tmp_path / "in").mkdir()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in pairs(keys):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "in/00000.tar").write_bytes(stream.getvalue())
    data.encode()
    data.finalize()
    found = everything(data.out)
    assert {sample.record.get("source_key", key) for key, sample in found.items()} == set(keys)
    names = webdataset.WebDataset(str(data.out / "00/00000.tar"), shardshuffle=False).decode()
    assert {sample["__key__"] for sample in names} == set(found)


def test_several_captions_and_tokens_only(tmp_path: Path) -> None:
    data = Prepared(tmp_path)
    files = [(name, content) for name, content in pairs([str(k) for k in range(6)]) if name.endswith("png")]
    described = json.dumps({"caption": ["one", "two"]}).encode()
    write_input(
        data.source, {"00000": [f for name, c in files for f in ((name, c), (name[:-3] + "json", described))]}
    )
    encode = data.config.encode.model_copy(update={"max_captions": 3, "text": "tokens", "latent": "mean"})
    data.config = data.config.model_copy(update={"encode": encode})
    encoder = NumpyEncoder(max_captions=3, text="tokens", latent="mean")
    data.encode(encoder)
    data.finalize()
    dataset = LatentDataset(data.out)
    sample = dataset.read(0)
    assert set(sample.arrays) == {"latent", "tokens"} and sample.arrays["latent"].shape == (3, 4, 4)
    assert sample.record["captions"] == ["one", "two"] and sample.record["num_captions"] == 2
    expected = [encoder.tokens(text) for text in ("one", "two", "one")]
    assert np.array_equal(sample.arrays["tokens"], expected)
    assert set(dataset.null_text()) == {"tokens"} and dataset.null_text()["tokens"].shape == (1, 6)


def test_threads_may_read_while_others_push_shards_out(
    data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one open shard kept, every read of another thread closes ours: it must not close it under us."""
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    dataset = LatentDataset(data.out)
    expected = [dataset.read(index).arrays["latent"].copy() for index in range(len(dataset))]
    slow = os.preadv

    def preadv(descriptor: int, buffers: list[bytearray], offset: int) -> int:
        for _ in range(50):
            os.fstat(descriptor)
        return slow(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    wrong: list[object] = []

    def read(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(dataset)).tolist() * 20
        for index in order:
            try:
                if not np.array_equal(dataset.read(index).arrays["latent"], expected[index]):
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_descriptors_are_bounded_and_closed(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset = LatentDataset(data.out)
    for index in range(len(dataset)):
        dataset.read(index)
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # the table's map may count as one
    dataset.close()
    assert dataset.read(0).key


def test_missing_and_short_shards_are_all_named(data: Prepared, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data.out, copy)
    (copy / "00/00000.tar").unlink()
    (copy / "00/00002.tar").write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        LatentDataset(copy)
    said = str(caught.value)
    assert (
        "2 damaged or missing shards" in said
        and "00000.tar (missing)" in said
        and "00002.tar (5 bytes instead" in said
    )


@pytest.mark.parametrize("name", ["segments.npy", "shards.parquet", "null/text.npy"])
def test_tables_that_are_not_the_manifests(data: Prepared, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data.out, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=f"{name.rpartition('/')[2]}: .*manifest"):
        LatentDataset(copy).null_text()
    (copy / name).unlink()
    with pytest.raises(DataError, match=name.rpartition("/")[2]):
        LatentDataset(copy).null_text()

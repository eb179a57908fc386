"""The bytes of a sample: numpy reads our headers, and arithmetic finds every member."""

import io
import json
import tarfile

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.latents.record import (
    in_tar_bytes,
    json_length,
    member_bytes,
    member_offsets,
    npy_bytes,
    padded_json,
    parse_sample,
    stride_bytes,
)
from pipeline.latents.spec import LatentSpec

SPEC = LatentSpec("moments", 4, 8, 1.0, 0.0, "embeddings", 5, 7, 3, 2)
MEMBERS = SPEC.members((16, 24))
RECORD = {"key": "k", "captions": ["a café", "猫"]}
JSON_BYTES = 512


def block() -> bytes:
    """Return one sample as Python's tarfile lays it out, without the end of the archive."""
    stream = io.BytesIO()
    draw = np.random.default_rng(0)
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        files = {f"k.{m.name}.npy": npy_bytes((draw.random(m.shape) * 9).astype(m.dtype)) for m in MEMBERS}
        for name, content in {**files, "k.json": padded_json(RECORD, JSON_BYTES)}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()[: stride_bytes(MEMBERS, JSON_BYTES)]


@pytest.mark.parametrize("dtype", ["<f2", "<u2"])
@pytest.mark.parametrize("shape", [(8, 2, 3), (1, 77), (3,)])
def test_numpy_reads_our_npy(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    content = npy_bytes(array)
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    assert loaded.dtype == array.dtype and np.array_equal(loaded, array)
    assert npy_bytes(np.asfortranarray(array)) == content


def test_sizes_against_tarfile() -> None:
    stream = io.BytesIO(block() + bytes(1024))
    with tarfile.open(fileobj=stream) as tar:
        entries = {entry.name: entry for entry in tar.getmembers()}
    offsets = member_offsets(MEMBERS, JSON_BYTES)
    assert list(offsets) == ["latent", "text", "pooled", "tokens", "json"]
    for name, offset in offsets.items():
        entry = entries["k.json" if name == "json" else f"k.{name}.npy"]
        assert entry.offset_data == offset
    assert [entries[f"k.{m.name}.npy"].size for m in MEMBERS] == [member_bytes(m) for m in MEMBERS]
    assert (
        in_tar_bytes(1) == in_tar_bytes(512) == 1024 and in_tar_bytes(513) == 1536 and in_tar_bytes(0) == 512
    )


def test_json_is_padded_and_stays_json() -> None:
    text = padded_json(RECORD, JSON_BYTES)
    assert len(text) == JSON_BYTES and json.loads(text) == RECORD
    assert json_length([]) == 256 and json_length([RECORD]) == 256
    long = {"key": "x" * 256}
    assert json_length([RECORD, long]) == 512 and json.loads(padded_json(long, 512)) == long
    with pytest.raises(ValueError, match="not JSON compliant"):
        padded_json({"x": float("nan")}, 256)


def test_a_sample_is_parsed_without_copies() -> None:
    content = block()
    found = parse_sample(content, MEMBERS, JSON_BYTES, "here")
    assert found.key == "k" and found.record == RECORD
    draw = np.random.default_rng(0)
    for member in MEMBERS:
        expected = (draw.random(member.shape) * 9).astype(member.dtype)
        assert np.array_equal(found.arrays[member.name], expected)
        assert not found.arrays[member.name].flags.owndata


@pytest.mark.parametrize("length", [0, 511, -1])
def test_short_blocks_are_refused(length: int) -> None:
    with pytest.raises(DataError, match=r"here: \d+ bytes, a sample has"):
        parse_sample(block()[:length], MEMBERS, JSON_BYTES, "here")


def test_damaged_members_are_refused() -> None:
    for name, offset in member_offsets(MEMBERS, JSON_BYTES).items():
        content = bytearray(block())
        content[offset + 1] ^= 0xFF
        with pytest.raises(DataError, match=f"here: .*{name}"):
            parse_sample(bytes(content), MEMBERS, JSON_BYTES, "here")

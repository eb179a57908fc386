"""Damaged shards: none of a bad one is used, the others are, and the job ends with an error that names all."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import DataError
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.preprocessing.builders import NumpyEncoder, encode_config, pairs, write_input

Damage = Callable[[bytes], bytes]


def member(content: bytes, name: bytes) -> int:
    return content.index(name)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def size_field(content: bytes, field: bytes) -> bytes:
    start = member(content, b"k3.png")
    header = bytearray(content[start : start + 512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


CASES: dict[str, tuple[Damage, str]] = {
    "empty file": (lambda c: b"", "the file is empty"),
    "web page": (lambda c: b"<html>503</html>" * 999, "not a tar"),
    "gzip": (gzip.compress, "gzip data"),
    "zstd": (lambda c: b"\x28\xb5\x2f\xfd" + c, "zstd data"),
    "cut at a sample": (lambda c: c[: member(c, b"k3.png")], "without the two zero blocks"),
    "cut between picture and caption": (lambda c: c[: member(c, b"k3.txt")], "without the two zero blocks"),
    "cut in a header": (lambda c: c[: member(c, b"k3.png") + 77], "77 bytes into a 512-byte header"),
    "cut in content": (lambda c: c[: member(c, b"k3.png") + 600], "the file is cut inside them"),
    "no end blocks": (
        lambda c: c.rstrip(b"\0") + bytes(-len(c.rstrip(b"\0")) % 512),
        "without the two zero blocks",
    ),
    "one end block": (
        lambda c: c.rstrip(b"\0") + bytes(-len(c.rstrip(b"\0")) % 512 + 512),
        "into the end mark",
    ),
    "bit flip in a header": (lambda c: flip(c, member(c, b"k3.png")), "its checksum is wrong"),
    "bit flip in a size": (lambda c: flip(c, member(c, b"k3.png") + 130), "its checksum is wrong"),
    "zeroed header": (
        lambda c: c[: (k := member(c, b"k3.png"))] + bytes(512) + c[k + 512 :],
        "data follows at byte",
    ),
    "zeroed page": (lambda c: c[:4096] + bytes(4096) + c[8192:], "data follows at byte"),
    "zeroed tail": (lambda c: c[: (k := member(c, b"k3.png"))] + bytes(len(c) - k), "7 lost|a zeroed tail"),
    "8 GiB": (lambda c: size_field(c, b"77777777777\0"), "the file is cut inside them"),
    "9 GiB, binary": (
        lambda c: size_field(c, b"\x80" + (9 << 30).to_bytes(11, "big")),
        "the file is cut inside",
    ),
    "negative": (lambda c: size_field(c, b"\xff" * 12), "its size field is"),
    "last sample gone": (lambda c: c[: (k := member(c, b"k9.png"))] + bytes(10240 - k % 10240), "1 lost"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_shard_is_named_and_the_others_are_done(tmp_path: Path, name: str) -> None:
    damage, said = CASES[name]
    source = write_input(
        tmp_path / "in",
        {
            stem: pairs([f"{mark}{k}" for k in range(10)])
            for stem, mark in (("00000", "j"), ("00001", "k"), ("00002", "l"))
        },
    )
    path = source / "00001.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=said) as caught:
        encode_shards(Work(list_shards(source), tmp_path / "out"), NumpyEncoder(), encode_config())
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value) and "1 of 3 shards" in str(caught.value)
    assert "lost" in str(caught.value) and "10 samples expected" in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "out/00").iterdir()) == [
        f"{stem}{suffix}" for stem in ("00000", "00002") for suffix in (".json", ".parquet", ".tar")
    ]

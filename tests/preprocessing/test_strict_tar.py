"""Damage of every kind at every place is reported; what other tar writers make is read."""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from preprocessing.strict_tar import BLOCK, DamagedTarError, Member, walk_tar
from tests.preprocessing.builders import Files, tar_bytes
from tests.requirements import require_tool

FILES: Files = [
    ("0001.json", b'{"a": 1}'),
    ("0001.png", bytes(range(256)) * 5),
    ("0001.txt", b"a caption"),
    ("0002.png", b"\x89PNG" + b"x" * 508),
    ("0002.txt", b""),
    ("0003.png", b"y" * 700),
]


def walk(tmp_path: Path, content: bytes) -> list[Member]:
    path = tmp_path / "00000.tar"
    path.write_bytes(content)
    return walk_tar(path)


def damage(tmp_path: Path, content: bytes) -> DamagedTarError | None:
    try:
        walk(tmp_path, content)
    except DamagedTarError as error:
        return error
    return None


def headers(content: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar.getmembers()]


def end_of_members(content: bytes) -> int:
    last = headers(content)[-1]
    size = len(FILES[-1][1])
    return last + BLOCK + -(-size // BLOCK) * BLOCK


def contents(tmp_path: Path, members: list[Member]) -> Files:
    stored = (tmp_path / "00000.tar").read_bytes()
    return [(member.name, stored[member.offset : member.offset + member.size]) for member in members]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(tmp_path: Path, format: int) -> None:
    assert contents(tmp_path, walk(tmp_path, tar_bytes(FILES, format))) == FILES


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names(tmp_path: Path, format: int) -> None:
    files = [("f" * 300 + ".png", b"1"), ("grün/猫.txt", b"2"), ("plain.txt", b"3")]
    assert contents(tmp_path, walk(tmp_path, tar_bytes(files, format))) == files


def test_ustar_prefix_makes_one_name(tmp_path: Path) -> None:
    files = [("folder/" * 18 + "0001.png", b"1")]
    assert contents(tmp_path, walk(tmp_path, tar_bytes(files))) == files


def test_pax_header_with_fractional_mtime_as_img2dataset_writes_it(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in FILES:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1700000000.25
            tar.addfile(entry, io.BytesIO(content))
    assert stream.getvalue().count(b"mtime=1700000000.25") == len(FILES)
    assert contents(tmp_path, walk(tmp_path, stream.getvalue())) == FILES


def test_every_truncation_is_reported(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    complete = end_of_members(whole) + 2 * BLOCK
    path = tmp_path / "00000.tar"
    path.write_bytes(whole)
    members = walk_tar(path)
    with path.open("r+b") as stream:
        for length in range(len(whole) - 1, -1, -3):
            stream.truncate(length)
            if length >= complete:
                assert walk_tar(path) == members
                continue
            with pytest.raises(DamagedTarError) as caught:
                walk_tar(path)
            assert caught.value.members == [
                m for m in members if m.offset + -(-m.size // BLOCK) * BLOCK <= length
            ]


def test_cuts_name_their_place(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    third = headers(whole)[2]
    cut_between = damage(tmp_path, whole[:third])
    assert cut_between is not None
    assert cut_between.offset == third and "without the two zero blocks" in str(cut_between)
    cut_in_header = damage(tmp_path, whole[: third + 100])
    assert cut_in_header is not None and "100 bytes into a 512-byte header" in str(cut_in_header)
    in_content = damage(tmp_path, whole[: headers(whole)[1] + BLOCK + 10])
    assert in_content is not None and "'0001.png' has 1280 bytes" in str(in_content)


def test_every_flipped_header_bit_is_reported_or_harmless(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    members = walk(tmp_path, whole)
    path = tmp_path / "00000.tar"
    with path.open("r+b", buffering=0) as stream:
        for start in headers(whole)[:3]:
            for bit in range(start % 11, BLOCK * 8, 11):
                place = start + bit // 8
                os.pwrite(stream.fileno(), bytes([whole[place] ^ 1 << bit % 8]), place)
                try:
                    found = walk_tar(path)
                except DamagedTarError as error:
                    assert error.offset == start
                else:
                    assert (
                        start + 148 <= place < start + 156 and found == members
                    )  # blanks around the checksum
                os.pwrite(stream.fileno(), whole[place : place + 1], place)
    assert walk_tar(path) == members


def test_every_zeroed_block_is_reported_unless_it_is_content(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    members, starts = walk(tmp_path, whole), headers(whole)
    for start in range(0, end_of_members(whole), BLOCK):
        zeroed = whole[:start] + bytes(BLOCK) + whole[start + BLOCK :]
        error = damage(tmp_path, zeroed)
        if start in starts:
            assert error is not None and error.offset == start
        else:
            assert error is None and walk(tmp_path, zeroed) == members


def test_zeroed_pages_are_reported(tmp_path: Path) -> None:
    """A page inside the archive, and a tail that is longer than the end of a tar can be."""
    files = [(f"{k:04d}.png", bytes([k + 1]) * 3000) for k in range(12)]
    whole = tar_bytes(files)
    for start in range(0, len(whole) - 16384, 4096):
        zeroed = whole[:start] + bytes(4096) + whole[start + 4096 :]
        error = damage(tmp_path, zeroed)
        assert error is not None and "data follows at byte" in str(error)
    tail = damage(tmp_path, whole[:20992] + bytes(len(whole) - 20992))
    assert tail is not None and "a zeroed tail?" in str(tail)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>" * 100, "not a tar"),
        (gzip.compress(tar_bytes(FILES)), "gzip data, not a tar"),
        (b"\x28\xb5\x2f\xfd" + b"z" * 2000, "zstd data, not a tar"),
        (b"short", "cut 5 bytes into"),
    ],
)
def test_things_that_are_no_tar(tmp_path: Path, content: bytes, said: str) -> None:
    error = damage(tmp_path, content)
    assert error is not None and said in str(error) and "byte 0" in str(error)


def with_size_field(field: bytes) -> bytes:
    header = bytearray(tar_bytes([("0001.png", b"x")])[:BLOCK])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x" + bytes(3 * BLOCK - 1)


@pytest.mark.parametrize(
    "field",
    [
        b"\x80" + (9 << 30).to_bytes(11, "big"),  # 9 GiB in GNU's binary form
        b"\xff" * 11 + b"\xf0",  # negative
        b"00000009999\0",  # not octal
        b"77777777777\0",  # the largest octal, 8 GiB
    ],
)
def test_impossible_sizes(tmp_path: Path, field: bytes) -> None:
    assert damage(tmp_path, with_size_field(field)) is not None
    assert damage(tmp_path, with_size_field(b"00000000001\0")) is None


def test_links_devices_and_folders(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.FIFOTYPE),
            ("e.png", tarfile.CHRTYPE),
            ("f.png", tarfile.BLKTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        last = tarfile.TarInfo("d.png")
        last.size = 3
        tar.addfile(last, io.BytesIO(b"abc"))
    members = walk(tmp_path, stream.getvalue())
    assert [(m.name, m.is_file) for m in members] == [
        ("a.png", False),
        ("b.png", False),
        ("c.png", False),
        ("e.png", False),
        ("f.png", False),
        ("d.png", True),
    ]


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_files_of_the_real_tar_are_members_of_another_kind(tmp_path: Path, format: str) -> None:
    """Many holes, so that the map goes on in blocks of its own; what stands behind is read as ever."""
    sparse = tmp_path / "a.png"
    with sparse.open("wb") as stream:
        for hole in range(1, 60):
            stream.seek(hole << 20)
            stream.write(b"x" * 4096)
    (tmp_path / "b.png").write_bytes(b"behind it")
    command = [
        str(require_tool("tar")),
        f"--format={format}",
        "--sparse",
        "-cf",
        "00000.tar",
        "a.png",
        "b.png",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    path = tmp_path / "00000.tar"
    assert path.stat().st_size < 1 << 20, "tar has seen the holes"
    found = walk_tar(path)
    with tarfile.open(path) as oracle:
        assert [member.name for member in oracle.getmembers()] == ["a.png", "b.png"]
    assert [member.is_file for member in found] == [False, True] and found[1].name == "b.png"
    assert path.read_bytes()[found[1].offset : found[1].offset + found[1].size] == b"behind it"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DamagedTarError):
        walk_tar(path)


@pytest.mark.parametrize(
    "record", [b"12 path=a.pn", b"99 path=a.png\n", b"x path=a.png\n", b"14 path.a.png\n"]
)
def test_damaged_pax_records(tmp_path: Path, record: bytes) -> None:
    whole = bytearray(tar_bytes([("ä.png", b"x")], tarfile.PAX_FORMAT))
    whole[BLOCK : BLOCK + len(record)] = record
    error = damage(tmp_path, bytes(whole))
    assert error is not None and "pax header" in str(error)

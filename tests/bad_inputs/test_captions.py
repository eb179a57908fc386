"""Captions and sample names from the wild: used, or rejected by name, in one shard through the real worker."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.latents.rows import ROW_SCHEMA, read_table
from pipeline.latents.shard import ShardRecord
from preprocessing.keys import output_key
from preprocessing.sources import list_shards
from tests.preprocessing.builders import (
    Files,
    NumpyEncoder,
    encode_one,
    image_file,
    noise,
    pair,
    tar_bytes,
    write_input,
)

PNG = image_file(noise(0))
ASTRONAUT = "👩‍🚀 مرحبا a\u0301 a\u200bb 猫"


def described(value: object) -> bytes:
    return json.dumps({"caption": value}).encode()


# key, members by suffix, expected reason (None = used), expected captions of a used one
CASES: list[tuple[str, dict[str, bytes], str | None, list[str] | None]] = [
    ("no-file", {}, "no_caption", None),
    ("empty", {"txt": b""}, "empty_caption", None),
    ("blank", {"txt": b" \t\r\n"}, "empty_caption", None),
    ("book", {"txt": b"word " * 20_000}, None, None),
    ("over-1-mb", {"txt": b"x" * (2 << 20)}, "caption_too_large", None),
    ("latin-1", {"txt": b"caf\xe9"}, "encoding", None),
    ("utf-16", {"txt": "cat".encode("utf-16")}, "encoding", None),
    ("nul", {"txt": b"a\0cat"}, "encoding", None),
    ("utf-8-bom", {"txt": b"\xef\xbb\xbfa cat"}, None, ["a cat"]),
    ("scripts", {"txt": ASTRONAUT.encode()}, None, [ASTRONAUT.replace("a\u0301", "á")]),
    ("html", {"txt": b"cats &amp; <b>dogs</b>"}, None, ["cats & <b>dogs</b>"]),
    ("json-number", {"json": described(5)}, "caption_type", None),
    ("json-nested", {"json": described({"en": "cat"})}, "caption_type", None),
    ("json-null", {"json": described(None)}, "no_caption", None),
    ("json-huge-int", {"json": b'{"caption": "x", "n": ' + b"9" * 5000 + b"}"}, "bad_json", None),
    ("json-deep", {"json": b'{"a":' * 50_000}, "bad_json", None),
    ("json-cut", {"json": b'{"caption": "ca'}, "bad_json", None),
    ("json-list", {"json": described(["one", "two", "three"])}, None, ["one", "two"]),
    ("json-surrogate", {"json": b'{"caption": "\\ud83d"}'}, "encoding", None),
    ("broken-json-beside-text", {"txt": b"a cat", "json": b"{"}, None, ["a cat"]),
    ("checksum-beside", {"txt": b"a cat", "md5": b"0" * 32, "html": b"x"}, None, ["a cat"]),
    ("two-texts", {"txt": b"a", "TXT": b"b"}, "duplicate_field", None),
    ("code-pkl", {"txt": b"x", "pkl": b"cos\nsystem\n(S'true'\ntR."}, "forbidden_extension", None),
    ("code-pyd", {"txt": b"x", "pyd": b"cos\n"}, "forbidden_extension", None),
    ("code-pth", {"txt": b"x", "pth": b"PK"}, "forbidden_extension", None),
    ("dots.in.name", {"txt": b"x"}, None, ["x"]),
    ("dots.too", {"txt": b"y"}, None, ["y"]),
    ("blanks in name", {"txt": b"x"}, None, ["x"]),
    ("猫", {"txt": b"x"}, None, ["x"]),
    ("n" * 300, {"txt": b"x"}, None, ["x"]),
    ("../../climbs", {"txt": b"x"}, "bad_key", None),
    ("/absolute", {"txt": b"x"}, "bad_key", None),
    ("C:\\windows", {"txt": b"x"}, "bad_key", None),
    ("line\nbreak", {"txt": b"x"}, "bad_key", None),
]


@pytest.fixture(scope="module")
def shard_record(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardRecord, dict[str, dict[str, Any]]]:
    root = tmp_path_factory.mktemp("captions")
    files: Files = []
    for key, members, _, _ in CASES:
        files += [(f"{key}.png", PNG), *((f"{key}.{suffix}", content) for suffix, content in members.items())]
    (root / "in").mkdir()
    (root / "in/00000.tar").write_bytes(tar_bytes(files, format=2))  # pax, for the long names
    shard = list_shards(root / "in")[0]
    record = encode_one(shard, root / "out", NumpyEncoder(max_captions=2))
    rows = read_table(root / "out/00/00000.parquet", ROW_SCHEMA).to_pylist()
    return record, {row["key"]: row for row in rows}


@pytest.mark.parametrize(
    ("key", "reason", "captions"), [(key, reason, captions) for key, _, reason, captions in CASES]
)
def test_caption(shard_record: Any, key: str, reason: str | None, captions: list[str] | None) -> None:
    rows = shard_record[1]
    if reason is not None:
        assert (rows[key]["status"], rows[key]["reason"]) == ("rejected", reason)
        return
    row = rows[output_key(key)]
    assert row["status"] == "written"
    if captions is not None:
        assert row["captions"] == captions


def test_all_are_accounted_for_and_remarked(shard_record: Any) -> None:
    record = shard_record[0]
    assert record.counts.read == len(CASES) and record.counts.unaccounted == 0 and record.counts.failed == {}
    assert record.extra["remarks"] == {
        "cut_caption": 1,
        "ignored_members": 2,
        "renamed_key": 5,
        "surplus_captions": 1,
        "truncated_caption": sum(
            any(len(text) > 4 for text in row["captions"])
            for row in shard_record[1].values()
            if row["status"] == "written"
        ),
    }


def test_endings_in_capitals_and_both_spellings_of_jpeg(tmp_path: Path) -> None:
    picture = image_file(noise(1), "JPEG")
    files: Files = [(f"{ending}.{ending}", picture) for ending in ("jpg", "jpeg", "JPG", "JPEG", "Jpeg")]
    texts: Files = [(f"{name.partition('.')[0]}.TXT", b"x") for name, _ in files]
    shard = list_shards(
        write_input(tmp_path / "in", {"00000": [f for two in zip(files, texts, strict=True) for f in two]})
    )[0]
    record = encode_one(shard, tmp_path / "out")
    assert (record.counts.read, record.counts.written, record.counts.rejected) == (5, 5, {})


def test_orphans_and_duplicates(tmp_path: Path) -> None:
    files: Files = [
        ("late.txt", b"first the caption"),
        *pair("a", 1),
        ("late.png", PNG),
        *pair("a", 2),
        ("two.png", PNG),
        ("two.jpg", PNG),
        ("two.txt", b"x"),
    ]
    shard = list_shards(write_input(tmp_path / "in", {"00000": files}))[0]
    record = encode_one(shard, tmp_path / "out")
    assert record.counts.rejected == {"duplicate_field": 1, "duplicate_key": 1, "orphan": 2}
    (row,) = [
        r
        for r in read_table(tmp_path / "out/00/00000.parquet", ROW_SCHEMA).to_pylist()
        if r["key"] == "a" and r["status"] == "written"
    ]
    assert row["captions"] == ["picture number 1"]

"""Folders with metadata tables, and parquet shards: every row and every file is accounted for."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from preprocessing.sources import InputShard, SourceOptions, list_shards
from tests.preprocessing.builders import encode_one, image_file, noise

PNG = image_file(noise(0))


def write_metadata(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    elif name.endswith(".csv"):
        header = list(rows[0])
        lines = [",".join(header), *(",".join(f'"{row[column]}"' for column in header) for row in rows)]
        (folder / name).write_text("\r\n".join(lines) + "\r\n", encoding="utf-8-sig")
    else:
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_folder_with_a_table(tmp_path: Path, name: str) -> None:
    rows = [
        {"file_name": "a.png", "text": "from the table", "score": 7},
        {"file_name": "sub/b.png", "text": "also", "score": 3},
        {"file_name": "gone.png", "text": "no picture", "score": 9},
        {"file_name": "c.png", "text": "not this", "score": 8},
    ]
    write_metadata(tmp_path / "in", name, rows)
    for picture in ("a", "sub/b", "c", "lonely"):
        path = tmp_path / "in" / f"{picture}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG)
    (tmp_path / "in/c.txt").write_text("beside the picture")
    (shard,) = list_shards(tmp_path / "in")
    raws = {raw.source_key: raw for raw in shard.samples()}
    assert raws["gone"].problem == "missing_file" and raws["a"].columns["text"] == "from the table"
    filters = [{"column": "score", "reason": "low_score", "min": 5, "absent": "keep"}]
    record = encode_one(shard, tmp_path / "out", filters=filters)
    assert record.counts.read == 5 and record.counts.written == 2
    assert record.counts.rejected == {"low_score": 1, "missing_file": 1, "no_caption": 1}
    before = shard.digest(), shard.version()
    write_metadata(tmp_path / "in", name, [{**rows[0], "text": "changed!"}, *rows[1:]])
    (again,) = list_shards(tmp_path / "in")
    assert again.digest() != before[0] and again.version() != before[1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}\n{', "line 2 is not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1 holds list"),
        ("metadata.jsonl", '{"name": "a.png"}\n', "row 1 has no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name": "a.png"}\n', "row 2 names 'a.png' again"),
        ("metadata.csv", "file_name,text\na.png\n", "line 2 has not the 2 fields"),
        ("metadata.csv", "file_name,text\na.png,b,c\n", "line 2 has not the 2 fields"),
        ("metadata.csv", 'file_name,text\na.png,"b', "unexpected end of data"),
        ("metadata.parquet", "PAR1 nothing", "damaged parquet"),
    ],
)
def test_tables_that_cannot_be_trusted(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        list_shards(tmp_path)


def test_two_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(DataError, match=r"metadata.csv and metadata.jsonl"):
        list_shards(tmp_path)


def parquet_shard(folder: Path, rows: list[dict[str, Any]], **options: Any) -> InputShard:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-0.parquet", **options)
    return list_shards(folder)[0]


def test_hugging_face_image_columns(tmp_path: Path) -> None:
    """`image` is a struct of bytes and path; without a key column the row's number is the key."""
    rows = [{"image": {"bytes": PNG, "path": f"{k}.png"}, "text": f"row {k}"} for k in range(3)]
    shard = parquet_shard(tmp_path / "in", [*rows, {"image": None, "text": "no picture"}])
    raws = list(shard.samples())
    assert [raw.key for raw in raws] == [f"{k:09d}" for k in range(4)]
    assert [raw.problem for raw in raws] == [None, None, None, "no_image"]
    assert raws[1].image == PNG and raws[1].columns == {"text": "row 1"}
    assert [raw.key for raw in shard.samples(only={"000000002"})] == ["000000002"]
    record = encode_one(shard, tmp_path / "out")
    assert (record.stem, record.counts.written, record.counts.rejected) == ("train-0", 3, {"no_image": 1})


def test_keys_of_parquet_rows(tmp_path: Path) -> None:
    keys = ["a", "b.c", "a", "../up", ""]
    shard = parquet_shard(tmp_path, [{"key": key, "png": PNG, "caption": "x"} for key in keys])
    assert [raw.problem for raw in shard.samples()] == [None, None, "duplicate_key", "bad_key", "bad_key"]


def test_the_image_column_is_found_or_named(tmp_path: Path) -> None:
    shard = parquet_shard(tmp_path / "a", [{"picture": PNG, "caption": "x"}])
    with pytest.raises(DataError, match=r"no column of image bytes .*'picture'.*encode.image_column"):
        list(shard.samples())
    (named,) = list_shards(tmp_path / "a", SourceOptions(image_column="picture"))
    assert [raw.image for raw in named.samples()] == [PNG]
    (wrong,) = list_shards(tmp_path / "a", SourceOptions(image_column="caption"))
    assert [raw.problem for raw in wrong.samples()] == ["not_bytes"]


def test_no_damage_of_a_parquet_shard_goes_unseen(tmp_path: Path) -> None:
    """Cut anywhere, it is refused; with a page zeroed it is refused or a picture changes, which decoding judges."""
    rows = [{"key": f"{k:03d}", "png": image_file(noise(k)), "caption": f"row {k}"} for k in range(200)]
    shard = parquet_shard(tmp_path, rows, row_group_size=50, compression="none", use_dictionary=False)
    path = tmp_path / "train-0.parquet"
    whole = path.read_bytes()
    assert len(list(shard.samples())) == 200
    for cut in range(0, len(whole), len(whole) // 12):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"train-0\.parquet"):
            list(shard.samples())
    pictures = {row["key"]: row["png"] for row in rows}
    refused = 0
    for start in range(0, len(whole) - 4096, len(whole) // 12):
        path.write_bytes(whole[:start] + bytes(4096) + whole[start + 4096 :])
        try:
            found = list(shard.samples())
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        assert len(found) == 200, "no row is lost without a word"
        assert [raw.key for raw in found if raw.image != pictures.get(raw.key)], "a picture changed"
    assert refused

"""The parquet tables: round trip, equal bytes, and columns that are not ours."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.latents.rows import ROW_SCHEMA, SHARD_SCHEMA, read_table, write_table

ROWS: list[dict[str, Any]] = [
    {
        "key": "a",
        "status": "written",
        "captions": ["x", "猫"],
        "crop": [0, 1, 2, 3],
        "crc32": 2**32 - 1,
        "offset": 2**40,
    },
    {"key": "b", "status": "rejected", "reason": "aspect"},
]


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_table(tmp_path / name, ROWS, ROW_SCHEMA)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    empty: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
    assert read_table(tmp_path / "one", ROW_SCHEMA).to_pylist() == [empty | row for row in ROWS]


def test_no_rows(tmp_path: Path) -> None:
    write_table(tmp_path / "none", [], SHARD_SCHEMA)
    assert read_table(tmp_path / "none", SHARD_SCHEMA).to_pylist() == []


def test_other_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_table(path, ROW_SCHEMA)
    path.write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_table(path, ROW_SCHEMA)
    pq.write_table(pa.table({"name": ["a"]}), path)
    with pytest.raises(DataError, match=r"has the columns \['name'\]"):
        read_table(path, SHARD_SCHEMA)

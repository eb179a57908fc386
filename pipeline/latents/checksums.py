"""The checksum and key of every written sample, from the shards' own tables, a few shards at a time."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.latents.rows import ROW_SCHEMA, read_table

KEPT_TABLES = 128


class Checksums:
    """crc32 and key by (shard, row); written samples stand first in a shard's table, in the order of the tar."""

    def __init__(self, table_path: Callable[[str], Path]) -> None:
        """Read tables from where `table_path(stem)` says, when they are first asked for."""
        self._table_path = table_path
        self._tables: OrderedDict[str, tuple[list[Any], list[Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def crc32(self, stem: str, row: int) -> int:
        """Return the checksum of the sample's tar bytes when it was written.

        Raises:
            DataError: when the shard's table is missing, damaged, or has no such row.
        """
        return int(self._column(stem, row, 0))

    def key(self, stem: str, row: int) -> str:
        """Return the sample's key. Raises DataError as `crc32` does."""
        return str(self._column(stem, row, 1))

    def _column(self, stem: str, row: int, number: int) -> Any:
        with self._lock:
            if stem not in self._tables:
                table = read_table(self._table_path(stem), ROW_SCHEMA)
                columns = (table.column("crc32").to_pylist(), table.column("key").to_pylist())
                self._tables[stem] = columns
                if len(self._tables) > KEPT_TABLES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(stem)
            values = self._tables[stem][number]
        if row >= len(values) or values[row] is None:
            raise DataError(f"{self._table_path(stem)}: has no written sample {row}; run `ldm verify`")
        return values[row]

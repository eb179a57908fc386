"""The bytes of one sample inside a shard's tar.

Members stand in fixed order with equal sizes (json is padded with spaces), so inside a segment a sample's
offset is arithmetic: first_offset + row * stride. No index of a tar is ever parsed.
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.latents.spec import Member

TAR_BLOCK = 512
JSON_STEP = 256
MAX_KEY_LENGTH = 80


@dataclass(frozen=True)
class LatentSample:
    """One encoded pair: `arrays` by member name, `record` the json beside them (captions, sizes, crop)."""

    key: str
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


@lru_cache(maxsize=64)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the npy version 1.0 header of a C-ordered array: the same bytes for the same dtype and shape."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """Return the array as an npy file: what stock readers decode, with nothing that varies between runs."""
    plain = np.ascontiguousarray(array)
    return npy_header(plain.dtype.str, plain.shape) + plain.tobytes()


def json_length(records: Iterable[dict[str, Any]]) -> int:
    """Return the bytes that every json of a segment is padded to: the longest, rounded up to 256."""
    return padded_length(max((len(record_json(record)) for record in records), default=0))


def padded_length(longest_bytes: int) -> int:
    """Return what the json files of a segment whose longest has so many bytes are padded to."""
    return max(JSON_STEP, -(-longest_bytes // JSON_STEP) * JSON_STEP)


def padded_json(record: dict[str, Any], length_bytes: int) -> bytes:
    """Return `record` as UTF-8 JSON padded with spaces to `length_bytes`."""
    text = record_json(record)
    assert len(text) <= length_bytes, (len(text), length_bytes)
    return text.ljust(length_bytes)


def record_json(record: dict[str, Any]) -> bytes:
    """Return `record` as UTF-8 JSON in one line with sorted keys."""
    return json.dumps(
        record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def member_bytes(member: Member) -> int:
    """Return the size of the member's npy file in bytes."""
    return len(npy_header(member.dtype, member.shape)) + member.payload_bytes


def in_tar_bytes(size_bytes: int) -> int:
    """Return what a file of `size_bytes` takes inside a tar: header block and content padded to blocks."""
    return TAR_BLOCK + -(-size_bytes // TAR_BLOCK) * TAR_BLOCK


def stride_bytes(members: Sequence[Member], json_bytes: int) -> int:
    """Return the bytes from one sample to the next inside a segment."""
    return sum(in_tar_bytes(member_bytes(member)) for member in members) + in_tar_bytes(json_bytes)


def member_offsets(members: Sequence[Member], json_bytes: int) -> dict[str, int]:
    """Return where each member's npy file (and "json") begins, in bytes from the sample's first byte."""
    offsets, position = {}, 0
    for name, size in [*((member.name, member_bytes(member)) for member in members), ("json", json_bytes)]:
        offsets[name] = position + TAR_BLOCK
        position += in_tar_bytes(size)
    return offsets


def parse_sample(
    block: bytes | memoryview, members: Sequence[Member], json_bytes: int, where: str
) -> LatentSample:
    """Return the sample whose tar bytes are `block`; the arrays are views into it.

    Raises:
        DataError: when a header is not what the format says; `where` names shard and row.
    """
    view = memoryview(block)
    offsets = member_offsets(members, json_bytes)
    if len(view) != stride_bytes(members, json_bytes):
        raise DataError(
            f"{where}: {len(view)} bytes, a sample has {stride_bytes(members, json_bytes)}; run `ldm verify`"
        )
    arrays = {}
    for member in members:
        header = npy_header(member.dtype, member.shape)
        start = offsets[member.name]
        if view[start : start + len(header)] != header:
            raise DataError(
                f"{where}: member {member.name!r} has not the header of {member}; run `ldm verify`"
            )
        flat = np.frombuffer(
            view, dtype=member.dtype, count=member.payload_bytes // 2, offset=start + len(header)
        )
        arrays[member.name] = flat.reshape(member.shape)
    try:
        record = json.loads(bytes(view[offsets["json"] : offsets["json"] + json_bytes]))
        return LatentSample(record["key"], arrays, record)
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: the json member is damaged; run `ldm verify`") from None

"""Walk a tar's headers and take nothing on trust: damage is an error, never the end of the archive.

Stock readers take a header that is cut off, flipped or zeroed for the end and lose the rest of the shard
without a word. Here each header's checksum is verified, every member must lie inside the file, two zero blocks
must end it, and only zeros may follow them. GNU and pax headers are understood; contents are never opened.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DataError

BLOCK = 512
RECORD = 20 * BLOCK
END_MARK = 2 * BLOCK
MAX_EXTENDED_HEADER = 1 << 20
ZERO_BLOCK = bytes(BLOCK)
FILE_KINDS = (b"0", b"\0", b"7")
KINDS_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
FOLDER_KIND = b"5"
EXTENDED_KINDS = (b"x", b"g", b"L", b"K")  # pax, pax global, GNU long name, GNU long link
SPARSE_KIND = b"S"
UNREADABLE_KINDS = {b"M": "a piece of a multi-volume archive"}
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True)
class Member:
    """One member: its content is the `size` bytes at `offset` of the file it comes from."""

    name: str
    offset: int
    size: int
    is_file: bool = True


class DamagedTarError(DataError):
    """A tar that cannot be read to its end; `members` are those before the damage at byte `offset`."""

    def __init__(self, where: str, offset: int, said: str, members: list[Member]) -> None:
        self.where, self.offset, self.said, self.members = where, offset, said, members
        super().__init__(f"{where}: {said} at byte {offset}")


class _DamageError(Exception):
    def __init__(self, offset: int, said: str) -> None:
        self.offset, self.said = offset, said
        super().__init__(said)


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    kind: bytes


def walk_tar(path: Path) -> list[Member]:
    """Return the members of the tar at `path` in order, folders left out; reads headers only.

    Raises:
        DamagedTarError: when anything in it is not as the format says, with the byte offset.
        OSError: when the storage fails; trying again may help.
    """
    with path.open("rb") as stream:
        return walk_open_tar(stream, str(path))


def walk_open_tar(stream: BinaryIO, where: str) -> list[Member]:
    """Return the members of an opened tar, as `walk_tar` does; `where` is what messages call it."""
    members: list[Member] = []
    try:
        for member in _members(stream, os.fstat(stream.fileno()).st_size):
            members.append(member)
    except _DamageError as damage:
        raise DamagedTarError(where, damage.offset, damage.said, members) from None
    return members


def _members(stream: BinaryIO, size_bytes: int) -> Iterator[Member]:
    position = 0
    extended: dict[str, str] = {}
    while True:
        block = _read(stream, position, BLOCK)
        if position == 0:
            _refuse_compressed(block)
        if len(block) < BLOCK:
            raise _DamageError(
                position, "the file is empty" if size_bytes == 0 else _cut_header(size_bytes - position)
            )
        if block == ZERO_BLOCK:
            if extended:
                raise _DamageError(position, "zeros where the member of an extended header should be")
            _check_end(stream, position, size_bytes)
            return
        header = _parse_header(block, position)
        content = _content_bytes(header, extended, position)
        start = position + BLOCK
        if header.kind == SPARSE_KIND:
            start = _after_sparse_map(stream, block, position)
        following = start + -(-content // BLOCK) * BLOCK
        if following > size_bytes:
            raise _DamageError(position, f"{header.name!r} has {content} bytes, the file is cut inside them")
        if header.kind in EXTENDED_KINDS:
            extended |= _extended_header(stream, header, start)
        else:
            if header.kind != FOLDER_KIND and not header.name.endswith("/"):
                plain = header.kind in FILE_KINDS and not any(k.startswith("GNU.sparse") for k in extended)
                yield Member(extended.get("path", header.name), start, content, plain)
            extended = {}
        position = following


def _after_sparse_map(stream: BinaryIO, header: bytes, position: int) -> int:
    """Return where the content of a GNU sparse file begins: behind the blocks in which its map of holes goes on."""
    start, goes_on = position + BLOCK, header[482]
    while goes_on:
        block = _read(stream, start, BLOCK)
        if len(block) < BLOCK:
            raise _DamageError(start, "the file is cut inside the map of a sparse file")
        start, goes_on = start + BLOCK, block[504]
    return start


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _cut_header(left_bytes: int) -> str:
    if left_bytes:
        return f"the file is cut {left_bytes} bytes into a 512-byte header"
    return "the file ends without the two zero blocks that end a tar (cut between members?)"


def _parse_header(block: bytes, position: int) -> _Header:
    _check_sum(block, position)
    kind = block[156:157]
    if kind in UNREADABLE_KINDS:
        raise _DamageError(position, f"{UNREADABLE_KINDS[kind]}, which no shard holds")
    name, prefix = _text(block[:100]), _text(block[345:500])
    if prefix and block[257:263] == b"ustar\0":
        name = f"{prefix}/{name}"
    return _Header(name, _number(block[124:136], position), kind)


def _check_sum(block: bytes, position: int) -> None:
    blanked = block[:148] + b" " * 8 + block[156:]
    stored, unsigned = _octal(block[148:156]), sum(blanked)
    if stored == unsigned:
        return
    if stored == unsigned - 256 * sum(byte > 127 for byte in blanked):  # what some old writers stored
        return
    raise _DamageError(
        position, "damaged header (its checksum is wrong)" if position else "not a tar: no header"
    )


def _refuse_compressed(block: bytes) -> None:
    for magic, compression in COMPRESSED.items():
        if block.startswith(magic):
            raise _DamageError(0, f"{compression} data, not a tar: unpack it first")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if all(byte in b"01234567" for byte in digits) else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes, position: int) -> int:
    if field[0] == 0x80:  # GNU's binary form, for 8 GiB and more
        return int.from_bytes(field[1:], "big")
    number = _octal(field)
    if number is None:
        raise _DamageError(position, f"damaged header (its size field is {field!r})")
    return number


def _content_bytes(header: _Header, extended: dict[str, str], position: int) -> int:
    if header.kind in KINDS_WITHOUT_CONTENT:
        return 0
    text = extended.get("size")
    if text is None or header.kind in EXTENDED_KINDS:
        return header.size
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise _DamageError(position, f"damaged pax header (size {text!r})")
    return int(text)


def _extended_header(stream: BinaryIO, header: _Header, start: int) -> dict[str, str]:
    if header.size > MAX_EXTENDED_HEADER:
        raise _DamageError(start - BLOCK, f"damaged extended header ({header.size} bytes)")
    content = _read(stream, start, header.size)
    if header.kind in (b"g", b"K"):
        return {}
    if header.kind == b"L":
        return {"path": _text(content)}
    records = {}
    while content:
        length = content.partition(b" ")[0]
        if not length.isdigit() or len(length) > 7 or not len(length) + 1 < int(length) <= len(content):
            raise _DamageError(start, "damaged pax header (its records do not fit)")
        record = content[len(length) + 1 : int(length)]
        name, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _DamageError(start, "damaged pax header (a record without value)")
        records[name.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return records


def _check_end(stream: BinaryIO, position: int, size_bytes: int) -> None:
    tail_bytes = size_bytes - position
    if tail_bytes < END_MARK:
        raise _DamageError(position, f"the file ends {tail_bytes} bytes into the end mark of 1024 zero bytes")
    stream.seek(position)
    at = position
    while chunk := stream.read(1 << 20):
        if chunk.strip(b"\0"):
            data_at = at + len(chunk) - len(chunk.lstrip(b"\0"))
            raise _DamageError(position, f"zeros as at the end of a tar, but data follows at byte {data_at}")
        at += len(chunk)
    if tail_bytes >= END_MARK + RECORD:
        raise _DamageError(
            position, f"{tail_bytes} zero bytes, more than the end of a tar has: a zeroed tail?"
        )

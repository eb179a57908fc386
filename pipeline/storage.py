"""One layer over files here and in object stores: list, size, open, read a range, fetch whole.

A place is a local path or a URL such as `s3://bucket/folder`. Transient faults of a store are tried again with
growing pauses by the store's own client (botocore's standard mode), so no loop of ours stands around the calls;
what is left is an `OSError`: trying the job again may help. Credentials come from the environment or the
client's own files, never from a config, and are never part of a message.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, PipelineError, ToolError

PROTOCOLS = ("file", "s3", "memory")
"""What is tested. `memory` is fsspec's own store inside the process, for tests."""
ATTEMPTS = 6
CONNECT_SECONDS, READ_SECONDS = 10, 60
FETCH_BYTES = 8 << 20
CLIENTS = {"botocore", "aiobotocore", "aiohttp"}
"""Whose errors mean that the store could not be reached, refused, or cut the connection."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


Rest = ParamSpec("Rest")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class StoredFile:
    """A file below a folder: `name` is its path from there with slashes."""

    name: str
    size_bytes: int
    version: str
    """Changes when the content does: the store's etag, or local size and modification time."""


def is_remote(place: str | Path) -> bool:
    """Return whether the place is a URL of a store rather than a local path."""
    found = SCHEME.match(str(place))
    return found is not None and found[1] != "file"


def join(folder: str | Path, name: str) -> str:
    """Return the place of the file `name` below `folder`."""
    return f"{str(folder).rstrip('/')}/{name}"


def _in_our_words(
    call: Callable[Concatenate[str | Path, Rest], Answer],
) -> Callable[Concatenate[str | Path, Rest], Answer]:
    """Let `call` raise what its docstring says: the S3 client has errors of its own that are no `OSError`."""

    @wraps(call)
    def wrapped(place: str | Path, *rest: Rest.args, **named: Rest.kwargs) -> Answer:
        try:
            return call(place, *rest, **named)
        except Exception as error:
            if isinstance(error, OSError | PipelineError):
                raise
            if type(error).__module__.partition(".")[0] not in CLIENTS:
                raise
            if "Credentials" in type(error).__name__:
                raise ConfigError(
                    f"{place}: {error}; give the store's credentials in the environment or in its client's own files"
                ) from None
            raise OSError(f"{place}: {type(error).__name__}: {error}") from None

    return wrapped


@_in_our_words
def is_folder(place: str | Path) -> bool:
    """Return whether something lies below the place."""
    system, path = _open_system(place)
    return bool(system.isdir(path))


@_in_our_words
def exists(place: str | Path) -> bool:
    """Return whether there is a file at the place."""
    system, path = _open_system(place)
    return bool(system.isfile(path))


@_in_our_words
def list_files(folder: str | Path, *, below: bool = False) -> list[StoredFile]:
    """Return the files in the folder, with `below` also in its subfolders, sorted by name.

    Links to folders are not followed, so nothing outside the folder is listed.

    Raises:
        FileNotFoundError: when the folder does not exist.
    """
    system, path = _open_system(folder)
    if isinstance(system, LocalFileSystem):
        return sorted(_local_files(Path(path), below), key=lambda file: file.name)
    system.invalidate_cache(path)
    depth = None if below else 1
    found = system.find(path, maxdepth=depth, detail=True)
    if not found and not system.isdir(path):
        raise FileNotFoundError(f"{folder}: no such folder")
    start = len(path.rstrip("/")) + 1
    return sorted(
        (StoredFile(name[start:], int(info["size"]), _version(info)) for name, info in found.items()),
        key=lambda file: file.name,
    )


def _local_files(folder: Path, below: bool) -> Iterator[StoredFile]:
    def give_up(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=give_up):
        if not below:
            folders.clear()
        for name in names:
            path = Path(parent) / name
            status = path.stat()
            version = f"{status.st_size}-{status.st_mtime_ns}"
            yield StoredFile(path.relative_to(folder).as_posix(), status.st_size, version)


@_in_our_words
def stat_file(place: str | Path) -> StoredFile:
    """Return size and version of the file at the place; its `name` is the last part of the path.

    Raises:
        FileNotFoundError: when there is none.
    """
    system, path = _open_system(place)
    if isinstance(system, LocalFileSystem):
        status = Path(path).stat()
        return StoredFile(Path(path).name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
    info = system.info(path, refresh=True) if "s3" in system.protocol else system.info(path)
    return StoredFile(path.rpartition("/")[2], int(info["size"]), _version(info))


@_in_our_words
def open_file(place: str | Path) -> BinaryIO:
    """Return the file opened for reading; `seek` and `read` fetch only what they need from a store."""
    system, path = _open_system(place)
    stream: BinaryIO = open(path, "rb") if isinstance(system, LocalFileSystem) else system.open(path, "rb")
    return stream


@_in_our_words
def read_file(place: str | Path) -> bytes:
    """Return the whole file."""
    system, path = _open_system(place)
    return Path(path).read_bytes() if isinstance(system, LocalFileSystem) else bytes(system.cat_file(path))


@_in_our_words
def read_range(place: str | Path, offset: int, size_bytes: int) -> bytes:
    """Return `size_bytes` bytes from `offset` on; fewer only where the file ends."""
    assert offset >= 0 and size_bytes >= 0, (offset, size_bytes)
    if size_bytes == 0:
        return b""
    system, path = _open_system(place)
    if isinstance(system, LocalFileSystem):
        with open(path, "rb") as stream:
            return os.pread(stream.fileno(), size_bytes, offset)
    return bytes(system.cat_file(path, start=offset, end=offset + size_bytes))


@_in_our_words
def fetch(place: str | Path, into: BinaryIO) -> str:
    """Copy the whole file at the place into the open file `into` and return its sha256.

    Raises:
        OSError: when the store sent fewer or more bytes than it lists: try again.
    """
    expected = stat_file(place).size_bytes
    digest, received = hashlib.sha256(), 0
    with open_file(place) as stream:
        while chunk := stream.read(FETCH_BYTES):
            into.write(chunk)
            digest.update(chunk)
            received += len(chunk)
    if received != expected:
        raise OSError(
            f"{place}: {received} bytes came, the store lists {expected}; run the same command again"
        )
    into.flush()
    return digest.hexdigest()


def _open_system(place: str | Path) -> tuple[Any, str]:
    text = str(place)
    scheme = SCHEME.match(text)
    protocol = scheme[1].lower() if scheme else "file"
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"{text}: {protocol}:// is not supported; give a local path or one of "
            f"{', '.join(f'{name}://' for name in PROTOCOLS[:2])}"
        )
    system = _system(protocol)
    if protocol == "file":
        return system, text.removeprefix("file://")
    return system, str(system._strip_protocol(text))


@lru_cache(maxsize=len(PROTOCOLS))
def _system(protocol: str) -> Any:
    options: dict[str, Any] = {}
    if protocol == "s3":
        options["config_kwargs"] = {
            "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
        }
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise ToolError(f"{protocol}://: {error}; pip install s3fs") from None


def _version(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "LastModified", "mtime", "created"):
        if info.get(name):
            return str(info[name]).strip('"')
    return str(info["size"])

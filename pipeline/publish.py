"""Files appear whole or not at all: write beside, fsync, rename (or link), fsync the folder.

Every file of a run, a data set or a checkpoint is made through this room, so that a kill at any instant
leaves either the old file, the new file, or a temporary one that nobody reads.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".tmp-"


def temporary_beside(path: Path) -> Path:
    """Return a name in `path`'s folder that no reader takes for a finished file."""
    return path.with_name(f".{path.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def fsync_file(path: Path) -> None:
    """Force the bytes of the file at `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Force the names inside `folder` to the disk: a rename is only durable after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it takes the name `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary_beside(path)
    try:
        yield beside
        fsync_file(beside)
        os.replace(beside, path)
        fsync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it replaces `path` only if the block ends without an error.

    An older folder of that name steps aside by a rename first, so that `path` is never half old, half new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary_beside(path)
    beside.mkdir()
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            fsync_file(file) if file.is_file() else fsync_folder(file)
        fsync_folder(beside)
        if path.exists():
            old = temporary_beside(path)
            os.replace(path, old)
            os.replace(beside, path)
            shutil.rmtree(old)
        else:
            os.replace(beside, path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def publish_first(finished: Path, path: Path) -> bool:
    """Give the finished file the name `path` unless that name is taken; return whether it was ours.

    First wins: `link` fails when the name exists, so two workers that made the same file cannot replace each
    other's bytes. The temporary name is gone afterwards either way.
    """
    fsync_file(finished)
    try:
        os.link(finished, path)
    except FileExistsError:
        return False
    finally:
        finished.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def write_bytes(path: Path, payload: bytes) -> None:
    """Write `payload` to `path`, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(payload)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_text` to `path`, whole or not at all."""
    write_bytes(path, json_text(value).encode())


def json_text(value: Any) -> str:
    """Return `value` as indented JSON with sorted keys and a newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def remove_temporaries(folder: Path) -> int:
    """Remove what killed writers left in `folder` (not below it) and return how many entries went.

    Only for a folder that one process owns: a live writer's temporary file looks the same.
    """
    left = [entry for entry in folder.glob(".*") if TEMPORARY_MARK in entry.name] if folder.is_dir() else []
    for entry in left:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    return len(left)


def file_digest(path: Path) -> str:
    """Return the sha256 of the file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Return the sha256 of `value` as canonical JSON (sorted keys, no spaces), hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """Return one sha256 over the names and bytes of all files below `folder`, hexadecimal."""
    files = {
        file.relative_to(folder).as_posix(): file_digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return json_digest(files)

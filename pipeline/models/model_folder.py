"""Local model folders (diffusers, transformers): what is refused before a library reads them, and their digest.

A folder of downloaded weights is untrusted: it may hold code (Python files, `auto_map`) and pickles. Only
`config.json` and safetensors are looked at here, without any framework, so the digest is that of the stored
bytes: it stays the same when the weights are saved again, split into shards or loaded in another precision.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ConfigError, DataError
from pipeline.publish import json_digest

MAX_HEADER_BYTES = 100_000_000
# Written by the libraries for themselves; two folders that differ only here hold the same model.
BOOKKEEPING = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_diffusers_version",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
    }
)


@dataclass(frozen=True)
class ModelFolder:
    """A local folder that holds no code, has a readable `config.json` and its weights as safetensors."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: where it is and what its header says."""

    path: Path
    name: str
    """As stored; what a model calls it today may be spelt otherwise."""
    dtype: str
    """In safetensors' letters: F16, BF16, F32."""
    shape: tuple[int, ...]


def open_model_folder(
    folder: Path, weights_stem: str, remedy: str, *, variants: Sequence[str] = ()
) -> ModelFolder:
    """Return what `folder` holds after the checks that need no library.

    `weights_stem` is the library's file name without `.safetensors`; `remedy` ends the message about a missing
    folder: which setting to change or which verb makes the folder. `variants` are other precisions ("fp16") to
    take where the plain files are missing.

    Raises:
        ConfigError: when there is no such folder, or it is not a single model's.
        DataError: when it holds code, or files that cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder; {remedy}")
    refuse_code(folder)
    if not (folder / "config.json").is_file():
        inside = [entry.parent.name for entry in sorted(folder.glob("*/config.json"))]
        hint = f"name one of its subfolders: {', '.join(inside)}" if inside else remedy
        raise ConfigError(f"{folder}: no config.json; {hint}")
    weights = _weights(folder, weights_stem, remedy, ("", *variants))
    return ModelFolder(folder, read_json(folder / "config.json"), weights)


def refuse_code(folder: Path) -> None:
    """Raise DataError if `folder` holds Python files, or JSON that names code to run (`auto_map`)."""
    code = next(iter(sorted(folder.rglob("*.py"))), None)
    if code is not None:
        raise DataError(
            f"{code}: a model folder with Python code is refused; keep only its weights, config and tokenizer"
        )
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("config.json") and "auto_map" in read_json(path):
            raise DataError(
                f"{path}: auto_map names code to run and is refused; remove the key if you trust the rest"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        DataError: when the bytes are not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); fetch or train the model again") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: holds {type(value).__name__}, not an object; fetch or train the model again"
        )
    return value


def model_digest(
    found: ModelFolder, config: dict[str, Any], rename: Callable[[str], str | None] = lambda name: name
) -> str:
    """Return the sha256 over `config` less bookkeeping and over every tensor's name, type, shape and bytes.

    `rename` maps a stored name to the name that counts, or to None for tensors that the model does not use.
    """
    tensors: dict[str, list[Any]] = {}
    for path in found.weights:
        for name, described in tensor_digests(path):
            counted = rename(name)
            if counted is not None:
                tensors[counted] = described
    kept = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    return json_digest({"config": kept, "tensors": tensors})


def tensor_digests(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield (name, [dtype, shape, sha256 of the bytes]) of each tensor in a safetensors file.

    Raises:
        DataError: when the file is cut short or its header makes no sense.
    """
    with path.open("rb") as stream:
        header, start = _read_header(path, stream)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                with memoryview(mapped)[start + first : start + last] as payload:
                    yield name, [entry["dtype"], entry["shape"], hashlib.sha256(payload).hexdigest()]


def stored_tensors(found: ModelFolder) -> dict[str, StoredTensor]:
    """Return where each tensor of the folder lies, by its stored name, from the headers alone.

    Raises:
        DataError: when a file is cut short, its header makes no sense, or two files hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in found.weights:
        with path.open("rb") as stream:
            header, _ = _read_header(path, stream)
        for name, entry in header.items():
            if name in tensors:
                raise DataError(f"{path}: holds {name}, which {tensors[name].path.name} holds too")
            tensors[name] = StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]))
    return tensors


def _read_header(path: Path, stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the tensors' entries, and where the payload begins, of a whole safetensors file."""
    prefix, size = stream.read(8), path.stat().st_size
    if len(prefix) < 8:
        raise DataError(f"{path}: {len(prefix)} bytes; not a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise DataError(f"{path}: header of {length} bytes; not a safetensors file, or cut short")
    payload = size - 8 - length
    try:
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _ = entry["dtype"], entry["shape"]
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= payload:
                raise DataError(f"{path}: {name} ends at byte {last} of {payload}; the file is cut short")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path}: the header is not safetensors' JSON") from None
    return header, 8 + length


def _weights(folder: Path, stem: str, remedy: str, variants: Sequence[str]) -> tuple[Path, ...]:
    for variant in variants:
        suffix = f".{variant}" if variant else ""
        single = folder / f"{stem}{suffix}.safetensors"
        if single.is_file():
            return (single,)
        index = folder / f"{stem}.safetensors.index{suffix}.json"
        if index.is_file():
            return _shards(folder, index)
    raise ConfigError(f"{folder}: no {stem}.safetensors (pickled weights are never read); {remedy}")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise DataError(
            f"{index}: names {', '.join(missing) or 'no files'}, not in the folder; fetch the model again"
        )
    return tuple(folder / name for name in names)

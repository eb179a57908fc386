"""Tars in WebDataset layout that others wrote, without our index and manifest: read in order, decoded by allow-list.

For looking at foreign data and for moving it into our format. A training should read finished data sets.
"""

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from pipeline.errors import DataError

logger = logging.getLogger(__name__)

NO_PROMISES = (
    "foreign tars have no manifest: a damaged or cut tar can lose samples in silence, a flipped bit goes unnoticed, "
    "ranks may get unequal numbers of samples, and a resume starts at the beginning of a tar"
)


def _npy(content: bytes) -> np.ndarray:
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "npy": _npy,
    "json": json.loads,
    "txt": lambda content: content.decode("utf-8"),
    "cls": lambda content: int(content.decode("ascii")),
    "jpg": bytes,
    "jpeg": bytes,
    "png": bytes,
    "webp": bytes,
}
"""Last part of an extension -> decoder. Pictures stay bytes. What is not listed, pickles first of all, is refused."""


def foreign_samples(
    tars: Sequence[Path], *, rank: int = 0, world_size: int = 1, skip: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield {"key": ..., member: decoded value} of each sample in the tars r, r + W, ..., in order.

    Members whose extension is in `skip` are left out unread. Says once, in the log, what cannot be promised.

    Raises:
        DataError: a tar is missing or unreadable, a member has an extension that is not allowed or does not decode.
    """
    missing = [str(path) for path in tars if not path.is_file()]
    if missing:
        raise DataError(f"foreign tars: {len(missing)} missing: {', '.join(missing)}")
    logger.warning("%s", NO_PROMISES)
    for path in tars[rank::world_size]:
        stream = webdataset.WebDataset(
            str(path), shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
        )
        try:
            for sample in stream:
                yield _decoded(sample, path, frozenset(skip))
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise DataError(f"{path}: cannot be read as a tar ({error})") from None


def _decoded(sample: Mapping[str, Any], path: Path, skip: frozenset[str]) -> dict[str, Any]:
    key = str(sample["__key__"])
    found: dict[str, Any] = {"key": key}
    for name, content in sample.items():
        extension = name.rpartition(".")[2].lower()
        if name.startswith("__") or extension in skip or name in skip:
            continue
        decoder = DECODERS.get(extension)
        if decoder is None:
            raise DataError(
                f"{path}: {key}.{name} is not decoded: allowed are {', '.join(DECODERS)}; "
                f"leave it out with skip, never unpickle what others wrote"
            )
        try:
            found[name] = decoder(content)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: {key}.{name} does not decode ({error})") from None
    return found

"""What a checkpoint's folder and manifest say, without torch: names, the seal, and the proof of every byte.

`checkpoints/step-XXXXXXXX/` holds one safetensors file a rank and `checkpoint.json`, written last, with size and
sha256 of every file and a digest of itself.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.publish import file_digest, json_digest, json_text

logger = logging.getLogger(__name__)

FORMAT = 3
MANIFEST_NAME = "checkpoint.json"
POINTER_NAME = "latest"
ASIDE = "damaged-"
STEP_NAME = re.compile(r"step-\d{8,}")
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
MANIFEST_FIELDS = frozenset(
    "step samples data_origin substituted applied skipped skipped_in_a_row skipped_ranges health loss interval ema "
    "scheduler world_size zero_stage attempt tracker_run_id config config_digest data data_digest parameters versions "
    "files format digest".split()
)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint after `step` finished steps lies."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the number of finished steps that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def rank_file(rank: int) -> str:
    """Return the name of the file of one rank."""
    return f"rank-{rank:05d}.safetensors"


def committed(checkpoints: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first; temporary and set-aside folders are none."""
    if not checkpoints.is_dir():
        return []
    found = [entry for entry in checkpoints.iterdir() if STEP_NAME.fullmatch(entry.name)]
    return sorted(found, key=step_of)


def aside(checkpoints: Path) -> list[Path]:
    """Return the damaged checkpoints that an earlier start has set aside: they too say that there was progress."""
    return sorted(checkpoints.glob(f"{ASIDE}step-*")) if checkpoints.is_dir() else []


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with format and its own digest."""
    content = {**manifest, "format": FORMAT}
    return {**content, "digest": json_digest(content)}


def read_manifest(checkpoint: Path, fields: frozenset[str] = MANIFEST_FIELDS) -> dict[str, Any]:
    """Return the manifest of one checkpoint, its digest and file names checked, in the present format.

    `fields` are those that it must have; a snapshot of averages has fewer.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that this version does not read.
        OSError: it cannot be read at all, which says nothing about its content.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    whole = isinstance(manifest, dict) and manifest.get("digest") == json_digest(
        {name: value for name, value in manifest.items() if name != "digest"}
    )
    # As it was written, to the byte: 1E-05 is the same number as 1e-05, and one flipped bit away.
    if not whole or text != json_text(manifest):
        raise CheckpointError(f"{path}: its digest does not match its content (damaged or edited)")
    while manifest.get("format") in UPGRADES:
        manifest = UPGRADES[manifest["format"]](manifest)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r}, this version reads formats 1 to {FORMAT}; "
            "it was written by a newer version"
        )
    lacking = sorted(fields - manifest.keys())
    if lacking:
        raise CheckpointError(f"{path}: lacks {', '.join(lacking)}")
    names = manifest["files"]
    if not names or not all(RANK_FILE.fullmatch(name) for name in names):
        raise CheckpointError(f"{path}: names files that no checkpoint has: {sorted(names)[:5]}")
    return manifest


def damaged_files(checkpoint: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each file of `names` whose size or sha256 is not the manifest's; OSError passes through.

    A wrong hash is read a second time past the page cache: only damage that stays is damage.
    """
    for name in names:
        path, record = checkpoint / name, manifest["files"][name]
        try:
            size_bytes = path.stat().st_size
            if size_bytes != record["bytes"]:
                yield f"{path}: {size_bytes} bytes instead of {record['bytes']}"
                continue
            found = file_digest(path)
            if found != record["sha256"]:
                _forget_cache(path)
                found = file_digest(path)
        except (FileNotFoundError, NotADirectoryError):
            yield f"{path}: missing"
            continue
        if found != record["sha256"]:
            yield f"{path}: sha256 {found[:16]} instead of {record['sha256'][:16]}"


def set_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints to `damaged-step-...`: kept for a look, never counted, never in the way."""
    for checkpoint in damaged:
        target = checkpoint.with_name(f"{ASIDE}{checkpoint.name}")
        if target.exists():
            shutil.rmtree(target)
        os.replace(checkpoint, target)
        logger.warning("%s set aside as %s", checkpoint, target.name)


def _from_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of format 1, whose fields all stand in format 2 as they are, with what came since."""
    came: dict[str, Any] = {"skipped_ranges": [], "health": {}, "scheduler": {}, "tracker_run_id": None}
    return {**manifest, **came, "config_digest": json_digest(manifest.get("config")), "format": 2}


def _from_format_2(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of format 2 in format 3: its data was never changed, and nothing was kept of substitutes."""
    return {**manifest, "data_origin": 0, "substituted": [], "data": {}, "format": 3}


# Format -> what makes the next one of it.
UPGRADES = {1: _from_format_1, 2: _from_format_2}


def _forget_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

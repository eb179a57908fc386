"""Checkpoints: a folder that exists whole or not at all, loads at any world size and stage, and proves its bytes.

`checkpoints/step-XXXXXXXX/` holds one safetensors file a rank (fp32 masters, Adam's moments, EMA: 16 bytes a
parameter in all) and `checkpoint.json`, written last, with size and sha256 of every file. The rename of the
finished folder is the commit; no pointer names the newest. No pickle, and no random state: every draw of a step
is a function of the step (see `train`).
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.publish import file_digest, json_digest
from pipeline.training.fragment_file import Stretch, explain_os_error, read_into, read_whole
from pipeline.training.world import World

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST_NAME = "checkpoint.json"
ASIDE = "damaged-"
STEP_NAME = re.compile(r"step-\d{8,}")
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
MANIFEST_FIELDS = frozenset(
    "step samples applied skipped skipped_in_a_row loss interval ema world_size zero_stage attempt config "
    "data_digest parameters versions files format digest".split()
)
WEIGHT_KINDS = {"ema": "ema", "raw": "master"}


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint after `step` finished steps lies."""
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the number of finished steps that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


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


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of one checkpoint, its digest and file names checked.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
        OSError: it cannot be read at all, which says nothing about its content.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("digest") != json_digest(
        {name: value for name, value in manifest.items() if name != "digest"}
    ):
        raise CheckpointError(f"{path}: its digest does not match its content (damaged or edited)")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r}, this version reads format {FORMAT}"
        )
    lacking = sorted(MANIFEST_FIELDS - manifest.keys())
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


def choose_checkpoint(checkpoints: Path, world: World) -> tuple[Path, dict[str, Any], list[Path]] | None:
    """Return the newest checkpoint whose every byte is right, its manifest, and the damaged ones passed over.

    All ranks together: rank 0 lists and reads manifests, each rank hashes its share of the files. None means
    that nothing was ever committed here.

    Raises:
        CheckpointError: there are checkpoints and none is valid; training from the start would hide a loss.
        PipelineError: a file could not be read (not: was wrong); the same start may succeed later.
    """
    names = on_first_rank(world, lambda: [path.name for path in reversed(committed(checkpoints))])
    damaged: list[Path] = []
    problems: list[str] = []
    for name in names:
        checkpoint = checkpoints / name
        manifest, found = _verify(checkpoint, world)
        if not found:
            if problems and world.is_first:
                logger.warning("%s; going back to %s", "; ".join(problems), checkpoint)
            return checkpoint, manifest, damaged
        damaged.append(checkpoint)
        problems += found
    if not names:
        problems = on_first_rank(world, lambda: [f"{path} was damaged" for path in aside(checkpoints)])
        if not problems:
            return None
    raise CheckpointError(
        f"{checkpoints}: none of its {len(names) or len(problems)} checkpoints is valid: {'; '.join(problems)}; "
        "restore one from a copy, or move the folder away to train from the start"
    )


def newest_checkpoint(checkpoints: Path) -> Path:
    """Return the newest checkpoint under `checkpoints` whose every byte is right; this process alone.

    Raises:
        CheckpointError: there is none; the damage of each is named.
    """
    chosen = choose_checkpoint(checkpoints, World())
    if chosen is None:
        raise CheckpointError(f"{checkpoints}: no checkpoint yet; train with `ldm train`")
    return chosen[0]


def load_weights(checkpoint: Path, which: str, *, verified: bool = False) -> dict[str, Tensor]:
    """Return the whole weights of one checkpoint by name, float32 on the CPU: the EMA ("ema") or the masters ("raw").

    Needs neither DeepSpeed nor the world size of the training. Files are hashed first, at about 2 GB/s, unless
    the checkpoint comes straight from `newest_checkpoint` and the caller says `verified`.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    manifest = read_manifest(checkpoint)
    names = sorted(manifest["files"])
    problems = [] if verified else list(damaged_files(checkpoint, manifest, names))
    if problems:
        raise CheckpointError("; ".join(problems))
    return read_whole([checkpoint / name for name in names], WEIGHT_KINDS[which], manifest["parameters"])


def load_stretches(
    checkpoint: Path, manifest: Mapping[str, Any], wanted: Sequence[Stretch], world: World
) -> None:
    """Fill this rank's part of the state from a verified checkpoint of any world size and ZeRO stage.

    Raises:
        CheckpointError: on every rank, when any rank misses something.
    """
    names = sorted(manifest["files"])
    # At an unchanged world size and stage the rank's own file is all that is opened.
    mine = f"rank-{world.rank:05d}.safetensors"
    names.sort(key=lambda name: name != mine)
    problem, unread = "", ""
    try:
        read_into([checkpoint / name for name in names], wanted)
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:
        unread = explain_os_error(error, checkpoint)
    reports = world.gather([problem, unread])
    for found, kind in zip(zip(*reports, strict=True), (CheckpointError, PipelineError), strict=True):
        if any(found):
            raise kind(f"rank {next(r for r, text in enumerate(found) if text)}: {next(filter(None, found))}")


def refuse_other_model(
    checkpoint: Path, saved: Mapping[str, Any], present: Mapping[str, Sequence[int]]
) -> None:
    """Do nothing if the checkpoint's parameters are the model's.

    Raises:
        ConfigError: a line for each parameter that only one side has, or with another shape.
    """
    lines = []
    for name in sorted(saved.keys() | present.keys()):
        theirs, ours = saved.get(name), present.get(name)
        if theirs is None or ours is None or list(theirs) != list(ours):
            said = [f"is {list(shape)}" if shape is not None else "is absent" for shape in (theirs, ours)]
            lines.append(f"{checkpoint}: {name} {said[0]} in the checkpoint, {said[1]} in the config's model")
    if lines:
        rest = [f"{checkpoint}: and {len(lines) - 20} more parameters"] if len(lines) > 20 else []
        end = [f"{checkpoint}: give back the old `model` section, or use another run name"]
        raise ConfigError(lines[:20] + rest + end)


def on_first_rank(world: World, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its JSON result on every rank.

    Raises:
        CheckpointError: on every rank, if rank 0's action raised it.
        PipelineError: on every rank, if rank 0's action raised another PipelineError or an OSError.
    """
    answer: dict[str, Any] = {}
    if world.is_first:
        try:
            answer = {"result": action()}
        except OSError as error:
            answer = {"said": f"rank 0: {explain_os_error(error, Path.cwd())}", "final": False}
        except PipelineError as error:
            answer = {"said": str(error), "final": isinstance(error, CheckpointError)}
    answer = world.broadcast(answer)
    if "said" in answer:
        raise (CheckpointError if answer["final"] else PipelineError)(answer["said"])
    return answer["result"]


def _verify(checkpoint: Path, world: World) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest and what is wrong with the checkpoint, the same on all ranks."""

    def read() -> dict[str, Any]:
        try:
            return {"manifest": read_manifest(checkpoint)}
        except CheckpointError as error:
            return {"problem": str(error)}

    answer = on_first_rank(world, read)
    if "problem" in answer:
        return {}, [answer["problem"]]
    manifest = answer["manifest"]
    mine = sorted(manifest["files"])[world.rank :: world.world_size]
    found: list[str] = []
    unread = ""
    try:
        found = list(damaged_files(checkpoint, manifest, mine))
    except OSError as error:
        unread = explain_os_error(error, checkpoint)
    reports = world.gather({"found": found, "unread": unread})
    for rank, report in enumerate(reports):
        if report["unread"]:
            raise PipelineError(f"rank {rank}: {report['unread']}; start again when the file system answers")
    return manifest, [line for report in reports for line in report["found"]]


def _forget_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def set_aside(damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints to `damaged-step-...`: kept for a look, never counted, never in the way."""
    for checkpoint in damaged:
        target = checkpoint.with_name(f"{ASIDE}{checkpoint.name}")
        if target.exists():
            shutil.rmtree(target)
        os.replace(checkpoint, target)
        logger.warning("%s set aside as %s", checkpoint, target.name)

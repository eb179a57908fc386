"""Reading checkpoints: the newest that proves its bytes is chosen by all ranks together, and loads anywhere.

`manifest` says what a checkpoint is. Its rank files hold fp32 masters, Adam's moments and averages (4 bytes a
parameter each) at any world size and ZeRO stage. No pickle, and no random state: every draw of a step is a
function of the step (see `train`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.training.frozen import frozen_weights
from pipeline.training.saving.fragment_file import Stretch, read_into, read_whole
from pipeline.training.saving.manifest import aside, committed, damaged_files, rank_file, read_manifest
from pipeline.training.saving.writer import explain_os_error
from pipeline.training.world import World

logger = logging.getLogger(__name__)


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
    """Return the whole weights of one checkpoint by name, float32 on the CPU: the masters ("raw") or an average.

    `which` is "raw", "ema" or what else the checkpoint holds, such as "ema-0.999" or "ema-posthoc-0.05".
    Needs neither DeepSpeed nor the world size of the training. Files are hashed first, at about 2 GB/s, unless
    the checkpoint comes straight from `newest_checkpoint` and the caller says `verified`.

    Raises:
        CheckpointError: something is missing or damaged.
        ConfigError: the checkpoint holds no such weights; it says which it does.
    """
    manifest = read_manifest(checkpoint)
    held = ["raw", *manifest["ema"].get("kinds", ["ema"])]
    if which not in held:
        raise ConfigError(
            f"{checkpoint}: holds no weights {which!r}; it holds {', '.join(held)}; `ldm ema` makes more"
        )
    names = sorted(manifest["files"])
    problems = [] if verified else list(damaged_files(checkpoint, manifest, names))
    if problems:
        raise CheckpointError("; ".join(problems))
    kind = "master" if which == "raw" else which
    trained = read_whole([checkpoint / name for name in names], kind, manifest["parameters"])
    return trained | frozen_weights(checkpoint)


def load_stretches(
    checkpoint: Path, manifest: Mapping[str, Any], wanted: Sequence[Stretch], world: World
) -> None:
    """Fill this rank's part of the state from a verified checkpoint of any world size and ZeRO stage.

    Raises:
        CheckpointError: on every rank, when any rank misses something.
    """
    names = sorted(manifest["files"])
    # At an unchanged world size and stage the rank's own file is all that is opened.
    mine = rank_file(world.rank)
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

"""Weights that a training leaves as they came: named by patterns, written once into the run folder.

Checkpoints hold what changes. What does not stands in RUN/frozen.safetensors, exactly as the source had it and
whatever the precision of the training, so that a model is whole again with any of the run's checkpoints.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError
from pipeline.paths import RunPaths
from pipeline.publish import whole_file


def frozen_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return those of the parameters `names`, in their order, that a pattern of `train.freeze` names.

    `*` stands for anything, dots included; a pattern that ends before a dot names everything below it.

    Raises:
        ConfigError: a line for each pattern that names nothing, or nothing is left to train.
    """
    chosen: set[str] = set()
    problems = []
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        chosen.update(hits)
        if not hits:
            rooms = sorted({".".join(name.split(".")[:depth]) for name in names for depth in range(1, 8)})
            near = difflib.get_close_matches(pattern.removesuffix(".*"), rooms, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"names begin with {', '.join(_beginnings(names))}"
            )
            problems.append(f"train.freeze: {pattern!r} names no weight of the model; {hint}")
    if not problems and len(chosen) == len(names):
        problems = [f"train.freeze: {', '.join(patterns)} leave no weight to train; take fewer"]
    if problems:
        raise ConfigError(problems)
    return [name for name in names if name in chosen]


def write_frozen(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the frozen weights, float32, whole or not at all."""
    tensors = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    with whole_file(path) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})


def read_frozen(path: Path) -> dict[str, Tensor]:
    """Return the frozen weights of a run, float32 on the CPU; none where the run has no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not readable ({error}); the weights that train.freeze keeps are in it: restore it from a copy"
        ) from error


def frozen_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights of the run of `checkpoint` that no checkpoint holds, because they are frozen."""
    return read_frozen(RunPaths(checkpoint.parent.parent).frozen)


def refuse_other_names(path: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Do nothing if a run's file of frozen weights holds those that the config freezes.

    Raises:
        ConfigError: naming some that only one of them has.
    """
    more, fewer = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    if more or fewer:
        said = [f"now freezes {fewer[0]} ({len(fewer)} such)"] if fewer else []
        said += [f"no longer freezes {more[0]} ({len(more)} such)"] if more else []
        raise ConfigError(
            f"{path}: train.freeze {' and '.join(said)}, but this run began otherwise; give back the old patterns, "
            "or start another run from this one with warm_start"
        )


def _beginnings(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))

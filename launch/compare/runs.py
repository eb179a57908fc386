"""What a run folder says of its run, as far as it has got: every part may be missing but the config."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from pipeline.tracking import read_records

GRID = "step-*.png"


@dataclass(frozen=True)
class ComparedRun:
    """One run under the name that tells it from the others."""

    name: str
    paths: RunPaths

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting of the resolved config by its dotted name, values as JSON has them."""
        config = load_config(self.paths.config)
        return dict(_leaves(config.model_dump(mode="json"), ""))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind ("train", "evaluate"), of the attempts that count."""
        return read_records(self.paths.metrics, kind) if self.paths.metrics.is_file() else []

    @cached_property
    def evaluation(self) -> dict[str, float]:
        """Every number of the last evaluation by its dotted name; empty where there is none."""
        if not self.paths.evaluation.is_file():
            return {}
        try:
            tree = json.loads(self.paths.evaluation.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{self.paths.evaluation}: not JSON ({error}); run `ldm evaluate` again"
            ) from None
        return {
            name: float(value)
            for name, value in _leaves(tree, "")
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }

    @cached_property
    def grids(self) -> dict[int, Path]:
        """The painted grids by the step of their weights, first to last."""
        found = {int(path.stem.removeprefix("step-")): path for path in self.paths.samples.glob(GRID)}
        return dict(sorted(found.items()))

    def prompts(self, step: int) -> tuple[str, ...]:
        """Return the captions of a grid, in its order; none where nothing stands beside it."""
        beside = self.grids[step].with_suffix(".json")
        try:
            return tuple(map(str, json.loads(beside.read_text())["prompts"]))
        except (OSError, ValueError, KeyError, TypeError):
            return ()


def compared_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Return the runs under their folders' names, longer ones where two are the same.

    Raises:
        ConfigError: naming every folder that is no run, or a run given twice.
    """
    lost = [str(folder) for folder in folders if not RunPaths(folder).config.is_file()]
    if lost:
        raise ConfigError(
            f"{', '.join(lost)}: not a run folder (no config.yaml); give some such as runs/demo"
        )
    whole = [folder.resolve() for folder in folders]
    twice = sorted({str(folder) for folder in whole if whole.count(folder) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)}: given twice; give each run once")
    names = [folder.name for folder in whole]
    parts = 1
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(folder.parts[-parts:]) for folder in whole]
    return [ComparedRun(name, RunPaths(folder)) for name, folder in zip(names, folders, strict=True)]


def _leaves(tree: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value); a list is a value of its own, an empty section too."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{at}.{name}" if at else str(name))
    else:
        yield at, tree

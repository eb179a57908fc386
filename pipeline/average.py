"""An average of any length after the training: `ldm ema`, from the snapshots of power-function averages.

The result is a folder `weights/NAME/` of plain safetensors under the network's own names, float32, with a record of
what it was made of. Its name is a choice wherever weights are chosen.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import publish
from pipeline.errors import CheckpointError, ConfigError
from pipeline.paths import RunPaths
from pipeline.training.averages.ema import POSTHOC
from pipeline.training.averages.posthoc import WIDEST_SIGMA_REL, Combination, Profiles, combine, gamma_of
from pipeline.training.averages.snapshots import usable_snapshots
from pipeline.training.saving.fragment_file import read_whole
from pipeline.training.saving.manifest import committed, step_of

logger = logging.getLogger(__name__)

WEIGHTS_NAME, RECORD_NAME = "weights.safetensors", "weights.json"
GROUP_ELEMENTS = 2**26
"""Parameters read at once from every snapshot: 768 MiB with the sums in float64."""
POOR_FIT = 0.05


@dataclass(frozen=True)
class Source:
    """One stored average: a kind in a snapshot, and the time that it ends at."""

    folder: Path
    files: tuple[Path, ...]
    kind: str
    time: int
    """Applied steps averaged."""

    @property
    def gamma(self) -> float:
        """The exponent of its profile."""
        return gamma_of(float(self.kind.removeprefix(POSTHOC)))


def reconstruct(paths: RunPaths, sigma_rel: float, step: int | None = None) -> Path:
    """Write the average of relative width `sigma_rel` as of `step` (None: the newest snapshot); return its folder.

    Only snapshots up to the newest checkpoint count: what an abandoned attempt has left beyond it is another
    history.

    Raises:
        ConfigError: no snapshots, none at `step`, or a width that no power function has.
        CheckpointError: snapshots of more than one model or data set.
    """
    if not 0.0 < sigma_rel <= WIDEST_SIGMA_REL:
        raise ConfigError(
            f"--sigma-rel {sigma_rel}: allowed are widths above 0 and up to {WIDEST_SIGMA_REL:.4f} (the plain mean)"
        )
    snapshots = _snapshots(paths, step)
    _, last = snapshots[-1]
    _refuse_mixture([manifest for _, manifest in snapshots])
    sources = [source for folder, manifest in snapshots for source in _sources(folder, manifest)]
    stored = Profiles(
        np.array([source.time for source in sources], np.float64),
        np.array([source.gamma for source in sources]),
    )
    combination = combine(stored, float(last["averaged"]), gamma_of(sigma_rel))
    if combination.error > POOR_FIT:
        logger.warning(
            "sigma_rel %g: its profile is met to %.1f %% only; widths between and near those stored are met best",
            sigma_rel,
            100 * combination.error,
        )
    target = paths.weights / f"posthoc-{sigma_rel}-step-{last['step']:08d}"
    with publish.whole_folder(target) as folder:
        save_file(combined_weights(sources, combination.factors, last["parameters"]), folder / WEIGHTS_NAME)
        publish.write_json(folder / RECORD_NAME, _record(folder, last, sigma_rel, sources, combination))
    return target


def combined_weights(
    sources: Sequence[Source], factors: np.ndarray, parameters: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return the sum of factor times average over all sources, summed in float64, float32 by name."""
    weights: dict[str, Tensor] = {}
    for group in _groups(parameters):
        sums = {name: torch.zeros(tuple(shape), dtype=torch.float64) for name, shape in group.items()}
        for source, factor in zip(sources, factors.tolist(), strict=True):
            for name, tensor in read_whole(source.files, source.kind, group).items():
                sums[name] += factor * tensor.double()
        weights |= {name: total.float() for name, total in sums.items()}
    return weights


def made_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the float32 weights in a folder that `reconstruct` made, its bytes checked.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        if publish.file_digest(folder / WEIGHTS_NAME) != record["sha256"]:
            raise CheckpointError(
                f"{folder / WEIGHTS_NAME}: is not what {RECORD_NAME} says; make it again with `ldm ema`"
            )
        return record, load_file(folder / WEIGHTS_NAME)
    except (FileNotFoundError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: missing or damaged ({error}); make it again with `ldm ema`"
        ) from error


def _snapshots(paths: RunPaths, step: int | None) -> list[tuple[Path, dict[str, Any]]]:
    checkpoints = committed(paths.checkpoints)
    if not checkpoints:
        raise CheckpointError(f"{paths.checkpoints}: no checkpoint yet; train with `ldm train`")
    reached = step_of(checkpoints[-1])
    there = [step_of(folder) for folder in committed(paths.averages) if step_of(folder) <= reached]
    if not there:
        raise ConfigError(
            f"{paths.averages}: no snapshots; train with `ema.posthoc: {{snapshot_every: N}}`, which cannot be added to "
            "a run that has begun"
        )
    if step is not None and step not in there:
        raise ConfigError(f"--step {step}: {paths.averages} has snapshots after {_listed(there)}")
    usable = usable_snapshots(paths.averages, there[-1] if step is None else step)
    if not usable or (step is not None and usable[-1][1]["step"] != step):
        raise CheckpointError(
            f"{paths.averages}: the snapshot that is asked for is damaged; take another --step"
        )
    return usable


def _sources(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Source]:
    files = tuple(folder / name for name in sorted(manifest["files"]))
    for kind in manifest["kinds"]:
        yield Source(folder, files, kind, manifest["averaged"])


def _refuse_mixture(manifests: Sequence[Mapping[str, Any]]) -> None:
    for field in ("parameters", "data_digest"):
        if any(manifest[field] != manifests[-1][field] for manifest in manifests):
            raise CheckpointError(
                f"the snapshots differ in {field}: they are of different runs; remove the foreign ones"
            )


def _groups(parameters: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Sequence[int]]]:
    group: dict[str, Sequence[int]] = {}
    elements = 0
    for name, shape in parameters.items():
        count = int(np.prod(shape))
        if group and elements + count > GROUP_ELEMENTS:
            yield group
            group, elements = {}, 0
        group[name] = shape
        elements += count
    if group:
        yield group


def _record(
    folder: Path,
    last: Mapping[str, Any],
    sigma_rel: float,
    sources: Sequence[Source],
    combination: Combination,
) -> dict[str, Any]:
    kept = ("step", "samples", "updates", "averaged", "config", "data_digest", "parameters")
    parts = zip(sources, combination.factors.tolist(), strict=True)
    return {
        **{name: last[name] for name in kept},
        "sigma_rel": sigma_rel,
        "profile_error": combination.error,
        "factors": [[source.folder.name, source.kind, factor] for source, factor in parts],
        "sha256": publish.file_digest(folder / WEIGHTS_NAME),
    }


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return f"the steps {shown}" if len(steps) <= 5 else f"the steps {shown}, ... {steps[-1]}"

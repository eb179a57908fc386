"""Checkpoints of a first-stage training: named parts as safetensors, whole or not at all.

`step-XXXXXXXX/PART.safetensors` (`model`, `optimizer`, `average`, `discriminator_model`, ...) and `checkpoint.json`
with the size and digest of each; the newest that verifies is resumed, a damaged one is named and passed over. No
pickle: AdamW's state is laid out flat as `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step` for each parameter NAME.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models.model_folder import read_json
from pipeline.publish import TEMPORARY_MARK, file_digest, json_digest, whole_folder, write_json

FORMAT = 2
KEEP = 2
MANIFEST, SUFFIX = "checkpoint.json", ".safetensors"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint: where it lies, the steps behind it, and what the loop noted."""

    path: Path
    step: int
    settings: dict[str, Any]
    noted: dict[str, float]


def save(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Publish `folder/step-XXXXXXXX` and remove all but the newest two; `about` has `settings` and `noted`."""
    path = folder / f"step-{step:08d}"
    with whole_folder(path) as beside:
        files = {}
        for part, tensors in parts.items():
            file = beside / f"{part}{SUFFIX}"
            save_file(_plain(tensors), file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        manifest = {"format": FORMAT, "step": step, "files": files, **about}
        write_json(beside / MANIFEST, {**manifest, "digest": json_digest(manifest)})
    _prune(folder, path)
    return path


def newest(folder: Path) -> Saved | None:
    """Return the newest checkpoint in `folder` that verifies, or None when there is none at all.

    Raises:
        CheckpointError: when there are checkpoints and every one is damaged.
    """
    found = _newest_first(folder)
    faults = []
    for path in found:
        saved = _verified(path)
        if isinstance(saved, Saved):
            return saved
        faults.append(f"{path}: {saved}")
        log.warning("%s: %s; falling back to the checkpoint before it", path, saved)
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults)}; no checkpoint is whole: remove {folder} to train from the start"
        )
    return None


def load(saved: Saved) -> dict[str, dict[str, Tensor]]:
    """Return the parts of a verified checkpoint, on the CPU."""
    return {path.stem: load_file(path) for path in sorted(saved.path.glob(f"*{SUFFIX}"))}


def optimizer_tensors(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return AdamW's state by parameter name; empty before its first step."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"{names[id(parameter)]}.{field}": value
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def restore_optimizer(tensors: Mapping[str, Tensor], network: nn.Module, optimizer: Optimizer) -> None:
    """Lay saved AdamW state in, bit for bit.

    Values are copied into tensors with the parameters' own device and memory layout, so that arithmetic after
    the resume meets the same layouts as before.
    """
    state = {}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    flat = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(flat if tensors else []):
        name = names[id(parameter)]
        state[place] = {
            "step": tensors[f"{name}.step"].clone(),
            "exp_avg": torch.empty_like(parameter).copy_(tensors[f"{name}.exp_avg"]),
            "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"{name}.exp_avg_sq"]),
        }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def is_finished(folder: Path, report: str, settings: Mapping[str, Any]) -> bool:
    """Return whether `folder` holds the model that these settings train, as its `report` file says.

    Raises:
        ConfigError: when the folder was trained with other settings, or not by this verb at all.
        DataError: when the report is damaged.
    """
    if not folder.exists():
        return False
    if not (folder / report).is_file():
        raise ConfigError(
            f"{folder}: has no {report}, so it was not made by this verb; move it away to train here"
        )
    recorded = read_json(folder / report).get("settings")
    if not isinstance(recorded, dict):
        raise DataError(f"{folder / report}: has no settings; remove {folder} to train anew")
    require_equal_settings(recorded, settings, folder / report, str(folder))
    return True


def clear(folder: Path, published: Path) -> None:
    """Remove the checkpoints in `folder` and what killed attempts at publishing `published` left beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    for left in published.parent.glob(f".{published.name}{TEMPORARY_MARK}*"):
        shutil.rmtree(left, ignore_errors=True)


def require_equal_settings(
    recorded: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, remove: str
) -> None:
    """Refuse to continue or reuse what was trained with other settings.

    Raises:
        ConfigError: naming every field with both values, and what to `remove` to train anew.
    """
    problems = [
        f"{where}: trained with {name} = {recorded.get(name)!r}, this run has {wanted.get(name)!r}; "
        f"put it back, or remove {remove} to train anew"
        for name in sorted({*recorded, *wanted})
        if recorded.get(name) != wanted.get(name)
    ]
    if problems:
        raise ConfigError(problems)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def _prune(folder: Path, newest_path: Path) -> None:
    """Keep the newest two up to `newest_path`; later ones are damaged leftovers that were passed over."""
    found = _newest_first(folder)
    later = [path for path in found if path.name > newest_path.name]
    for old in [*later, *found[len(later) + KEEP :]]:
        shutil.rmtree(old)


def _verified(path: Path) -> Saved | str:
    """Return the checkpoint at `path`, or what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r}, this version reads {FORMAT}"
        if manifest.pop("digest") != json_digest(manifest):
            return f"{MANIFEST} has another digest than when it was written"
        for name, expected in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
            if file_digest(path / name) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
        return Saved(path, int(manifest["step"]), manifest["settings"], manifest["noted"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__}: {error})"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

"""A checkpoint in DeepSpeed's universal format, which its `load_checkpoint` reads at any world size and ZeRO stage.

DeepSpeed's format is `torch.save`'s, so this is the one artifact of the project that holds pickles: of plain tensors
and numbers only, which `torch.load(weights_only=True)` reads as well. Nothing of ours reads it back.

Source: the layout that `deepspeed.checkpoint.ds_to_universal` of DeepSpeed 0.19 writes and its engines read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config import OptimizerConfig
from pipeline.paths import RunPaths
from pipeline.publish import whole_folder
from pipeline.training.learning_rate import learning_rate
from pipeline.training.saving.checkpoint import newest_checkpoint
from pipeline.training.saving.fragment_file import read_whole
from pipeline.training.saving.manifest import read_manifest

POINTER = "latest_universal"
# Ours -> DeepSpeed's file for each weight.
KINDS = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
# Stages 1 and 2 ask for the first name, stage 3 for the second; both hold counters alone, the weights are in `zero/`.
STATE_NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def export_deepspeed(paths: RunPaths) -> Path:
    """Write the newest checkpoint to `paths.deepspeed` as DeepSpeed's universal format, whole or not at all; return it.

    One weight at a time: host memory holds that and its moments, not the state. The averages do not go over, for
    DeepSpeed has no place for them; weight decay stays what the loading script sets for its parameter groups.

    Raises:
        CheckpointError: when there is no valid checkpoint.
    """
    checkpoint = newest_checkpoint(paths.checkpoints)
    manifest = read_manifest(checkpoint)
    files = [checkpoint / name for name in sorted(manifest["files"])]
    tag = f"global_step{manifest['step']}_universal"
    with whole_folder(paths.deepspeed) as folder:
        for name, shape in manifest["parameters"].items():
            place = folder / tag / "zero" / name
            place.mkdir(parents=True)
            for ours, theirs in KINDS.items():
                torch.save({"param": read_whole(files, ours, {name: shape})[name]}, place / f"{theirs}.pt")
            torch.save(_adam_step(manifest), place / "step.pt")
        torch.save(_optimizer_state(manifest), folder / tag / "zero" / "optimizer_state.pt")
        for state_name in STATE_NAMES:
            torch.save(_model_state(manifest), folder / tag / state_name)
        (folder / POINTER).write_text(tag, encoding="utf-8")
    return paths.deepspeed


def _adam_step(manifest: Mapping[str, Any]) -> torch.Tensor:
    """Return Adam's count as torch's AdamW keeps it."""
    return torch.tensor(float(manifest["applied"]))


def _optimizer_state(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DeepSpeed sets in every parameter group, and the count that its stage 3 takes from here."""
    config = manifest["config"]
    optimizer = OptimizerConfig.model_validate_json(json.dumps(config["optimizer"]))
    rate = learning_rate(optimizer, max(0, manifest["step"] - 1), config["train"]["steps"])
    group = {"lr": rate, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.epsilon}
    return {
        "param_groups": [dict(group), dict(group)],
        "optimizer_state_dict": {"state": {0: {"step": _adam_step(manifest)}}, "param_groups": [dict(group)]},
        "ds_version": manifest["versions"]["deepspeed"],
    }


def _model_state(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "module": {},
        "lr_scheduler": None,
        "dp_world_size": manifest["world_size"],
        "mp_world_size": 1,
        "global_steps": manifest["step"],
        "global_samples": manifest["samples"],
        "skipped_steps": manifest["skipped"],
        "ds_version": manifest["versions"]["deepspeed"],
        "ldm": {"step": manifest["step"], "samples": manifest["samples"]},
    }

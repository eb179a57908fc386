"""The U-Net's diffusers folder: `config.json` and safetensors, read and written without the library.

Every setting of diffusers' U-Net is either one of ours, or must have the one value that our U-Net stands for: a
config that asks for something else is refused, never half understood. Weights may be fp32, fp16 or bf16, in one
file or in shards with an index, with today's names or those of old conversions; each name and shape is checked
against the headers before the first weight is read.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import UNetConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.model_folder import StoredTensor, open_model_folder, read_json, stored_tensors
from pipeline.models.unet import UNet
from pipeline.publish import write_json

CLASS_NAME = "UNet2DConditionModel"
WEIGHTS_STEM = "diffusion_pytorch_model"
VARIANTS = ("fp16", "bf16")
REMEDY = "give the folder of a diffusers pipeline or of its U-Net, with safetensors"
MAX_SHARD_BYTES = 10 * 10**9
LISTED = 20

# diffusers' settings that ours do not have, with the values that say what our U-Net does.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
# Without effect on a U-Net like ours: SDPA scales in fp32 by itself; the heads are those of another embedding.
WITHOUT_EFFECT = frozenset({"upcast_attention", "addition_embed_type_num_heads"})
# What diffusers takes where a config says nothing and our own default differs.
DIFFUSERS_DEFAULTS = {"cross_attention_dim": 1280}
# How older versions of diffusers spelt the parts of an attention and of a change of size.
OLD_SPELLINGS = (
    (re.compile(r"(\battn\d|attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(\battn\d|attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(\battn\d|attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(\battn\d|attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
    (re.compile(r"(samplers\.\d+)\.(?:Conv2d_0|op)\."), r"\1.conv."),
)
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def unet_config(described: Mapping[str, Any], where: str) -> UNetConfig:
    """Return our config for the contents of a diffusers U-Net's `config.json`; `where` begins each problem.

    Raises:
        ConfigError: with a line for each setting that our U-Net does not have, or that does not fit the others.
    """
    problems = []
    kind = described.get("_class_name", CLASS_NAME)
    if kind != CLASS_NAME:
        problems.append(f"{where}: _class_name is {kind!r}; only {CLASS_NAME} can be taken over")
    fields: dict[str, Any] = dict(DIFFUSERS_DEFAULTS)
    for name, value in described.items():
        if name.startswith("_") or name in WITHOUT_EFFECT:
            continue
        if name in FIXED:
            if not _is_fixed(name, value):
                allowed = " or ".join(json.dumps(choice) for choice in FIXED[name])
                problems.append(
                    f"{where}: {name} is {json.dumps(value)}; our U-Net has {allowed} and nothing else"
                )
        elif name in UNetConfig.model_fields:
            fields[name] = _one_side(value) if name == "sample_size" else value
        else:
            problems.append(
                f"{where}: {name} is no setting of {CLASS_NAME} that is known here; is the file right?"
            )
    if fields.get("sample_size") is None:
        problems.append(f"{where}: sample_size is null; give the side of the latents it was trained on")
    try:
        config = UNetConfig.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            key = ".".join(map(str, problem["loc"])) or "settings"
            if key != "sample_size" or fields.get(key) is not None:
                problems.append(f"{where}: {key}: {problem['msg'].removeprefix('Value error, ')}")
    if problems:
        raise ConfigError(problems)
    return config


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """Return the contents of `config.json`: our settings and those that our U-Net stands for, as JSON data."""
    fixed = {name: choices[0] for name, choices in FIXED.items()}
    return {"_class_name": CLASS_NAME, **fixed, **config.model_dump(mode="json")}


@dataclass(frozen=True)
class UNetFolder:
    """A U-Net on disk whose config can be built and whose every weight is there, none of them read yet."""

    folder: Path
    config: UNetConfig
    tensors: Mapping[str, StoredTensor]
    """By the names that our U-Net has."""

    def weights(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight) of the named weights, all by default: float32 on the CPU, however they are stored."""
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in self.tensors if names is None else names:
            stored = self.tensors[name]
            by_file.setdefault(stored.path, []).append((name, stored.name))
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name, stored_name in wanted:
                    yield name, file.get_tensor(stored_name).float()

    def load(self) -> UNet:
        """Return the U-Net, float32 on the CPU, in training mode."""
        with torch.device("meta"):
            network = UNet(self.config)
        network.load_state_dict(dict(self.weights()), strict=True, assign=True)
        return network


def open_unet_folder(folder: Path) -> UNetFolder:
    """Return the U-Net in `folder`: a diffusers pipeline's (in `unet/`), or a U-Net's own folder.

    Raises:
        ConfigError: there is no such folder, or our U-Net cannot be what its config describes.
        DataError: it holds code, is damaged, or its weights are not those of its config: each one is listed.
    """
    if (folder / "model_index.json").is_file() and (folder / "unet").is_dir():
        read_json(folder / "model_index.json")
        folder = folder / "unet"
    found = open_model_folder(folder, WEIGHTS_STEM, REMEDY, variants=VARIANTS)
    config = unet_config(found.config, str(folder / "config.json"))
    tensors: dict[str, StoredTensor] = {}
    for stored in stored_tensors(found).values():
        name = modern_name(stored.name)
        # Some old conversions hold a weight under both spellings.
        if name not in tensors or stored.name == name:
            tensors[name] = stored
    refuse_other_weights(str(folder), config, {name: stored.shape for name, stored in tensors.items()})
    odd = [f"{name} is {stored.dtype}" for name, stored in tensors.items() if stored.dtype not in FLOATS]
    if odd:
        raise DataError(f"{folder}: {odd[0]} ({len(odd)} such); only {', '.join(FLOATS)} can be taken over")
    return UNetFolder(folder, config, tensors)


def modern_name(stored: str) -> str:
    """Return today's name of a weight that an older version of diffusers may have spelt otherwise."""
    for old, new in OLD_SPELLINGS:
        stored = old.sub(new, stored)
    return stored


def refuse_other_weights(where: str, config: UNetConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Do nothing if `found` names the weights of `UNet(config)` and their shapes.

    Raises:
        DataError: a line for each weight that is missing, not known, or of another shape.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in UNet(config).state_dict().items()}
    lines = [f"{where}: {name} {list(wanted[name])} is missing" for name in sorted(wanted.keys() - found)]
    lines += [
        f"{where}: {name} {list(found[name])} is not in the model"
        for name in sorted(found.keys() - wanted.keys())
    ]
    lines += [
        f"{where}: {name} is {list(found[name])}, the model's is {list(wanted[name])}"
        for name in sorted(found.keys() & wanted.keys())
        if tuple(found[name]) != wanted[name]
    ]
    if lines:
        rest = [f"{where}: and {len(lines) - LISTED} more weights"] if len(lines) > LISTED else []
        raise DataError("\n".join(lines[:LISTED] + rest))


def save_unet(
    network: UNet, folder: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `network` as diffusers does: `config.json`, and safetensors in one file or in shards with an index.

    `dtype` None keeps the weights' own. Written in place: call it inside `publish.whole_folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", diffusers_config(network.config))
    shards: list[dict[str, Tensor]] = [{}]
    size_bytes = 0
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if shards[-1] and size_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = tensor
        size_bytes += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{WEIGHTS_STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / f"{WEIGHTS_STEM}.safetensors.index.json", index)


def _is_fixed(name: str, value: Any) -> bool:
    values = value if isinstance(value, list) and name == "only_cross_attention" else [value]
    return all(any(entry is choice or entry == choice for choice in FIXED[name]) for entry in values)


def _one_side(value: Any) -> Any:
    """Return the side of a square that diffusers may describe by two numbers."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value

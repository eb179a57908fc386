"""A finished run as a `diffusers` pipeline folder, which paints the pictures that our Generator paints.

A U-Net with text_time conditioning makes a StableDiffusionXLPipeline, any other a StableDiffusionPipeline. The U-Net
goes over by name, the scheduler is the one that `sample` uses, and the frozen encoders are copied with their bytes as
they are.
"""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.diffusion.samplers import Sampler, make_sampler
from pipeline.errors import ConfigError, DataError
from pipeline.generate import Generator
from pipeline.models.model_folder import open_model_folder, read_json
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import refuse_other_weights, save_unet
from pipeline.paths import RunPaths, autoencoder_folder, text_encoder_folder
from pipeline.tracking import open_records
from pipeline.trained_network import Weights

VAE_STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
TEXT_PREFIX = "text_model."
PROJECTION = "text_projection.weight"
TOWER_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


REGISTERING_SECONDS = 600.0
"""How long `export` waits until MLflow has taken the pipeline; `ldm sync` goes on where it did not."""
SDXL_FIRST, SDXL_SECOND = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class Parts:
    """What a pipeline is put together from."""

    network: UNet
    sampler: Sampler
    autoencoder: Path
    text_encoders: tuple[Path, ...]
    """One folder, or SDXL's two."""

    @property
    def pipeline_class(self) -> str:
        """The class of diffusers that reads the folder."""
        sdxl = self.network.config.addition_embed_type is not None
        return "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline"


def export_pipeline(paths: RunPaths, config: RunConfig, *, weights: Weights = "ema") -> Path:
    """Write the newest checkpoint as a diffusers pipeline to `paths.export`, whole or not at all, and return it.

    `config.sample.sampler` decides which scheduler is written; everything else follows from the checkpoint.

    Raises:
        CheckpointError: when there is no valid checkpoint.
        ConfigError: when no pipeline class reads the text as the run does.
        DataError: when the encoders do not belong to the training's data, or lack a file.
    """
    generator = Generator.load(paths, weights, "cpu")
    trained = generator.trained
    autoencoder = autoencoder_folder(trained.config, paths)
    text_encoder = text_encoder_folder(trained.config, paths)
    second = trained.config.encode.text_encoder_2
    _refuse_other_layer(trained.config.encode.text_layer, "penultimate" if second else "last")
    parts = Parts(
        trained.network,
        make_sampler(config.sample.sampler, trained.config.objective, trained.config.model.sample_size**2),
        autoencoder,
        (text_encoder, Path(second)) if second else (text_encoder,),
    )
    with publish.whole_folder(paths.export) as folder:
        write_pipeline(folder, parts)
        card = model_card(generator, config, parts.pipeline_class)
        publish.write_bytes(folder / "README.md", card.encode())
    if config.tracking.register_model:
        records = open_records(paths, config, kind="export", attempt=uuid.uuid4().hex[:12])
        records.keep("model", paths.export, trained.step, config.name)
        records.close(wait_seconds=REGISTERING_SECONDS)
    return paths.export


def _refuse_other_layer(ours: str, theirs: str) -> None:
    if ours != theirs:
        raise ConfigError(
            f"encode.text_layer: diffusers' pipeline reads the {theirs} layer for this model, this run the {ours} one; "
            "the exported folder would paint other pictures"
        )


def write_pipeline(folder: Path, parts: Parts) -> None:
    """Write a pipeline into the empty `folder`. Written in place: call it inside `publish.whole_folder`.

    Raises:
        ConfigError: when the text encoders are not as many as the U-Net's class of pipeline has.
        DataError: when a folder of an encoder lacks a file.
    """
    network = parts.network
    wanted = 2 if parts.pipeline_class == "StableDiffusionXLPipeline" else 1
    if len(parts.text_encoders) != wanted:
        raise ConfigError(
            f"a {parts.pipeline_class} has {wanted} text encoders, this run {len(parts.text_encoders)}; set "
            f"encode.text_encoder_2 {'to its second one' if wanted == 2 else 'null'}"
        )
    refuse_other_weights(
        "unet", network.config, {name: tuple(w.shape) for name, w in network.state_dict().items()}
    )
    save_unet(network, folder / "unet")
    parts.sampler.save_config(folder / "scheduler")
    copy_autoencoder(parts.autoencoder, folder / "vae")
    for number, source in enumerate(parts.text_encoders, start=1):
        suffix = "" if number == 1 else f"_{number}"
        copy_text_encoder(source, folder / f"text_encoder{suffix}", projection=number == 2)
        copy_tokenizer(source, folder / f"tokenizer{suffix}")
    scheduler = type(parts.sampler).__name__
    publish.write_json(folder / "model_index.json", model_index(parts.pipeline_class, scheduler))


def copy_autoencoder(source: Path, target: Path) -> None:
    """Copy an AutoencoderKL folder: its config, with the scaling factor in it, and its safetensors."""
    found = open_model_folder(source, VAE_STEM, "set encode.autoencoder")
    target.mkdir()
    publish.write_json(target / "config.json", found.config)
    _copy_weights(source, found.weights, VAE_STEM, target)


def copy_text_encoder(source: Path, target: Path, *, projection: bool = False) -> None:
    """Copy a CLIP text model's folder; of a whole CLIP only the text tower, under the names every version reads.

    With `projection` it is SDXL's second, whose pooled text goes through `text_projection`.

    Raises:
        DataError: when there is no projection where one is needed.
    """
    found = open_model_folder(source, TEXT_STEM, "set encode.text_encoder")
    target.mkdir()
    if found.config.get("model_type") != "clip":
        publish.write_json(target / "config.json", found.config)
        _copy_weights(source, found.weights, TEXT_STEM, target)
        names = {name for path in found.weights for name in _names(path)}
    else:
        kind = SDXL_SECOND if projection else SDXL_FIRST
        tower = {"model_type": "clip_text_model", "architectures": [kind]}
        publish.write_json(target / "config.json", {**(found.config.get("text_config") or {}), **tower})
        tensors = {}
        for path in found.weights:
            with safe_open(path, framework="pt") as stored:
                for name in stored.keys():
                    bare = name.removeprefix(TEXT_PREFIX)
                    if bare.startswith(TOWER_PARTS):
                        tensors[TEXT_PREFIX + bare] = stored.get_tensor(name)
                    elif projection and name == PROJECTION:
                        tensors[name] = stored.get_tensor(name)
        save_file(tensors, target / f"{TEXT_STEM}.safetensors", metadata={"format": "pt"})
        names = set(tensors)
    if projection and PROJECTION not in names:
        raise DataError(
            f"{source}: has no {PROJECTION}, which makes SDXL's pooled text; give such an encoder"
        )


def copy_tokenizer(text_encoder: Path, target: Path) -> None:
    """Copy the tokenizer that lies in the text encoder's folder or, as in a diffusers pipeline, beside it.

    Raises:
        DataError: when neither place has one.
    """
    named = "text_encoder" in text_encoder.name
    beside = text_encoder.name.replace("text_encoder", "tokenizer") if named else "tokenizer"
    places = [text_encoder, text_encoder.parent / beside]
    source = next((place for place in places if _has_tokenizer(place)), None)
    if source is None:
        raise DataError(f"{text_encoder}: no tokenizer.json or vocab.json, nor in {beside}/ beside it")
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    # The pipeline pads captions to this length; some folders leave it to the text encoder's config.
    described = (
        read_json(target / "tokenizer_config.json") if (target / "tokenizer_config.json").is_file() else {}
    )
    model = read_json(text_encoder / "config.json")
    tower = model.get("text_config") or model
    tokens = tower.get("max_position_embeddings", 77)
    described = {"tokenizer_class": "CLIPTokenizer", **described, "model_max_length": tokens}
    publish.write_json(target / "tokenizer_config.json", described)


def model_index(pipeline_class: str, scheduler: str) -> dict[str, Any]:
    """Return `model_index.json`: which library and class reads each folder. There is no safety checker."""
    index: dict[str, Any] = {
        "_class_name": pipeline_class,
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", SDXL_FIRST],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if pipeline_class == "StableDiffusionPipeline":
        return index | {"requires_safety_checker": False, "safety_checker": [None, None]}
    # Trained with the encoders' own empty caption, not with zeros in its place.
    return index | {
        "force_zeros_for_empty_prompt": False,
        "text_encoder_2": ["transformers", SDXL_SECOND],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def model_card(generator: Generator, config: RunConfig, pipeline_class: str) -> str:
    """Return README.md: what the pipeline is, from which data and step, and how to use it."""
    trained, sample = generator.trained, config.sample
    side = trained.config.model.sample_size * generator.autoencoder.downsampling
    began = trained.config.warm_start
    facts = {
        "run": trained.config.name,
        "checkpoint": trained.checkpoint.name,
        "optimizer steps": f"{trained.step:,}",
        "training samples seen": f"{trained.samples:,}",
        "weights": trained.weights,
        "began with": f"the {began.weights} weights of `{Path(began.source).name}`"
        if began
        else "random weights",
        "prediction": trained.config.objective.prediction,
        "picture size": f"{side} x {side} pixels",
        "data set digest": f"`{trained.data_digest}`",
        "autoencoder digest": f"`{generator.autoencoder.digest}`",
        "text encoder digest": f"`{generator.text_encoder.digest}`",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return CARD.format(
        name=trained.config.name,
        pipeline_class=pipeline_class,
        rows=rows,
        side=side,
        steps=sample.steps,
        scale=json.dumps(sample.guidance_scale),
    )


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: other
---

# {name}

A latent diffusion model exported with `ldm export`.

| | |
|---|---|
{rows}

```python
from diffusers import {pipeline_class}

pipeline = {pipeline_class}.from_pretrained("PATH OF THIS FOLDER", local_files_only=True)
image = pipeline(
    "a prompt", height={side}, width={side}, num_inference_steps={steps}, guidance_scale={scale}
).images[0]
```

**Licence.** The weights follow from the training pictures, their captions and the frozen encoders. Whether and how
they may be used or shared depends on the licences of those: state them here before you publish this folder.

**Safety.** There is no safety checker in this pipeline.
"""


def _copy_weights(source: Path, weights: tuple[Path, ...], stem: str, target: Path) -> None:
    for path in weights:
        shutil.copyfile(path, target / path.name)
    index = source / f"{stem}.safetensors.index.json"
    if index.is_file() and len(weights) > 1:
        shutil.copyfile(index, target / index.name)


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as stored:
        return list(stored.keys())


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()

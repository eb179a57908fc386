"""A finished run as a `diffusers` StableDiffusionPipeline folder, which paints the pictures that our Generator paints.

The U-Net goes over by name with `strict=True`, the scheduler is the one that `sample` uses, and the frozen encoders are
copied with their bytes as they are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.diffusion.samplers import make_sampler
from pipeline.errors import DataError
from pipeline.generate import Generator, Weights, encoder_folders
from pipeline.models.model_folder import open_model_folder, read_json
from pipeline.models.unet import UNet
from pipeline.paths import RunPaths

VAE_STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
TEXT_PREFIX = "text_model."
TOWER_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def export_pipeline(paths: RunPaths, config: RunConfig, *, weights: Weights = "ema") -> Path:
    """Write the newest checkpoint as a diffusers pipeline to `paths.export`, whole or not at all, and return it.

    `config.sample.sampler` decides which scheduler is written; everything else follows from the checkpoint.

    Raises:
        CheckpointError: when there is no valid checkpoint.
        DataError: when the encoders do not belong to the training's data, or lack a file.
    """
    generator = Generator.load(paths, weights, "cpu")
    trained = generator.trained
    autoencoder, text_encoder = encoder_folders(trained.config, paths)
    sampler = make_sampler(
        config.sample.sampler, trained.config.objective, trained.config.model.sample_size**2
    )
    with publish.whole_folder(paths.export) as folder:
        diffusers_unet(trained.network).save_pretrained(folder / "unet", safe_serialization=True)
        sampler.save_config(folder / "scheduler")
        copy_autoencoder(autoencoder, folder / "vae")
        copy_text_encoder(text_encoder, folder / "text_encoder")
        copy_tokenizer(text_encoder, folder / "tokenizer")
        publish.write_json(folder / "model_index.json", model_index(type(sampler).__name__))
        card = model_card(generator, config)
        publish.write_bytes(folder / "README.md", card.encode())
    return paths.export


def diffusers_unet(network: UNet) -> Any:
    """Return a UNet2DConditionModel with our weights; every name and shape must be the same."""
    unet: Any = UNet2DConditionModel(**network.config.model_dump())
    unet.load_state_dict(network.state_dict(), strict=True)
    return unet


def copy_autoencoder(source: Path, target: Path) -> None:
    """Copy an AutoencoderKL folder: its config, with the scaling factor in it, and its safetensors."""
    found = open_model_folder(source, VAE_STEM, "set encode.autoencoder")
    target.mkdir()
    publish.write_json(target / "config.json", found.config)
    _copy_weights(source, found.weights, VAE_STEM, target)


def copy_text_encoder(source: Path, target: Path) -> None:
    """Copy a CLIPTextModel folder; of a whole CLIP only the text tower, under the names every version reads."""
    found = open_model_folder(source, TEXT_STEM, "set encode.text_encoder")
    target.mkdir()
    if found.config.get("model_type") != "clip":
        publish.write_json(target / "config.json", found.config)
        _copy_weights(source, found.weights, TEXT_STEM, target)
        return
    tower = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
    publish.write_json(target / "config.json", {**(found.config.get("text_config") or {}), **tower})
    tensors = {}
    for path in found.weights:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():
                bare = name.removeprefix(TEXT_PREFIX)
                if bare.startswith(TOWER_PARTS):
                    tensors[TEXT_PREFIX + bare] = stored.get_tensor(name)
    save_file(tensors, target / f"{TEXT_STEM}.safetensors", metadata={"format": "pt"})


def copy_tokenizer(text_encoder: Path, target: Path) -> None:
    """Copy the tokenizer that lies in the text encoder's folder or, as in a diffusers pipeline, beside it.

    Raises:
        DataError: when neither place has one.
    """
    places = [text_encoder, text_encoder.parent / "tokenizer"]
    source = next((place for place in places if _has_tokenizer(place)), None)
    if source is None:
        raise DataError(f"{text_encoder}: no tokenizer.json or vocab.json, nor in tokenizer/ beside it")
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


def model_index(scheduler: str) -> dict[str, Any]:
    """Return `model_index.json`: which library and class reads each folder. There is no safety checker."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def model_card(generator: Generator, config: RunConfig) -> str:
    """Return README.md: what the pipeline is, from which data and step, and how to use it."""
    trained, sample = generator.trained, config.sample
    side = trained.config.model.sample_size * generator.autoencoder.downsampling
    facts = {
        "run": trained.config.name,
        "checkpoint": trained.checkpoint.name,
        "optimizer steps": f"{trained.step:,}",
        "training samples seen": f"{trained.samples:,}",
        "weights": trained.weights,
        "prediction": trained.config.objective.prediction,
        "picture size": f"{side} x {side} pixels",
        "data set digest": f"`{trained.data_digest}`",
        "autoencoder digest": f"`{generator.autoencoder.digest}`",
        "text encoder digest": f"`{generator.text_encoder.digest}`",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return CARD.format(
        name=trained.config.name,
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
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("PATH OF THIS FOLDER", local_files_only=True)
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


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()

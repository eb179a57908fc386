"""A whole SDXL of a few kilobytes: a pair of text towers, pictures of several sizes encoded with them, a U-Net's shape."""

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from pipeline.config import RunConfig
from pipeline.latents.manifest import Manifest
from pipeline.models.text_encoder import train_tokenizer
from pipeline.paths import RunPaths, autoencoder_folder, dataset_folder, text_encoder_folder
from preprocessing.finalize import finalize_dataset
from preprocessing.work import encode_dataset
from tests.builders import CAPTIONS, tiny_autoencoder
from tests.preprocessing.builders import Files, image_file, noise, write_input

TOKENS = 12
WIDTHS, POOLED = (16, 24), 20
MODEL: dict[str, Any] = {
    "cross_attention_dim": sum(WIDTHS),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED + 6 * 4,
}
"""What makes a small U-Net one of SDXL's kind that reads the pair below."""


def clip_text(folder: Path, tokenizer: CLIPTokenizer, **sizes: Any) -> CLIPTextModelWithProjection:
    """Write a random text tower with projection as diffusers pipelines keep it, and return it."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder.parent / folder.name.replace("text_encoder", "tokenizer"))
    return model


def clip_pair(root: Path) -> tuple[Path, Path]:
    """Write the two text encoders of an SDXL folder, the second padding with "!" as OpenCLIP does."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer(CAPTIONS, 600, TOKENS)
    clip_text(
        root / "text_encoder",
        tokenizer,
        hidden_size=WIDTHS[0],
        intermediate_size=32,
        num_hidden_layers=3,
        projection_dim=16,
    )
    other = train_tokenizer(CAPTIONS, 600, TOKENS)
    other.pad_token = "!"
    clip_text(
        root / "text_encoder_2", other, hidden_size=WIDTHS[1], intermediate_size=48, num_hidden_layers=4, projection_dim=POOLED,
        hidden_act="gelu",
    )  # fmt: skip
    return root / "text_encoder", root / "text_encoder_2"


def encoders(root: Path) -> dict[str, Any]:
    """Write an autoencoder and the pair to ROOT; return the `encode` section of a run that reads ROOT/pictures."""
    first, second = clip_pair(root)
    return {
        "source": str(root / "pictures"),
        "autoencoder": str(tiny_autoencoder(root / "vae")),
        "text_encoder": str(first),
        "text_encoder_2": str(second),
        "text_layer": "penultimate",
        "image_size": 16,
        "batch": 4,
        "validation_samples": 4,
    }


def write_pictures(root: Path, count: int) -> None:
    """Write ROOT/pictures, captioned and 16 to 40 pixels a side, so that sizes and crops differ."""
    files: Files = []
    for number in range(count):
        picture = image_file(noise(number, 16 + number % 9, 24 + number % 17))
        caption = CAPTIONS[number % len(CAPTIONS)]
        files += [(f"{number:03d}.png", picture), (f"{number:03d}.txt", caption.encode())]
    write_input(root / "pictures", {"00000": files})


def encode_pictures(config: RunConfig) -> Manifest:
    """Make the data set of a run as `ldm encode` and `ldm finalize` do."""
    paths = RunPaths(Path(config.runs) / config.name)
    out, source = dataset_folder(config, paths), config.encode.source
    encode_dataset(
        config,
        source=source,
        out=out,
        autoencoder=autoencoder_folder(config, paths),
        text_encoder=text_encoder_folder(config, paths),
    )
    return finalize_dataset(config, out, source)

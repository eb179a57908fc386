"""What the ranks do in the tests of training on tokens: the frozen text encoder runs inside the step."""

from pathlib import Path

import torch

from pipeline.config import ClipConfig
from pipeline.models.text_encoder import FrozenTextEncoder, build_clip, save_clip, train_tokenizer
from tests.distributed.dataset import SPEC

CAPTIONS = [f"caption {number}" for number in range(40)]
CLIP = ClipConfig(
    width=SPEC.text_width,
    vision_layers=1,
    text_layers=2,
    heads=2,
    patch=8,
    vocabulary=600,
    max_tokens=SPEC.text_tokens,
    steps=1,
)


def save_text_encoder(folder: Path, seed: int) -> FrozenTextEncoder:
    """Write a small CLIP text tower with random weights and return it as it loads."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, CLIP.vocabulary, CLIP.max_tokens)
    save_clip(build_clip(CLIP, 16, tokenizer), tokenizer, folder / "clip", folder / "text_encoder")
    return FrozenTextEncoder.load(folder / "text_encoder")

"""A tiny first stage: 40 drawn pictures of 16 pixels, widths of 8, seconds of training.

Run as a module it trains one kind in one of several processes: `python -m ... KIND RUN_FOLDER`.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pipeline.config import RunConfig
from pipeline.first_stage.autoencoder import train_autoencoder
from pipeline.first_stage.clip import train_clip
from pipeline.paths import RunPaths

# Every term at once: what two processes must share, and what a checkpoint must hold.
FULL: dict[str, Any] = {
    "precision": "fp32",
    "gradient_weight": 0.5,
    "crop": 8,
    "perceptual": {"weight": 0.5, "width": 8, "batch": 4, "steps": 7},
    "adversarial": {"weight": 0.5, "start": 4, "width": 8, "layers": 2},
}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
}
SHAPES = ("square", "disc", "cross", "stripe", "frame", "corner", "bar", "dot")


@dataclass(frozen=True)
class Pair:
    """What the preparation hands to the first stage."""

    image: np.ndarray
    caption: str
    key: str
    split: str


class InterruptedTrainingError(Exception):
    """Stands for a kill in the middle of a step."""


class FailingPairs(Sequence[Pair]):
    """Pairs that can be iterated; the n-th fetch of a training pair by place raises: it dies inside a step.

    Pairs kept from training may be looked at as often as one likes: pictures of how far it is show them.
    """

    def __init__(self, pairs: Sequence[Pair], fetches: int) -> None:
        self._pairs, self._left = pairs, fetches

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Pair]: ...
    def __getitem__(self, place: int | slice) -> Pair | Sequence[Pair]:
        found = self._pairs[place]
        if not isinstance(found, Sequence) and found.split == "validation":
            return found
        if self._left == 0:
            raise InterruptedTrainingError
        self._left -= 1
        return found


def draw(shape: str, colour: tuple[int, int, int], side: int) -> np.ndarray:
    """Return a white square picture with one coloured shape."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1.0) * 2.0 - 1.0
    inside = {
        "square": (abs(x) < 0.6) & (abs(y) < 0.6),
        "disc": x**2 + y**2 < 0.5,
        "cross": (abs(x) < 0.2) | (abs(y) < 0.2),
        "stripe": abs(x - y) < 0.3,
        "frame": (abs(x) > 0.7) | (abs(y) > 0.7),
        "corner": (x < 0.0) & (y < 0.0),
        "bar": abs(y - 0.5) < 0.2,
        "dot": (x - 0.4) ** 2 + (y + 0.4) ** 2 < 0.1,
    }[shape]
    return np.where(inside[..., None], np.array(colour), 255).astype(np.uint8)


def drawn_pairs() -> list[Pair]:
    """Return 40 pairs in an order that is not that of the keys, one in five held out."""
    made = []
    for number, (shape, (name, colour)) in enumerate(
        (shape, item) for shape in SHAPES for item in COLOURS.items()
    ):
        split = "validation" if number % 5 == number // 5 % 5 else "train"
        made.append(Pair(draw(shape, colour, 16), f"a {name} {shape}", f"{number * 7 % 40:03d}", split))
    return made


def tiny_config(
    seed: int = 0, autoencoder: dict[str, Any] | None = None, clip: dict[str, Any] | None = None
) -> RunConfig:
    """Return a config of seconds, with the named entries of `first_stage` changed."""
    small_autoencoder = {
        "block_out_channels": (8, 16),
        "ema_decay": 0.9,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_attention": False,
        "learning_rate": 3e-3,
        "batch": 4,
        "steps": 12,
        "warmup_steps": 2,
        "checkpoint_every": 5,
        "log_every": 1,
    }
    small_clip = {
        "width": 16,
        "vision_layers": 1,
        "text_layers": 1,
        "heads": 2,
        "patch": 8,
        "vocabulary": 560,
        "max_tokens": 8,
        "batch": 8,
        "steps": 12,
        "warmup_steps": 2,
        "checkpoint_every": 5,
        "log_every": 1,
    }
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "seed": seed,
            "encode": {"source": "pictures", "image_size": 16},
            "first_stage": {
                "autoencoder": small_autoencoder | (autoencoder or {}),
                "clip": small_clip | (clip or {}),
            },
            "model": {},
            "engine": {"global_batch": 4, "micro_batch": 4},
            "train": {"steps": 1},
            "tracking": {"mlflow": "off"},
        }
    )


def main() -> None:
    """Train KIND into RUN_FOLDER as one of the processes that the environment tells of."""
    kind, folder = sys.argv[1:]
    train = train_autoencoder if kind == "autoencoder" else train_clip
    train(tiny_config(autoencoder=FULL), drawn_pairs(), RunPaths(Path(folder)))


if __name__ == "__main__":
    main()

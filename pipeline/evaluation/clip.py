"""A CLIP from a local transformers folder: its image tower as a feature network, and captions in the same space.

Shape letters: N pictures, D features, H W sides in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from pipeline.errors import ConfigError, DataError
from pipeline.models.model_folder import model_digest, open_model_folder, read_json
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.models.text_models import quiet_transformers

REMEDY = "name a local CLIP folder of transformers, or null for the one trained in the run"
PROCESSOR = "preprocessor_config.json"
IMAGE_TYPES = ("clip", "clip_vision_model")


class ClipImages:
    """CLIP's image tower up to its projection: what CLIP-FID and CMMD compare pictures in."""

    def __init__(self, folder: Path, name: str, device: torch.device) -> None:
        """Load the tower of a whole CLIP, or a tower alone, in fp32.

        Raises:
            ConfigError: when there is no such folder, or another kind of model in it.
            DataError: when it holds code, is damaged or lacks weights.
        """
        found = open_model_folder(folder, "model", REMEDY)
        kind = found.config.get("model_type")
        if kind not in IMAGE_TYPES:
            raise ConfigError(f"{folder}: model_type is {kind!r}, which has no CLIP image tower; {REMEDY}")
        self.name, self.digest = name, model_digest(found, found.config)
        self._model = _load(folder).to(device).eval().requires_grad_(False)
        self._side, self._mean, self._deviation = _processor(folder)
        self.width = int(self._model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, pictures_NHWC: np.ndarray) -> np.ndarray:
        """Return projected features, not normalised, float32 [N, D], of pictures uint8 [N, H, W, 3]."""
        pixels_NCHW = torch.from_numpy(self.prepared(pictures_NHWC)).to(self._model.device)
        features_ND: Tensor = self._model(pixel_values=pixels_NCHW).image_embeds
        return features_ND.float().cpu().numpy()

    def prepared(self, pictures_NHWC: np.ndarray) -> np.ndarray:
        """Return what the tower sees, float32 [N, 3, S, S]: the shorter side resized, the centre, normalised."""
        squares = np.stack([_square(picture, self._side) for picture in pictures_NHWC])
        values_NHWC = (squares.astype(np.float32) / np.float32(255) - self._mean) / self._deviation
        return np.ascontiguousarray(values_NHWC.transpose(0, 3, 1, 2))


class ClipCaptions:
    """The text tower of a whole CLIP up to its projection."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load it with its tokenizer.

        Raises:
            ConfigError: when the folder has no text tower with a projection.
            DataError: when it is damaged.
        """
        self._encoder = FrozenTextEncoder.load(folder, device)
        if self._encoder.projected_width is None:
            raise ConfigError(
                f"{folder}: its text tower has no projection, so captions cannot be compared with pictures"
            )

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Return projected features, float32 [N, D]."""
        tokens_NL, _ = self._encoder.tokenize(captions)
        projected_ND = self._encoder.encode_projected(tokens_NL)[1]
        assert projected_ND is not None
        return projected_ND.cpu().numpy()


def unit(features_ND: np.ndarray) -> np.ndarray:
    """Return the features at unit length, float64."""
    features = features_ND.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _square(picture_HWC: np.ndarray, side: int) -> np.ndarray:
    """Return the picture with `side` pixels on its shorter side, and of that the square in the middle."""
    height, width = picture_HWC.shape[:2]
    if (height, width) == (side, side):
        return picture_HWC
    short = min(height, width)
    size = (int(width * side / short), int(height * side / short))
    resized = np.asarray(Image.fromarray(picture_HWC).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    return resized[top : top + side, left : left + side]


def _processor(folder: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """Return side in pixels, mean and deviation [3] that the folder says its pictures are prepared with."""
    path = folder / PROCESSOR
    if not path.is_file():
        raise ConfigError(
            f"{path}: missing, and pictures must be prepared as in the training of the model; {REMEDY}"
        )
    found = read_json(path)
    try:
        size = found.get("crop_size", found["size"])
        side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        mean, deviation = (np.array(found[name], np.float32) for name in ("image_mean", "image_std"))
        if mean.shape != (3,) or deviation.shape != (3,) or not isinstance(side, int):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path}: has no size, image_mean and image_std of three channels") from None
    return side, mean, deviation


def _load(folder: Path) -> Any:
    try:
        with quiet_transformers():
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(
            f"{folder}: not a readable CLIP image tower ({str(error).splitlines()[0]})"
        ) from error
    model, loading = loaded
    wrong = sorted({*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])})
    if wrong:
        raise DataError(
            f"{folder}: weights and config.json do not fit together, first at {wrong[0]}; fetch them again"
        )
    return model

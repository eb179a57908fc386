"""The autoencoder between pixels and latents: built, saved, and loaded frozen from a local diffusers folder.

Any of diffusers' image autoencoders can be loaded; what this project trains is an AutoencoderKL. Scaling is not
applied here: `encode` and `decode` speak unscaled latents, `diffusion/posterior.py` scales once.
Shape letters: B batch, C latent channels, H W sides (of the image or the latent).
"""

from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from diffusers.models import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    VQModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from pipeline.config import AutoencoderConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.model_folder import model_digest, open_model_folder
from pipeline.models.pixels import require_image_range

WEIGHTS_STEM = "diffusion_pytorch_model"
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
REMEDY = (
    "set encode.autoencoder to a local diffusers autoencoder folder, "
    "or make one with `ldm train-autoencoder CONFIG`"
)
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSES: dict[str, type[Any]] = {
    "AutoencoderKL": AutoencoderKL,
    "AsymmetricAutoencoderKL": AsymmetricAutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
    "VQModel": VQModel,
}
TILED = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
TINY_TILES = (8, 4)
"""Downsampling and latent channels that diffusers' tiled encoding of an AutoencoderTiny has written into its code."""
PROBE_SIDE = 128
TILE_STRIDE = 0.75
"""Tiles overlap by a quarter of their side, as AutoencoderKL does it."""


def build_autoencoder(config: AutoencoderConfig, image_size: int) -> AutoencoderKL:
    """Return a fresh AutoencoderKL for images of `image_size` pixels a side, drawn from torch's generator.

    It starts near a linear map (`start_linear`).

    Raises:
        ConfigError: when the sizes do not fit together.
    """
    if image_size % config.downsampling:
        raise ConfigError(
            f"encode.image_size {image_size} is not a multiple of {config.downsampling}, the downsampling of "
            f"{len(config.block_out_channels)} first_stage.autoencoder.block_out_channels"
        )
    odd = [width for width in config.block_out_channels if width % config.norm_num_groups]
    if odd:
        raise ConfigError(
            f"first_stage.autoencoder.block_out_channels {odd[0]} is not a multiple of "
            f"norm_num_groups {config.norm_num_groups}"
        )
    levels = len(config.block_out_channels)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=image_size,
        mid_block_add_attention=config.mid_block_attention,
    )
    start_linear(model)
    return model


@torch.no_grad()
def start_linear(model: AutoencoderKL) -> None:
    """Let every residual branch begin at zero and every other map hand its input on, as far as channels allow.

    Halvings begin as space-to-depth of a quarter of the channels, doublings as nearest neighbour, the rest as
    orthogonal maps: the first steps then train what a linear autoencoder can do, instead of first learning to let
    the picture through. At 70 core-seconds on 64-pixel emoji, f4: 22.8 dB on held-out pictures instead of 19.3.
    Source: residual branches that begin at zero, Goyal et al. 2017, section 5.1; Zhang et al. 2019 ("Fixup").
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        kernel = module.weight
        if name.endswith("conv2"):
            nn.init.zeros_(kernel)
            nn.init.zeros_(cast(Tensor, module.bias))
        elif name.endswith(("conv_shortcut", ".conv_in")):
            nn.init.orthogonal_(kernel)
        elif "upsamplers" in name:
            nn.init.dirac_(kernel)
        elif "downsamplers" in name:
            nn.init.zeros_(kernel)
            for channel in range(len(kernel)):
                kernel[channel, channel // 4, channel % 4 // 2, channel % 2] = 1.0


def save_autoencoder(model: AutoencoderKL, folder: Path, scaling_factor: float) -> None:
    """Write the diffusers folder: `config.json` with `scaling_factor`, and the weights as safetensors.

    Written in place: call it inside `publish.whole_folder`.
    """
    model.register_to_config(scaling_factor=float(scaling_factor))
    model.save_pretrained(folder, safe_serialization=True)


def moments_of(model: AutoencoderKL, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance [B, C, h, w], fp32, of the posterior over latents; logvar in [-30, 20]."""
    moments = model._encode(images_BCHW).float()
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)


class FrozenAutoencoder:
    """An autoencoder that only maps: no gradients, no dropout, no scaling."""

    def __init__(self, model: Any, digest: str) -> None:
        """Freeze `model`; `digest` names its stored config and weights."""
        self._model: Any = model.eval().requires_grad_(False)
        self.digest = digest
        self._folder: Path | None = None
        self._fp32: Self | None = None
        self._tile_size: int | None = None
        config = model.config
        self.scaling_factor = float(config["scaling_factor"])
        self.shift_factor = float(config.get("shift_factor") or 0.0)
        self.channels, self.downsampling = _latent_geometry(model)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        *,
        tile_size: int | None = None,
    ) -> Self:
        """Return the autoencoder in a local diffusers folder, weights in `precision`, on `device`.

        With `tile_size` pictures of longer sides are encoded in overlapping tiles of as many pixels, blended: less
        memory, other numbers near the seams.

        Raises:
            ConfigError: when the folder is missing, holds another kind of model, or one that knows no tiles.
            DataError: when it holds code, is damaged, or lacks weights.
        """
        found = open_model_folder(Path(folder), WEIGHTS_STEM, REMEDY)
        _require_known(found.folder, found.config)
        digest = model_digest(found, found.config)
        model = _load_complete(found.folder, str(found.config["_class_name"]), DTYPES[precision])
        nn.Module.to(model, torch.device(device))
        loaded = cls(model, digest)
        loaded._folder = found.folder
        if tile_size is not None:
            _enable_tiles(found.folder, model, tile_size, loaded.downsampling, loaded.channels)
            loaded._tile_size = tile_size
        return loaded

    def in_fp32(self) -> Self:
        """Return the same autoencoder in fp32 on the same device, loaded from its folder at the first call.

        For pictures that are not finite in half precision: the price is a second copy of the weights.
        """
        if self._model.dtype == torch.float32:
            return self
        if self._fp32 is None:
            assert self._folder is not None, "only a loaded autoencoder has a folder"
            self._fp32 = self.load(self._folder, self._model.device, "fp32", tile_size=self._tile_size)
        return self._fp32

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Return unscaled moments [B, 2C, H/f, W/f], fp32: mean, then logvar clamped to [-30, 20].

        `images_BCHW` are floating images in [-1, 1], sides multiples of the downsampling f. A model without
        posterior (AutoencoderTiny, AutoencoderDC, VQModel before its codebook) has the smallest logvar. What is
        not finite stays so, also where the clamp would hide it.

        Raises:
            DataError: when values lie outside [-1, 1] or the sides do not divide.
        """
        require_image_range(images_BCHW)
        if images_BCHW.shape[2] % self.downsampling or images_BCHW.shape[3] % self.downsampling:
            raise DataError(
                f"images: {images_BCHW.shape[2]} x {images_BCHW.shape[3]} pixels; the sides must be multiples of "
                f"{self.downsampling}, the autoencoder's downsampling"
            )
        images = images_BCHW.to(self._model.device, self._model.dtype)
        mean, logvar = _posterior(self._model, images)
        clamped = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)
        return torch.cat([mean, torch.where(logvar.isfinite(), clamped, torch.nan)], dim=1)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return images [B, 3, H f, W f], fp32, cut to [-1, 1], from unscaled latents [B, C, H, W]."""
        if latents_BCHW.ndim != 4 or latents_BCHW.shape[1] != self.channels:
            raise DataError(
                f"latents: shape {tuple(latents_BCHW.shape)}; expected [B, {self.channels}, H, W]; "
                f"moments have twice the channels and are sampled first"
            )
        latents = latents_BCHW.to(self._model.device, self._model.dtype)
        return self._model.decode(latents).sample.float().clamp(-1.0, 1.0)


def _posterior(model: Any, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unclamped logvar, fp32; the smallest logvar where the model gives a point."""
    if isinstance(model, AutoencoderKL):
        mean, logvar = model._encode(images_BCHW).float().chunk(2, dim=1)
        return mean, logvar
    encoded = model.encode(images_BCHW)
    if isinstance(model, AsymmetricAutoencoderKL):
        mean, logvar = encoded.latent_dist.parameters.float().chunk(2, dim=1)
        return mean, logvar
    point = (encoded.latent if isinstance(model, AutoencoderDC) else encoded.latents).float()
    return point, torch.full_like(point, LOGVAR_MIN)


@torch.no_grad()
def _latent_geometry(model: Any) -> tuple[int, int]:
    """Return latent channels and downsampling: from the config of a KL autoencoder, else by trying."""
    config = model.config
    if isinstance(model, AutoencoderKL):
        return int(config["latent_channels"]), int(2 ** (len(config["block_out_channels"]) - 1))
    probe = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=model.device, dtype=model.dtype)
    mean, _ = _posterior(model, probe)
    return int(mean.shape[1]), PROBE_SIDE // int(mean.shape[2])


def _enable_tiles(folder: Path, model: Any, tile_size: int, downsampling: int, channels: int) -> None:
    kind = type(model).__name__
    if kind not in TILED:
        raise ConfigError(f"encode.tile_size: {kind} in {folder} knows no tiles; set it to null")
    if isinstance(model, AutoencoderTiny) and (downsampling, channels) != TINY_TILES:
        raise ConfigError(
            f"encode.tile_size: diffusers tiles an AutoencoderTiny of downsampling {TINY_TILES[0]} and {TINY_TILES[1]} "
            f"channels alone; {folder} has {downsampling} and {channels}: set it to null"
        )
    if tile_size % (4 * downsampling):
        raise ConfigError(
            f"encode.tile_size: {tile_size} is not a multiple of {4 * downsampling}, four times the downsampling "
            "(tiles overlap by a quarter)"
        )
    if isinstance(model, AutoencoderDC):
        stride = int(tile_size * TILE_STRIDE)
        model.enable_tiling(tile_size, tile_size, stride, stride)
        return
    model.enable_tiling()
    model.tile_sample_min_size = tile_size
    model.tile_latent_min_size = tile_size // downsampling


def _require_known(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ConfigError(
            f"{folder}: _class_name is {kind!r}; supported are {', '.join(sorted(CLASSES))}; {REMEDY}"
        )
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ConfigError(
                f"{folder}: has {name}, per-channel scaling that this pipeline does not apply; use an "
                f"autoencoder with a single scaling_factor"
            )


def _load_complete(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return the model with every weight from the file: a library fills gaps with random numbers."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        model, loading = CLASSES[kind].from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=dtype,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: not a readable {kind} ({str(error).splitlines()[0]})") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    wrong = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if wrong or loading["mismatched_keys"]:
        first = wrong[0] if wrong else loading["mismatched_keys"][0]
        raise DataError(
            f"{folder}: weights and config.json do not fit together, first at {first}; fetch them again"
        )
    return model

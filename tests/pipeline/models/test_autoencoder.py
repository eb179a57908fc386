"""The autoencoder equals diffusers' own, loads what the field stores, and never scales."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models import AutoencoderKL
from safetensors.torch import load_file, save_file

from pipeline.config import AutoencoderConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.autoencoder import FrozenAutoencoder, build_autoencoder, save_autoencoder

SMALL = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, steps=1)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model() -> AutoencoderKL:
    """Return a fresh autoencoder for 16 pixels, f2."""
    torch.manual_seed(0)
    return build_autoencoder(SMALL, 16).eval()


@pytest.fixture
def folder(model: AutoencoderKL, tmp_path: Path) -> Path:
    """Return it saved, with a scaling factor of 0.7."""
    save_autoencoder(model, tmp_path / "autoencoder", 0.7)
    return tmp_path / "autoencoder"


@pytest.fixture
def images() -> torch.Tensor:
    """Return three images in [-1, 1]."""
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0


def rewrite(folder: Path, **changes: object) -> None:
    """Change entries of the folder's config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_defaults_are_the_field_s_f8_autoencoder() -> None:
    with torch.device("meta"):
        model = build_autoencoder(AutoencoderConfig(steps=1), 512)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert AutoencoderConfig(steps=1).downsampling == 8


def test_round_trip_is_bit_equal_and_diffusers_reads_it(model: AutoencoderKL, folder: Path) -> None:
    reloaded = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    assert reloaded.config.scaling_factor == 0.7
    stored = reloaded.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_encode_and_decode_are_diffusers_own_and_unscaled(
    model: AutoencoderKL, folder: Path, images: torch.Tensor
) -> None:
    frozen = FrozenAutoencoder.load(folder)
    assert (frozen.channels, frozen.downsampling, frozen.scaling_factor, frozen.shift_factor) == (
        4,
        2,
        0.7,
        0.0,
    )
    moments = frozen.encode(images)
    assert moments.shape == (3, 8, 8, 8) and moments.dtype == torch.float32 and not moments.requires_grad
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.mean).sample
    assert torch.equal(moments[:, :4], posterior.mean) and torch.equal(moments[:, 4:], posterior.logvar)
    assert torch.equal(frozen.decode(posterior.mean), decoded.clamp(-1, 1))
    rewrite(folder, scaling_factor=123.0)
    assert torch.equal(FrozenAutoencoder.load(folder).encode(images), moments)
    assert FrozenAutoencoder.load(folder).scaling_factor == 123.0


def test_logvar_is_clamped_and_images_are_cut(folder: Path, images: torch.Tensor) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["quant_conv.bias"][4:6], tensors["quant_conv.bias"][6:] = -1000.0, 1000.0
    tensors["decoder.conv_out.bias"][:] = torch.tensor([50.0, -50.0, 0.0])
    save_file(tensors, folder / WEIGHTS)
    frozen = FrozenAutoencoder.load(folder)
    moments = frozen.encode(images)
    assert (moments[:, 4:6] == -30.0).all() and (moments[:, 6:] == 20.0).all()
    decoded = frozen.decode(moments[:, :4])
    assert (decoded[:, 0] == 1.0).all() and (decoded[:, 1] == -1.0).all() and decoded[:, 2].abs().max() <= 1.0


def test_bf16_has_the_same_digest_and_nearly_the_same_moments(folder: Path, images: torch.Tensor) -> None:
    fp32, bf16 = FrozenAutoencoder.load(folder), FrozenAutoencoder.load(folder, precision="bf16")
    assert bf16.digest == fp32.digest
    assert bf16.encode(images).dtype == torch.float32 == bf16.decode(torch.zeros(1, 4, 2, 2)).dtype
    difference = (bf16.encode(images) - fp32.encode(images)).abs().max()
    assert 0.0 < difference < 0.1


def test_digest_follows_weights_and_scaling(folder: Path) -> None:
    before = FrozenAutoencoder.load(folder).digest
    AutoencoderKL.from_pretrained(folder).save_pretrained(folder.parent / "again")
    assert FrozenAutoencoder.load(folder.parent / "again").digest == before
    rewrite(folder, scaling_factor=0.5)
    assert FrozenAutoencoder.load(folder).digest != before


@pytest.mark.parametrize(
    "image", [torch.full((1, 3, 16, 16), 200.0), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
)
def test_wrong_image_range_is_refused(folder: Path, image: torch.Tensor) -> None:
    with pytest.raises(DataError, match="make them with images_from_pixels"):
        FrozenAutoencoder.load(folder).encode(image)


def test_wrong_shapes_are_refused(folder: Path) -> None:
    frozen = FrozenAutoencoder.load(folder)
    with pytest.raises(DataError, match="15 x 16 pixels; the sides must be multiples of 2"):
        frozen.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(DataError, match="moments have twice the channels"):
        frozen.decode(torch.zeros(1, 8, 4, 4))


def test_attention_names_of_old_files_load_alike(folder: Path, images: torch.Tensor) -> None:
    expected = FrozenAutoencoder.load(folder).encode(images)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, former in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{former}.")
        tensors[name] = tensor
    assert any(".query." in name for name in tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(FrozenAutoencoder.load(folder).encode(images), expected)


def test_other_models_are_refused(folder: Path) -> None:
    rewrite(folder, latents_mean=[0.0] * 4)
    with pytest.raises(ConfigError, match="latents_mean"):
        FrozenAutoencoder.load(folder)
    rewrite(folder, latents_mean=None, _class_name="UNet2DModel")
    with pytest.raises(ConfigError, match=r"'UNet2DModel'; supported are .*AutoencoderKL"):
        FrozenAutoencoder.load(folder)


def test_incomplete_or_surplus_weights_are_refused(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    name = "decoder.conv_out.bias"
    for tensors, said in (
        ({key: tensor for key, tensor in whole.items() if key != name}, f"first at {name}"),
        (whole | {"decoder.more": torch.zeros(1)}, "first at decoder.more"),
        (whole | {name: torch.zeros(7)}, "not a readable AutoencoderKL"),
    ):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(DataError, match=said):
            FrozenAutoencoder.load(folder)


def test_missing_pickled_and_coded_folders_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"encode\.autoencoder .*ldm train-autoencoder CONFIG"):
        FrozenAutoencoder.load(folder / "nowhere")
    shutil.copytree(folder, folder.parent / "pickled")
    (folder.parent / "pickled" / WEIGHTS).rename(folder.parent / "pickled" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never read"):
        FrozenAutoencoder.load(folder.parent / "pickled")
    (folder / "code.py").write_text("")
    with pytest.raises(DataError, match="Python code is refused"):
        FrozenAutoencoder.load(folder)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="image_size 60 is not a multiple of 8"):
        build_autoencoder(AutoencoderConfig(steps=1), 60)
    with pytest.raises(ConfigError, match="block_out_channels 16 is not a multiple of norm_num_groups 32"):
        build_autoencoder(AutoencoderConfig(steps=1, block_out_channels=(16, 32)), 64)

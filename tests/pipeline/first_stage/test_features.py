"""Feature networks: read from a folder, refused by name when they do not fit, trained on the pictures themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config import RunConfig
from pipeline.errors import ConfigError, DataError
from pipeline.first_stage.autoencoder import train_autoencoder
from pipeline.first_stage.feature_training import build_features, random_views, train_features
from pipeline.first_stage.features import FeatureNetwork
from pipeline.first_stage.pairs import VIEWS, draws, read_pairs
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from tests.pipeline.first_stage.tiny import Pair

LAYERS: list[dict[str, Any]] = [
    {"kind": "conv", "name": "features.0", "stride": 1, "padding": 1},
    {"kind": "relu"},
    {"kind": "tap", "weights": "lin0"},
    {"kind": "max_pool", "size": 3, "stride": 2},
    {"kind": "conv", "name": "features.3", "stride": 2, "padding": 2},
    {"kind": "relu"},
    {"kind": "tap", "weights": None},
]


def write_network(folder: Path, layers: list[dict[str, Any]] = LAYERS, **changes: Any) -> nn.Sequential:
    """Write an AlexNet-like folder and return the same network in torch's own modules."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 6, 5, stride=2, padding=2),
        nn.ReLU(),
    )
    tensors = {f"features.{name}": tensor for name, tensor in stock.state_dict().items()}
    folder.mkdir()
    save_file(tensors | {"lin0": torch.tensor([0.5, 1.0, 0.0, 2.0])}, folder / "model.safetensors")
    config = {
        "format": "ldm-features-1",
        "input_mean": [-0.03, -0.09, -0.19],
        "input_std": [0.46, 0.45, 0.45],
    }
    (folder / "config.json").write_text(json.dumps({**config, "layers": layers, **changes}))
    return stock


def test_a_folder_is_the_network_it_describes(tmp_path: Path) -> None:
    stock = write_network(tmp_path / "net")
    network = FeatureNetwork.load(tmp_path / "net")
    images = torch.rand(2, 3, 16, 16) * 2.0 - 1.0
    mean, std = (
        torch.tensor(values)[:, None, None] for values in ((-0.03, -0.09, -0.19), (0.46, 0.45, 0.45))
    )
    found = network(images)
    torch.testing.assert_close(found[0], stock[:2]((images - mean) / std))
    torch.testing.assert_close(found[1], stock((images - mean) / std))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    write_network(tmp_path / "net")
    network = FeatureNetwork.load(tmp_path / "net")
    (tmp_path / "again").mkdir()
    network.save(tmp_path / "again")
    again = FeatureNetwork.load(tmp_path / "again")
    assert again.digest == network.digest
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.distances(images, images.flip(3)), network.distances(images, images.flip(3)))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([*LAYERS[:2]], "surplus"),
        ([layer for layer in LAYERS if layer["kind"] != "tap"], "no layer is a tap"),
        ([LAYERS[0], {"kind": "tap", "weights": "lin9"}], "names lin9, which the weights do not hold"),
        ([LAYERS[4], {"kind": "tap"}], r"features\.3\.weight is \(6, 4, 5, 5\), expected \(None, 3"),
        ([{"kind": "attention"}], "layers.0"),
        ([LAYERS[0], {"kind": "tap"}], "which no layer names"),
        ([], "layers"),
    ],
)
def test_layouts_that_do_not_fit_are_named(tmp_path: Path, layers: list[dict[str, Any]], said: str) -> None:
    write_network(tmp_path / "net", layers)
    with pytest.raises(DataError, match="no layer is a tap" if said == "surplus" else said):
        FeatureNetwork.load(tmp_path / "net")


def test_code_pickles_and_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder; set first_stage"):
        FeatureNetwork.load(tmp_path / "nowhere")
    write_network(tmp_path / "net", format="lpips")
    with pytest.raises(DataError, match=r"config\.json: format"):
        FeatureNetwork.load(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").rename(tmp_path / "net" / "model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never read"):
        FeatureNetwork.load(tmp_path / "net")
    (tmp_path / "net" / "net.py").write_text("")
    with pytest.raises(DataError, match="Python code is refused"):
        FeatureNetwork.load(tmp_path / "net")


def test_the_gradient_goes_to_the_reconstruction_alone() -> None:
    network = build_features(4)
    decoded, images = (torch.rand(2, 3, 16, 16).requires_grad_() for _ in range(2))
    network.distances(decoded, images).sum().backward()
    assert decoded.grad is not None and float(decoded.grad.abs().sum()) > 0 and images.grad is None


def test_it_learns_to_know_a_picture_again(
    make_config: Callable[..., RunConfig], pairs: list[Pair], run_paths: Callable[[str], RunPaths]
) -> None:
    section = {"weight": 1.0, "width": 8, "batch": 16, "steps": 300}
    config, paths = (
        make_config(autoencoder={"perceptual": section, "checkpoint_every": 30}),
        run_paths("run"),
    )
    folder = train_features(config, read_pairs(pairs, 16), paths)
    losses = [record["loss"] for record in read_records(paths.metrics, "features")]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_features(config, read_pairs(pairs, 16), paths) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_views_of_a_share_are_those_of_the_whole_batch() -> None:
    images = torch.rand(6, 3, 16, 16)
    whole = random_views(images, draws(0, VIEWS, 3), 6, slice(0, 6))
    share = random_views(images[2:4], draws(0, VIEWS, 3), 6, slice(2, 4))
    assert torch.equal(whole[2:4], share) and whole.shape == (6, 3, 8, 8)
    assert not torch.equal(whole[0], random_views(images, draws(0, VIEWS, 4), 6, slice(0, 6))[0])


def test_a_user_s_network_is_used_and_named(
    make_config: Callable[..., RunConfig],
    pairs: list[Pair],
    run_paths: Callable[[str], RunPaths],
    tmp_path: Path,
) -> None:
    write_network(tmp_path / "net")
    section = {"weight": 1.0, "network": str(tmp_path / "net")}
    paths = run_paths("run")
    train_autoencoder(make_config(autoencoder={"perceptual": section}), pairs, paths)
    report = json.loads((paths.autoencoder / "first_stage.json").read_text())
    assert str(tmp_path / "net") in report["feature_network"] and report["feature_distance"] > 0.0
    assert all(record["perceptual"] > 0.0 for record in read_records(paths.metrics, "autoencoder"))
    assert not (paths.root / "features").exists(), "no network of our own is trained"

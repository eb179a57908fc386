"""FID's Inception-v3 against torch-fidelity's, with weights drawn from a seed; and which files are refused.

The recorded numbers are torch-fidelity 0.4.0's features "2048" for these weights and pictures; on the machine where they
were recorded the two networks agreed bit for bit.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import inception
from pipeline.evaluation.inception import (
    InceptionFeatures,
    InceptionNetwork,
    read_tensors,
    resized_as_tensorflow,
)
from pipeline.evaluation.networks import distance_name, open_features
from pipeline.paths import RunPaths

CPU = torch.device("cpu")
PLACES = [0, 500, 1000, 1500, 2047]
RECORDED = [
    [0.06485865265130997, 0.03008030727505684, 1.341596007347107, 0.0, 0.5509342551231384],
    [0.054744355380535126, 0.0232820063829422, 1.3809313774108887, 0.0, 0.5686604976654053],
]
RECORDED_MEANS = [0.6354222893714905, 0.6335289478302002]


def seeded() -> dict[str, Tensor]:
    """Return weights that keep the size of what goes through, drawn in the order of their names in the network."""
    draw, tensors = default_rng(7), {}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionNetwork().state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = draw.standard_normal(tuple(shape), dtype=np.float32)
        if len(shape) > 1:
            drawn *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        else:
            around_one = name.endswith(("bn.weight", "running_var"))
            drawn = np.abs(1.0 + 0.1 * drawn) if around_one else 0.1 * drawn
        tensors[name] = torch.from_numpy(np.asarray(drawn, np.float32))
    return tensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(seeded(), file)
    return file


def test_features_are_torch_fidelitys(weights: Path) -> None:
    pictures = default_rng(3).integers(0, 256, (2, 40, 56, 3)).astype(np.uint8)
    features = InceptionFeatures(weights, CPU)(pictures)
    assert features.shape == (2, 2048)
    np.testing.assert_allclose(features[:, PLACES], RECORDED, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features.mean(axis=1), RECORDED_MEANS, rtol=1e-5)


def test_a_picture_is_resized_without_half_pixel_centres() -> None:
    """Pixel k of the output reads at k * H / side: the first is the first, twice the size repeats every second exactly."""
    ramp = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 6)
    found = resized_as_tensorflow(ramp, 12)
    assert found[0, 0, :, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5]
    assert torch.equal(resized_as_tensorflow(ramp, 3)[0, 0, :, 0], torch.tensor([0.0, 2.0, 4.0]))


def test_only_the_published_weights_may_be_called_fid(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = open_features(EvaluateConfig(features=str(weights)), RunPaths(tmp_path), CPU)
    assert "not the published file" in network.name
    assert distance_name(network) != "FID" and "not FID" in distance_name(network)
    monkeypatch.setattr(inception, "file_digest", lambda file: "6726825d" + 56 * "0")
    monkeypatch.setattr(inception, "read_tensors", lambda file: seeded())
    assert distance_name(InceptionFeatures(weights, CPU)) == "FID"


def test_a_state_dict_is_read_without_code(tmp_path: Path) -> None:
    tensors = {"fc.bias": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "plain.pth")
    assert torch.equal(read_tensors(tmp_path / "plain.pth")["fc.bias"], tensors["fc.bias"])


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (Path("sprung"),)


def test_what_could_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "script.pt")
    torch.save({"fc.bias": Trap()}, "trap.pth")
    Path("pickle.pkl").write_bytes(pickle.dumps(Trap()))
    torch.save([torch.zeros(1)], "list.pth")
    Path("text.safetensors").write_text("nothing")
    for name in ("script.pt", "trap.pth", "pickle.pkl", "text.safetensors"):
        with pytest.raises(DataError, match="TorchScript and pickled code are never loaded"):
            read_tensors(Path(name))
    with pytest.raises(DataError, match="not names and tensors"):
        read_tensors(Path("list.pth"))
    assert not Path("sprung").exists()


def test_other_weights_and_no_file_are_refused(tmp_path: Path) -> None:
    save_file({"fc.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not the weights of FID's Inception-v3"):
        InceptionFeatures(tmp_path / "other.safetensors", CPU)
    with pytest.raises(ConfigError, match="neither a folder nor a file"):
        open_features(EvaluateConfig(features=str(tmp_path / "none")), RunPaths(tmp_path), CPU)
    with pytest.raises(ConfigError, match="has trained no CLIP"):
        open_features(EvaluateConfig(), RunPaths(tmp_path), CPU)

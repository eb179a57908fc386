"""The Dockerfile built for real, without a daemon: what is in the image, and a training inside of it."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config_file import dump_config
from tests.builders import tiny_autoencoder, tiny_clip, tiny_config, tiny_dataset
from tests.requirements import require_root, require_tool
from tests.services.images import Container, Images

pytestmark = [pytest.mark.container, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]
STEPS = 20
BUILD_TOOLS = ("gcc", "cc", "g++", "make", "cmake", "git", "curl", "wget", "nvcc", "rustc")


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    """A store of images that goes when the tests end; overlay mounts need root."""
    require_root()
    for tool in ("buildah", "debootstrap"):
        require_tool(tool)
    folder = Path(tempfile.mkdtemp(prefix="ldm-images-"))
    try:
        yield Images(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data set, its encoders and a config, for the user of the image to read."""
    folder = tmp_path_factory.mktemp("data")
    tiny_autoencoder(folder / "autoencoder")
    tiny_clip(folder / "text_encoder", folder / "clip")
    tiny_dataset(folder / "latents", folder / "autoencoder", folder / "text_encoder")
    config = tiny_config(
        Path("/home/ldm/runs"),
        data={"dataset": "/data/latents"},
        train={"steps": STEPS, "checkpoint_every": STEPS // 2, "log_every": 5},
        optimizer={"warmup_steps": 2},
    )
    (folder / "tiny.yaml").write_text(dump_config(config))
    readable = Path(tempfile.mkdtemp(prefix="ldm-data-"))
    shutil.copytree(folder, readable, dirs_exist_ok=True)
    readable.chmod(0o755)
    return readable


@pytest.fixture(scope="module")
def container(images: Images, inputs: Path) -> Iterator[Container]:
    """A container of the image, built from the Dockerfile of this clone on a Debian made for it."""
    images.base("localhost/ldm-base")
    images.build(ROOT, "localhost/ldm", "localhost/ldm-base")
    with images.container("localhost/ldm", [f"{inputs}:/data:ro"]) as made:
        yield made
    shutil.rmtree(inputs)


def test_the_image_is_lean_and_runs_as_nobody_special(images: Images, container: Container) -> None:
    assert container.run("id", "-u").strip() == "10001"
    for tool in BUILD_TOOLS:
        assert container.run("sh", "-c", f"command -v {tool} || true").strip() == "", tool
    assert container.run("sh", "-c", "touch /opt/ldm/x 2>/dev/null && echo written || true").strip() == ""
    assert container.run("sh", "-c", "ls /src 2>/dev/null || true").strip() == ""
    configured = json.loads(images.call("inspect", "--type=image", "localhost/ldm"))["OCIv1"]
    assert configured["config"]["Entrypoint"] == ["/usr/bin/tini", "--", "ldm"]
    assert not [word for word in configured["config"]["Env"] if "TOKEN" in word or "SECRET" in word]
    (size,) = json.loads(images.call("images", "--json", "localhost/ldm"))
    print(f"image of {size['size']}")


def test_doctor_finds_everything_inside(container: Container) -> None:
    said = container.run("ldm", "doctor")
    assert "MISSING" not in said and "device       CPU" in said


def test_twenty_steps_of_training_inside(container: Container) -> None:
    said = container.run("ldm", "train", "/data/tiny.yaml", seconds=280)
    assert f"step {STEPS}, " in said
    status = json.loads(container.run("ldm", "status", "/home/ldm/runs/tiny", "--json"))
    assert (status["step"], status["checkpoint_step"], status["checkpoints"]) == (STEPS, STEPS, 2)
    assert status["loss"] > 0
